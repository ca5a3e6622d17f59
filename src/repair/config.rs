//! What a repair is given: which method, how many steps, how the terms are weighed.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One engine, equal optimiser steps, same items and prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Nothing is trained.
    None,
    /// Policy terms only, no coupling weight.
    Policy,
    /// Reward terms only.
    Reward,
    /// Dr.GRPO on samples scored by the unrepaired reward model.
    Rlhf,
    /// Both halves with the coupling weight.
    Joint,
    /// Both halves, coupling weight 1.
    JointUncoupled,
}

impl Method {
    pub(crate) const ALL: [Method; 6] =
        [Method::None, Method::Policy, Method::Reward, Method::Rlhf, Method::Joint, Method::JointUncoupled];

    /// As commands, tables and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Method::None => "none",
            Method::Policy => "policy",
            Method::Reward => "reward",
            Method::Rlhf => "rlhf",
            Method::Joint => "joint",
            Method::JointUncoupled => "joint-uncoupled",
        }
    }

    /// The method of that name; an unknown one is an error that lists them.
    pub fn parse(name: &str) -> Result<Method> {
        Method::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| {
            let names = Method::ALL.map(Method::name).join(", ");
            Error::Usage(format!("--method: expected one of {names}, found {name}"))
        })
    }

    pub(crate) fn trains_policy(self) -> bool {
        matches!(self, Method::Policy | Method::Rlhf | Method::Joint | Method::JointUncoupled)
    }

    pub(crate) fn trains_reward(self) -> bool {
        matches!(self, Method::Reward | Method::Joint | Method::JointUncoupled)
    }

    /// Whether w follows the current reward model.
    pub(crate) fn couples(self) -> bool {
        self == Method::Joint
    }
}

/// What pushes a harmful answer down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnlearnLoss {
    Npo,
    Unlikelihood,
}

/// What NPO compares: mean or summed log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogpScale {
    Mean,
    Sum,
}

/// What keeps benign answers in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetainLoss {
    Ce,
    /// KL(π_0 ‖ π_θ)
    Kl,
}

/// Everything that shapes a repair; a suite overrides what it knows better. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RepairConfig {
    pub steps: usize,
    pub seed: u64,
    pub rank: usize,
    pub alpha: f64,
    pub lr: f64,
    /// Share of the steps over which the learning rate rises.
    pub warmup: f64,
    /// Largest gradient norm per model.
    pub clip: f64,
    pub decay: f64,
    /// Failures of a step.
    pub items: usize,
    /// Benign and borderline answers of a step.
    pub retain_items: usize,
    /// Validated pairs of a step.
    pub replay_items: usize,
    /// Answers are sampled again every so many steps; 0 never.
    pub resample: usize,
    pub unlearn: UnlearnLoss,
    pub logp: LogpScale,
    pub retain: RetainLoss,
    pub lambda_npo: f64,
    pub lambda_safe: f64,
    pub lambda_retain: f64,
    pub lambda_bt: f64,
    pub lambda_center: f64,
    pub lambda_replay: f64,
    pub lambda_anchor: f64,
    /// b of NPO with mean log-probabilities; 0.1 is usual with sums.
    pub npo_beta: f64,
    /// m of the Bradley–Terry term.
    pub margin: f64,
    /// Probability that the first tokens of y⁻ stand before y⁺.
    pub forced_prefix: f64,
    /// The score head is trained too.
    pub train_head: bool,
    /// Samples per prompt of `rlhf`.
    pub group: usize,
    /// β of `rlhf`'s k3 KL.
    pub rlhf_kl: f64,
    /// Packed rows of one forward and backward at most.
    pub batch_tokens: usize,
}

impl Default for RepairConfig {
    fn default() -> Self {
        RepairConfig {
            steps: 80,
            seed: 0,
            rank: 16,
            alpha: 32.0,
            lr: 1e-4,
            warmup: 0.05,
            clip: 1.0,
            decay: 0.0,
            items: 16,
            retain_items: 16,
            replay_items: 16,
            resample: 25,
            unlearn: UnlearnLoss::Npo,
            logp: LogpScale::Mean,
            retain: RetainLoss::Ce,
            lambda_npo: 0.3,
            lambda_safe: 0.5,
            lambda_retain: 1.0,
            lambda_bt: 1.0,
            lambda_center: 0.01,
            lambda_replay: 1.0,
            lambda_anchor: 10.0,
            npo_beta: 1.0,
            margin: 0.0,
            forced_prefix: 0.5,
            train_head: false,
            group: 8,
            rlhf_kl: 0.04,
            batch_tokens: 4096,
        }
    }
}

impl RepairConfig {
    /// Fails on values that cannot be meant.
    pub(crate) fn check(&self) -> Result<()> {
        let positive = [("steps", self.steps), ("rank", self.rank), ("items", self.items), ("group", self.group)];
        for (name, value) in positive {
            if value == 0 {
                return Err(Error::Usage(format!("--{name}: expected at least 1, found 0")));
            }
        }
        let sizes = [("lr", self.lr), ("alpha", self.alpha), ("clip", self.clip), ("npo-beta", self.npo_beta)];
        for (name, value) in sizes {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::Usage(format!("--{name}: expected a positive number, found {value}")));
            }
        }
        Ok(())
    }

    /// Learning rate of step `step` (from 0): linear warm-up, then a cosine down to a tenth.
    pub(crate) fn learning_rate(&self, step: usize) -> f64 {
        let warmup = (self.warmup * self.steps as f64).ceil().max(1.0);
        let at = step as f64;
        if at < warmup {
            return self.lr * (at + 1.0) / warmup;
        }
        let done = (at - warmup) / (self.steps as f64 - warmup).max(1.0);
        self.lr * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }
}
