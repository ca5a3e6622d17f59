//! What the method sees of the engine: text in, numbers out. `probe` and `detect` see no tensor; this trait is all of it.

use crate::error::{Error, Result};
use crate::text::Prompt;

/// How answers are sampled; the same for everything that is compared, and part of the benchmark's identity.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Decoding {
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    pub seed: u64,
    pub ignore_eos: bool,
}

impl Decoding {
    pub fn greedy(max_new_tokens: usize) -> Decoding {
        Decoding { max_new_tokens, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, ignore_eos: false }
    }
}

/// One question to the policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    pub prompt: Prompt,
    /// The answer is forced to begin with the first `k` tokens of this text (prefill): `(text, k)`.
    pub(crate) forced: Option<(String, usize)>,
    /// Keys the random numbers together with the seed and the position, so that company and order never matter.
    pub id: u64,
}

impl Ask {
    pub fn new(prompt: Prompt, id: u64) -> Ask {
        Ask { prompt, forced: None, id }
    }
}

/// The policy's answer. Sampled ids are trained on as sampled, never tokenised again.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Answer {
    pub text: String,
    /// Ids without the prompt, forced tokens and the end-of-turn token (when `finish` is `Stop`) included.
    pub tokens: Vec<u32>,
    pub finish: Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended its turn by itself.
    Stop,
    /// The limit of new tokens, or the context, was reached.
    Length,
}

/// Which parameters answer: the frozen originals π_0, r_0, or the adapted π_θ, r_φ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    Start,
    Current,
}

/// Asks about the rows that there are, all in one call; what is found comes back in their places, with `None` in the others'.
/// Fails when `ask` does, and when it gives more or fewer results than rows.
pub(crate) fn ask_some<R, T>(
    rows: impl IntoIterator<Item = Option<R>>,
    ask: impl FnOnce(&[R]) -> Result<Vec<T>>,
) -> Result<Vec<Option<T>>> {
    let mut there = Vec::new();
    let rows: Vec<R> = rows.into_iter().inspect(|row| there.push(row.is_some())).flatten().collect();
    let found = if rows.is_empty() { Vec::new() } else { ask(&rows)? };
    if found.len() != rows.len() {
        let (expected, found) = (format!("{} results", rows.len()), found.len().to_string());
        return Err(Error::Shape { op: "a batch of rows", expected, found });
    }
    let mut found = found.into_iter();
    Ok(there.into_iter().map(|there| if there { found.next() } else { None }).collect())
}

/// A policy and its reward model. Outer errors stop everything (device lost, weights broken, interrupted); an inner error is
/// one row's own (prompt longer than the context, empty prompt) and becomes an error row.
pub trait Subject {
    /// One answer per ask, in order.
    fn answer(&mut self, version: Version, asks: &[Ask], decoding: &Decoding) -> Result<Vec<Result<Answer>>>;

    /// r(x, y) per row, raw scores. `answer` is text, rendered in the reward model's own template.
    fn reward(&mut self, version: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<f32>>>;

    /// (Σ log p, n): summed log-probability of the answer under the policy and its number of tokens (end-of-turn included).
    /// By default of none: `answer` and `reward` are what every subject has.
    fn logprob(&mut self, _: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<(f64, usize)>>> {
        Ok(rows.iter().map(|_| Err(Error::row("a text", "a log-probability", "none"))).collect())
    }

    /// (Σ log p, n) of each *prompt* under π_0: log-probability of its tokens after the first, rendered with the generation
    /// prompt, and their number. A prompt that is a single token is (0, 0).
    fn prompt_logprob(&mut self, prompts: &[&Prompt]) -> Result<Vec<Result<(f64, usize)>>> {
        Ok(prompts.iter().map(|_| Err(Error::row("a prompt", "a log-probability", "none"))).collect())
    }
}
