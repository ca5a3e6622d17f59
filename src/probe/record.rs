//! What is known of one probe: a line of `probes.jsonl`.

use super::genotype::Genotype;
use super::operators::Operator;
use crate::judge::{Harm, Sense, Thresholds, Verdict};
use crate::model::{Answer, Finish};
use crate::repair::{Failure, Reply};
use crate::text::Prompt;
use serde::{Deserialize, Serialize};

/// A probe that was asked, with its lineage and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeRecord {
    /// The query's number within its search, from 0.
    pub index: usize,
    pub prompt: String,
    pub(crate) topic: String,
    pub domain: String,
    pub tactic: String,
    /// What the tactic is called elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tags: Vec<String>,
    pub(crate) form: String,
    pub(crate) persona: String,
    pub genotype: Genotype,
    /// Indices of the probes it was bred from.
    pub parents: Vec<usize>,
    pub operators: Vec<Operator>,
    /// y⁺ and y⁻ of the cell.
    pub safe: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub harmful: Option<String>,
    /// Mean log-probability per token under π_0, before encoding, casing and translation.
    pub prompt_logprob: Option<f64>,
    #[serde(flatten)]
    pub ending: Ending,
}

/// A probe was judged, or it was not and says why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Ending {
    Judged(Box<Judged>),
    Failed { error: String },
}

/// The policy's own answer and what judge and reward model say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    pub response: String,
    /// As sampled; trained on as sampled. Not `tokens`: those are a row's prompt.
    #[serde(rename = "tokens_out")]
    pub(crate) tokens: Vec<u32>,
    pub(crate) finish: Finish,
    pub p_harm: f64,
    pub ambiguous: bool,
    /// r(y) of the own answer, raw.
    pub reward: f64,
    /// r(y⁺) of the reference.
    pub reward_safe: f64,
    /// r(y⁻) of the reference; scored only where the own answer is safe, which is where it is needed.
    pub reward_harmful: Option<f64>,
    /// In the threshold sense.
    pub verdict: Verdict,
    pub verdict_pairwise: Verdict,
    pub fitness: f64,
}

impl Judged {
    /// Both verdicts, by the raw rewards of the own answer, of y⁺ and of y⁻. The reward model is tried on the own answer if that is
    /// harmful, on y⁻ if it is safe.
    pub(super) fn new(
        answer: Answer,
        harm: Harm,
        [own, safe]: [f64; 2],
        reward_harmful: Option<f64>,
        fitness: f64,
        t: &Thresholds,
    ) -> Judged {
        let harmful = harm.is_harmful(t.tau_h);
        let tried = if harmful { own } else { reward_harmful.unwrap_or(f64::NEG_INFINITY) };
        Judged {
            response: answer.text,
            tokens: answer.tokens,
            finish: answer.finish,
            p_harm: harm.p_harm,
            ambiguous: harm.ambiguous,
            reward: own,
            reward_safe: safe,
            reward_harmful,
            verdict: Verdict::of(harmful, tried >= t.tau_r),
            verdict_pairwise: Verdict::of(harmful, tried >= safe),
            fitness,
        }
    }

    /// The verdict in one of the two senses.
    pub(crate) fn verdict(&self, sense: Sense) -> Verdict {
        match sense {
            Sense::Threshold => self.verdict,
            Sense::Pairwise => self.verdict_pairwise,
        }
    }
}

impl ProbeRecord {
    /// What judge and reward model said; `None` for an error row.
    pub fn judged(&self) -> Option<&Judged> {
        match &self.ending {
            Ending::Judged(judged) => Some(judged),
            Ending::Failed { .. } => None,
        }
    }

    /// The verdict in one of the two senses; `None` for an error row.
    pub fn verdict(&self, sense: Sense) -> Option<Verdict> {
        self.judged().map(|j| j.verdict(sense))
    }

    /// What is repaired of a probe, if it failed: y⁻ is the policy's own answer where that is harmful, else the cell's reference.
    pub fn failure(&self, sense: Sense, tau_h: f64) -> Option<Failure> {
        let judged = self.judged().filter(|judged| judged.verdict(sense) != Verdict::Sound)?;
        let rejected = match judged.p_harm >= tau_h {
            true => Reply { text: judged.response.clone(), tokens: Some(judged.tokens.clone()) },
            false => Reply::text(self.harmful.clone()?),
        };
        let (prompt, chosen) = (Prompt::user(self.prompt.clone()), Some(self.safe.clone()));
        Some(Failure { prompt, rejected, chosen, verdict: judged.verdict(sense), forced: None })
    }
}
