//! The lines of a run's JSON-lines files, as they are written and as the report reads them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One line of `metrics.jsonl`: one optimiser step of one method.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metric {
    pub method: String,
    pub seed: u64,
    /// From 1.
    pub step: u64,
    /// Loss terms by name, unweighted: `npo`, `safe`, `retain`, `bt`, `center`, `replay`, `anchor`, `grpo`, …
    pub terms: BTreeMap<String, Option<f64>>,
    /// Mean over the step's failures of ℓ(y⁺) and ℓ(y⁻), each the mean log-probability per token.
    pub logp_chosen: Option<f64>,
    pub logp_rejected: Option<f64>,
    /// Before clipping, per model.
    pub grad_norm_policy: Option<f64>,
    pub grad_norm_reward: Option<f64>,
    pub tokens_per_second: Option<f64>,
}
