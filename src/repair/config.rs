//! What a repair is given: which method, how many steps, how the terms are weighed.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::model::Keep;

/// One engine, equal optimiser steps per trained model, same items and prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Nothing is trained.
    None,
    /// Both models are held in place, and no failure is trained on: what the rest costs by itself.
    Sham,
    /// y⁺ and retained answers are learned, y⁻ is left alone.
    Sft,
    /// DPO (arXiv:2305.18290) on y⁺ and y⁻, with retention.
    Dpo,
    /// Policy terms only, no coupling weight.
    Policy,
    /// Reward terms only.
    Reward,
    /// Dr.GRPO on samples scored by the reward model as it is.
    Rlhf,
    /// Both halves with the coupling weight.
    Joint,
    /// Both halves, coupling weight 1.
    JointUncoupled,
    /// Both halves, the coupling weights permuted among a step's failures.
    JointShuffled,
    /// `policy` for as many more steps as cost what `joint` trains; after it.
    PolicyMatched,
    /// The reward model first, then Dr.GRPO under it (the published ARES).
    Sequential,
    /// Reward model and policy in turns, a step each.
    Alternating,
}

/// What one tick of a repair trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Both,
    Policy,
    Reward,
    /// The policy, on samples of its own.
    Samples,
}

/// Whose weights a step's failures carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coupling {
    Off,
    On,
    Shuffled,
}

impl Method {
    /// As commands, tables and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Method::None => "none",
            Method::Sham => "sham",
            Method::Sft => "sft",
            Method::Dpo => "dpo",
            Method::Policy => "policy",
            Method::PolicyMatched => "policy-matched",
            Method::Reward => "reward",
            Method::Rlhf => "rlhf",
            Method::Joint => "joint",
            Method::JointUncoupled => "joint-uncoupled",
            Method::JointShuffled => "joint-shuffled",
            Method::Sequential => "sequential",
            Method::Alternating => "alternating",
        }
    }

    pub(crate) fn trains_policy(self) -> bool {
        !matches!(self, Method::None | Method::Reward)
    }

    pub(crate) fn trains_reward(self) -> bool {
        !matches!(
            self,
            Method::None | Method::Sft | Method::Dpo | Method::Policy | Method::PolicyMatched | Method::Rlhf
        )
    }

    /// Whether w follows the current reward model.
    pub(crate) fn coupling(self) -> Coupling {
        match self {
            Method::Joint | Method::Alternating => Coupling::On,
            Method::JointShuffled => Coupling::Shuffled,
            _ => Coupling::Off,
        }
    }

    /// What tick `tick` trains, and which step that is of its model's `steps`; `None` after the last one.
    pub(crate) fn phase(self, tick: usize, steps: usize) -> Option<(Phase, usize)> {
        let (phase, step) = match self {
            Method::None => return None,
            Method::Rlhf => (Phase::Samples, tick),
            Method::Sequential if tick < steps => (Phase::Reward, tick),
            Method::Sequential => (Phase::Samples, tick - steps),
            Method::Alternating => (if tick.is_multiple_of(2) { Phase::Reward } else { Phase::Policy }, tick / 2),
            _ => (Phase::Both, tick),
        };
        (step < steps).then_some((phase, step))
    }
}

/// What pushes a harmful answer down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum UnlearnLoss {
    Npo,
    Unlikelihood,
}

/// What NPO compares: mean or summed log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogpScale {
    Mean,
    Sum,
}

/// What keeps benign answers in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RetainLoss {
    Ce,
    /// KL(π_0 ‖ π_θ)
    Kl,
}

/// What backward computes once more instead of reading it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    #[default]
    Nothing,
    /// All of a block but its input: the same result for up to half as much time again, in a fraction of the memory.
    Block,
}

impl Recompute {
    pub(crate) fn keep(self) -> Keep {
        match self {
            Recompute::Nothing => Keep::Everything,
            Recompute::Block => Keep::Inputs,
        }
    }
}

