//! The lines of a run's JSON-lines files, as they are written and as the report reads them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::dir::RunDir;
use crate::detect::evaluate::Evaluation;
use crate::detect::outcome::Outcome;
use crate::error::{Error, Result};
use crate::probe::record::ProbeRecord;
use crate::repair::{Failure, Method, StepMetrics};
use crate::text::write_atomic;

/// One line of `metrics.jsonl`: one optimiser step of one method.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Metric {
    pub(crate) method: String,
    pub(crate) seed: u64,
    /// From 1.
    pub(crate) step: u64,
    /// Loss terms by name, unweighted: `npo`, `safe`, `retain`, `bt`, `center`, `replay`, `anchor`, `grpo`, …
    pub(crate) terms: BTreeMap<String, Option<f64>>,
    /// Mean over the step's failures of ℓ(y⁺) and ℓ(y⁻), each the mean log-probability per token.
    pub(crate) logp_chosen: Option<f64>,
    pub(crate) logp_rejected: Option<f64>,
    /// Before clipping, per model.
    pub(crate) grad_norm_policy: Option<f64>,
    pub(crate) grad_norm_reward: Option<f64>,
    /// Of the whole step, resampling and generation included.
    pub(crate) seconds: Option<f64>,
    pub(crate) tokens_per_second: Option<f64>,
}

/// A step as `metrics.jsonl` keeps it.
pub(super) fn metric(method: Method, seed: u64, m: &StepMetrics) -> Metric {
    let mut terms = BTreeMap::from([("loss".to_string(), Some(m.loss))]);
    terms.extend(m.terms().into_iter().map(|(name, value)| (name.to_string(), Some(value))));
    if let Some(p) = &m.policy {
        terms.insert("coupling".into(), p.coupling);
    }
    if let Some(reward) = m.sample_reward {
        terms.insert("sample_reward".into(), Some(reward));
    }
    Metric {
        method: method.name().to_string(),
        seed,
        step: m.step as u64 + 1,
        terms,
        logp_chosen: m.policy.as_ref().and_then(|p| p.logp_chosen),
        logp_rejected: m.policy.as_ref().and_then(|p| p.logp_rejected),
        grad_norm_policy: m.grad_norm_policy,
        grad_norm_reward: m.grad_norm_reward,
        seconds: Some(m.seconds),
        tokens_per_second: Some(m.tokens_per_second),
    }
}

/// The run's JSON-lines files, gathered and written whole.
#[derive(Default)]
pub(super) struct Lines {
    pub(crate) outcomes: Vec<Map<String, Value>>,
    pub(crate) probes: Vec<Value>,
    pub(crate) failures: Vec<Value>,
    pub(crate) metrics: Vec<Metric>,
}

impl Lines {
    pub(crate) fn outcomes(&mut self, method: &str, seed: u64, evaluation: &Evaluation) {
        let line = |outcome: &Outcome| {
            let mut object = object([("method", method.into()), ("seed", seed.into())]);
            object.extend(outcome.to_object());
            object
        };
        self.outcomes.extend(evaluation.outcomes.iter().chain(evaluation.prefill.values().flatten()).map(line));
    }

    pub(crate) fn probes(&mut self, records: &[ProbeRecord], seed: u64, uniform: bool, after: bool) {
        for record in records {
            let mut value = json!(record);
            let more = object([("seed", seed.into()), ("uniform", uniform.into()), ("after", after.into())]);
            value.as_object_mut().into_iter().for_each(|fields| fields.extend(more.clone()));
            self.probes.push(value);
        }
    }

    pub(crate) fn failures(&mut self, failures: &[Failure], seed: u64) {
        self.failures.extend(failures.iter().map(|failure| failure.to_line(seed)));
    }

    pub(crate) fn write(&self, dir: &RunDir) -> Result<()> {
        write_lines(&dir.file("outcomes.jsonl"), &self.outcomes)?;
        write_lines(&dir.file("probes.jsonl"), &self.probes)?;
        write_lines(&dir.file("failures.jsonl"), &self.failures)?;
        write_lines(&dir.file("metrics.jsonl"), &self.metrics)
    }
}

fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
}

/// One JSON object a line; the file appears whole.
pub(super) fn write_lines<T: Serialize>(path: &Path, lines: &[T]) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line).map_err(|error| Error::write(path)(error.into()))?;
        text.push(b'\n');
    }
    write_atomic(path, &text)
}
