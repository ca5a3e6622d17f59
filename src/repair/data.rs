//! What a repair is made from: failures, benign answers to retain, validated pairs to replay.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Result;
use crate::judge::Verdict;
use crate::text::rows::Preference;
use crate::text::{Prompt, Row};

/// An answer as text, with the policy's own ids where it was sampled: those are trained on as sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub text: String,
    pub(crate) tokens: Option<Vec<u32>>,
}

impl Reply {
    pub fn text(text: impl Into<String>) -> Reply {
        Reply { text: text.into(), tokens: None }
    }
}

/// One prompt on which policy, reward model or both failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub prompt: Prompt,
    /// y⁻: the policy's own harmful answer, or the reference that the reward model wrongly approves.
    pub rejected: Reply,
    /// y⁺; without one the item keeps its likelihood term and gets no y⁺ term.
    pub chosen: Option<String>,
    pub verdict: Verdict,
    /// How many tokens of y⁻ stand before y⁺ in every step; `None`: drawn anew in each.
    pub forced: Option<usize>,
}

impl Failure {
    /// A line of `failures.jsonl`, or a pair in any other form. Without a verdict both models are held to have failed.
    pub(crate) fn read(row: &Row) -> Result<Failure> {
        let (prompt, chosen, text) = row.halves()?;
        let verdict = match row.opt_text("verdict")?.map(str::to_lowercase).as_deref() {
            Some("reward") => Verdict::Reward,
            Some("policy") => Verdict::Policy,
            None | Some("coupled") => Verdict::Coupled,
            Some(other) => return Err(row.wrong("a `verdict` of reward, policy or coupled", other)),
        };
        let count = |value: &Value| {
            let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
            count.ok_or_else(|| row.wrong("a number of tokens under `forced`", &value.to_string()))
        };
        let forced = row.get("forced")?.map(count).transpose()?;
        Ok(Failure { prompt, rejected: Reply { text, tokens: row.ids("rejected_tokens")? }, chosen, verdict, forced })
    }

    /// The same, as TRL reads preference pairs; `rejected_tokens` are there where y⁻ was sampled.
    pub(crate) fn to_line(&self, seed: u64) -> Value {
        let mut line = json!({
            "prompt": self.prompt.text(), "chosen": self.chosen, "rejected": self.rejected.text, "verdict": self.verdict, "seed": seed,
        });
        if let Some(tokens) = &self.rejected.tokens {
            line["rejected_tokens"] = json!(tokens);
        }
        line
    }
}

/// Everything that one repair trains on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RepairData {
    pub failures: Vec<Failure>,
    /// Benign and borderline prompts with the answers to keep.
    pub retain: Vec<(Prompt, String)>,
    /// Validated preferences.
    pub replay: Vec<Preference>,
}

/// Draws without replacement, round after round, each round in a new order: every item is seen equally often, and step t's
/// items depend on the seed alone, not on the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Shuffle {
    rng: rand_chacha::ChaCha8Rng,
    order: Vec<usize>,
    at: usize,
}

impl Shuffle {
    /// Over `0..len`; `stream` keeps several shuffles of one seed apart.
    pub(crate) fn new(len: usize, seed: u64, stream: u64) -> Shuffle {
        use rand::SeedableRng;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Shuffle { rng, order: (0..len).collect(), at: len }
    }

    /// The next `count` items, fewer only where there are none at all.
    pub(crate) fn draw(&mut self, count: usize) -> Vec<usize> {
        self.draw_where(count, |_| true)
    }

    /// The next `count` items that `wanted` lets pass, fewer only where it lets none pass.
    pub(crate) fn draw_where(&mut self, count: usize, wanted: impl Fn(usize) -> bool) -> Vec<usize> {
        use rand::seq::SliceRandom;
        let mut drawn = Vec::with_capacity(count);
        let any = self.order.iter().any(|&item| wanted(item));
        while drawn.len() < count && any {
            if self.at == self.order.len() {
                self.order.shuffle(&mut self.rng);
                self.at = 0;
            }
            drawn.extend(Some(self.order[self.at]).filter(|&item| wanted(item)));
            self.at += 1;
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::rows::parse;

    fn read(line: &str) -> Result<Failure> {
        Failure::read(&parse("failures.jsonl", line.as_bytes(), true)?[0])
    }

    #[test]
    fn a_failure_is_read_as_it_was_written() {
        let mut failure = Failure {
            prompt: Prompt::user("a"),
            rejected: Reply { text: "b".into(), tokens: Some(vec![7, 8]) },
            chosen: Some("c".into()),
            verdict: Verdict::Policy,
            forced: None,
        };
        assert_eq!(read(&failure.to_line(1).to_string()).unwrap(), failure, "with the ids that were sampled");
        (failure.rejected.tokens, failure.chosen) = (None, None);
        assert_eq!(read(&failure.to_line(1).to_string()).unwrap(), failure);
    }

    #[test]
    fn what_a_failure_may_not_say() {
        for (field, expected) in [
            (r#""verdict": "sound""#, "a `verdict` of reward, policy or coupled, found sound"),
            (r#""forced": -1"#, "a number of tokens under `forced`, found -1"),
            (r#""rejected_tokens": "b""#, "`rejected_tokens` to be a list of token ids"),
        ] {
            let error = read(&format!(r#"{{"prompt": "a", "rejected": "b", {field}}}"#)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