/// Declares [`RepairConfig`], its defaults, and [`RANGES`]: each key with its kind, its default and, if it is a number, the least and
/// the largest value that can be meant.
macro_rules! settings {
    ($($(#[doc = $doc:literal])* $key:ident: $kind:ty = $default:expr $(, $low:literal to $high:expr)?;)*) => {
        /// Everything that shapes a repair, as it is written; [`Recipe`] is the same with every number in its range. A suite
        /// overrides what it knows better. Unknown keys are errors.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct RepairConfig {
            $($(#[doc = $doc])* pub $key: $kind,)*
        }

        impl RepairConfig {
            /// What a key means, line by line; nothing where its name says it.
            pub(crate) fn docs(key: &str) -> &'static [&'static str] {
                match key {
                    $(stringify!($key) => &[$($doc),*],)*
                    _ => &[],
                }
            }
        }

        impl Default for RepairConfig {
            fn default() -> Self {
                RepairConfig { $($key: $default,)* }
            }
        }

        const RANGES: &[(&str, f64, f64)] = &[$($((stringify!($key), $low, $high),)?)*];
    };
}

settings! {
    steps: usize = 80, 1.0 to 1e6;
    seed: u64 = 0, 0.0 to LARGEST_SEED as f64;
    rank: usize = 16, 1.0 to 1024.0;
    alpha: f64 = 32.0, 1e-3 to 1e6;
    lr: f64 = 1e-4, 1e-9 to 1.0;
    /// Share of the steps over which the learning rate rises.
    warmup: f64 = 0.05, 0.0 to 1.0;
    /// Largest gradient norm per model.
    clip: f64 = 1.0, 1e-6 to 1e6;
    decay: f64 = 0.0, 0.0 to 1.0;
    /// Failures of a step.
    items: usize = 16, 1.0 to 4096.0;
    /// Benign and borderline answers of a step.
    retain_items: usize = 16, 0.0 to 4096.0;
    /// Validated pairs of a step.
    replay_items: usize = 16, 0.0 to 4096.0;
    /// Answers are sampled again every so many steps; 0 never.
    resample: usize = 25, 0.0 to 1e6;
    unlearn: UnlearnLoss = UnlearnLoss::Npo;
    logp: LogpScale = LogpScale::Mean;
    retain: RetainLoss = RetainLoss::Ce;
    lambda_npo: f64 = 0.3, 0.0 to 1e6;
    lambda_safe: f64 = 0.5, 0.0 to 1e6;
    lambda_retain: f64 = 1.0, 0.0 to 1e6;
    lambda_bt: f64 = 1.0, 0.0 to 1e6;
    lambda_center: f64 = 0.01, 0.0 to 1e6;
    lambda_replay: f64 = 1.0, 0.0 to 1e6;
    lambda_anchor: f64 = 10.0, 0.0 to 1e6;
    /// b of NPO with mean log-probabilities; 0.1 is usual with sums.
    npo_beta: f64 = 1.0, 1e-3 to 1e3;
    /// m of the Bradley–Terry term.
    margin: f64 = 0.0, 0.0 to 1e3;
    /// Probability that the first tokens of y⁻ stand before y⁺.
    forced_prefix: f64 = 0.5, 0.0 to 1.0;
    /// The score head is trained too.
    train_head: bool = false;
    /// Samples per prompt of `rlhf`.
    group: usize = 8, 1.0 to 1024.0;
    /// β of `rlhf`'s k3 KL.
    rlhf_kl: f64 = 0.04, 0.0 to 1e3;
    /// Packed rows of one forward and backward at most.
    batch_tokens: usize = 4096, 1.0 to 1048576.0;
    /// Where memory is short: `block` keeps of every block its input alone, and computes the rest again.
    recompute: Recompute = Recompute::Nothing;
}

/// The largest whole number that every reader of JSON holds exactly: seeds stand in `summary.json`.
pub(crate) const LARGEST_SEED: u64 = 1 << 53;

/// A configuration whose every number lies in its range: the defaults, or made by `try_from`; what a repair takes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Recipe(RepairConfig);

impl TryFrom<toml::Table> for Recipe {
    type Error = String;

    /// Fails on an unknown key, a value of another kind, and a number out of its range; says which.
    fn try_from(table: toml::Table) -> Result<Recipe, String> {
        let defaults = toml::Table::try_from(RepairConfig::default()).map_err(|error| error.to_string())?;
        for &(key, low, high) in RANGES {
            let whole = defaults[key].is_integer();
            let number = match table.get(key) {
                None => continue,
                Some(toml::Value::Integer(number)) => *number as f64,
                Some(toml::Value::Float(number)) if !whole => *number,
                Some(_) => f64::NAN,
            };
            if !(low..=high).contains(&number) {
                let kind = if whole { "a whole number" } else { "a number" };
                return Err(format!("{key} = {}, where {kind} from {low} to {high} is expected", table[key]));
            }
        }
        table.try_into().map(Recipe).map_err(|error: toml::de::Error| error.to_string())
    }
}

impl TryFrom<RepairConfig> for Recipe {
    type Error = String;

    fn try_from(config: RepairConfig) -> Result<Recipe, String> {
        Recipe::try_from(toml::Table::try_from(config).map_err(|error| error.to_string())?)
    }
}

impl std::ops::Deref for Recipe {
    type Target = RepairConfig;

    fn deref(&self) -> &RepairConfig {
        &self.0
    }
}

impl Recipe {
    /// What a method makes of it: terms that it lacks weigh nothing.
    pub(super) fn of(&self, method: Method) -> Recipe {
        let mut own = self.0.clone();
        match method {
            Method::Sham => own.items = 0,
            Method::Sft => own.lambda_npo = 0.0,
            Method::Dpo => (own.lambda_npo, own.lambda_safe, own.forced_prefix) = (1.0, 0.0, 0.0),
            _ => {}
        }
        Recipe(own)
    }

    /// The same with one setting changed. Fails as `try_from` does.
    pub(crate) fn set(&self, key: &str, value: &toml::Value) -> Result<Recipe, String> {
        let mut table = toml::Table::try_from(&self.0).map_err(|error| error.to_string())?;
        table.insert(key.to_string(), value.clone());
        Recipe::try_from(table)
    }

    /// The same at another learning rate.
    pub(crate) fn at_rate(&self, lr: f64) -> Recipe {
        Recipe(RepairConfig { lr, ..self.0.clone() })
    }

    /// The same for another number of steps.
    pub(crate) fn lasting(&self, steps: usize) -> Recipe {
        Recipe(RepairConfig { steps, ..self.0.clone() })
    }

    /// The same with another seed, learning `factor` times as fast (1 or less).
    pub(crate) fn with(&self, seed: u64, factor: f64) -> Recipe {
        Recipe(RepairConfig { seed, lr: self.lr * factor, ..self.0.clone() })
    }
}

impl RepairConfig {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every numeric key at values that cannot, or can hardly, be meant: refused by name with its range, or every number that
    /// follows from it is finite.
    #[test]
    fn every_number_is_in_its_range_or_refused_by_name() {
        let defaults = toml::Table::try_from(RepairConfig::default()).unwrap();
        let numeric = defaults.iter().filter(|(_, value)| value.is_integer() || value.is_float());
        let mut accepted = Vec::new();
        for key in numeric.map(|(key, _)| key) {
            let (_, low, high) = RANGES.iter().find(|(name, ..)| name == key).expect(key);
            for value in ["nan", "inf", "-1", "-1.0", "0", "1e308", "1.5", "9223372036854775807"] {
                match Recipe::try_from(toml::from_str::<toml::Table>(&format!("{key} = {value}")).unwrap()) {
                    Ok(recipe) => {
                        assert!((0..recipe.steps.min(9)).all(|step| recipe.learning_rate(step).is_finite()));
                        accepted.push(format!("{key} = {value}"));
                    }
                    Err(error) => {
                        let range = format!("from {low} to {high}");
                        assert!(error.starts_with(&format!("{key} = ")) && error.contains(&range), "{value}: {error}");
                    }
                }
            }
        }
        let expected = "alpha = 1.5, clip = 1.5, decay = 0, forced_prefix = 0, lambda_anchor = 0, lambda_anchor = 1.5, \
            lambda_bt = 0, lambda_bt = 1.5, lambda_center = 0, lambda_center = 1.5, lambda_npo = 0, lambda_npo = 1.5, \
            lambda_replay = 0, lambda_replay = 1.5, lambda_retain = 0, lambda_retain = 1.5, lambda_safe = 0, \
            lambda_safe = 1.5, margin = 0, margin = 1.5, npo_beta = 1.5, replay_items = 0, resample = 0, retain_items = 0, \
            rlhf_kl = 0, rlhf_kl = 1.5, seed = 0, warmup = 0";
        assert_eq!(accepted.join(", "), expected);
    }

    #[test]
    fn unknown_keys_and_other_kinds_are_refused() {
        for (text, expected) in [("stepz = 1", "stepz"), ("logp = \"max\"", "max"), ("rank = true", "rank = true")] {
            let error = Recipe::try_from(toml::from_str::<toml::Table>(text).unwrap()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
