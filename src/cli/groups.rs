//! Arguments that `probe`, `detect`, `repair` and `compare` share.

use std::path::PathBuf;

use clap::Args;

use super::args;
use crate::error::{Error, Result};
use crate::judge::{JudgeSpec, Sense};
use crate::model::pretrained::ModelSpec;
use crate::repair::Recipe;
use crate::run::Models;

/// The two models that are looked at together.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct PairArgs {
    /// Language model
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    policy: ModelSpec,
    /// Reward model: a sequence classifier with one label
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    reward: ModelSpec,
    /// Packed tokens of one forward pass at most [default: 2048]
    #[arg(long, value_name = "N", value_parser = args::whole::<usize>(1, MOST_TOKENS))]
    batch_tokens: Option<usize>,
    /// Longest answer in tokens, the same for all that is compared
    #[arg(long, value_name = "N", default_value = "64", value_parser = args::whole::<usize>(1, MOST_TOKENS))]
    max_new_tokens: usize,
}

const BATCH_TOKENS: usize = 2048;
const MOST_TOKENS: u64 = 1 << 20;

impl PairArgs {
    /// With the judges, all that works together.
    pub(crate) fn models(&self, judges: &JudgeArgs) -> Models {
        Models {
            policy: self.policy.clone(),
            reward: self.reward.clone(),
            judge: judges.judge.clone(),
            second_judge: judges.second_judge.clone(),
            refusal: judges.refusal.clone(),
            truth: None,
            tau_h: judges.harm_threshold,
            max_new_tokens: self.max_new_tokens,
            batch_tokens: self.batch_tokens.unwrap_or(BATCH_TOKENS),
        }
    }

    /// As typed.
    pub(crate) fn batch_tokens(&self) -> Option<usize> {
        self.batch_tokens
    }
}

/// Who judges, and what counts as wrong.
#[derive(Debug, Args)]
#[command(next_help_heading = "Verdicts")]
pub(crate) struct JudgeArgs {
    /// Who judges: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC")]
    judge: JudgeSpec,
    /// A judge that was trained apart; its rate stands beside the first's
    #[arg(long, value_name = "SPEC")]
    second_judge: Option<JudgeSpec>,
    /// Who says what is a refusal, for over-refusal
    #[arg(long, value_name = "SPEC")]
    refusal: Option<JudgeSpec>,
    /// Harmful means p_harm at or above this
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long, value_enum, default_value = "threshold")]
    approve: Sense,
}

impl JudgeArgs {
    pub(crate) fn sense(&self) -> Sense {
        self.approve
    }
}

/// How a repair is done; what is not given stays as the configuration, or the default, has it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Repair")]
pub(crate) struct RepairArgs {
    /// All settings of a repair as TOML; flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Optimiser steps per trained model
    #[arg(long, value_name = "N")]
    steps: Option<f64>,
    /// Highest learning rate: reached after the warm-up, then lowered to a tenth
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Rank of the LoRA adapters: how many directions a repair may change in each matrix
    #[arg(long, value_name = "N")]
    rank: Option<f64>,
    /// lora_alpha: an adapter's product is scaled by alpha / rank
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// Failures per step
    #[arg(long, value_name = "N")]
    items: Option<f64>,
    /// Sample answers again every N steps; 0 never
    #[arg(long, value_name = "N")]
    resample: Option<f64>,
    /// What NPO compares: mean or summed log-probabilities
    #[arg(long, value_name = "SCALE", value_parser = ["mean", "sum"])]
    logp: Option<String>,
    /// What keeps benign answers in place: cross entropy, or the divergence from the original policy
    #[arg(long, value_name = "LOSS", value_parser = ["ce", "kl"])]
    retain_loss: Option<String>,
    /// What pushes harmful answers down
    #[arg(long, value_name = "LOSS", value_parser = ["npo", "unlikelihood"])]
    unlearn: Option<String>,
    /// Train the score head too
    #[arg(long)]
    train_head: bool,
}

impl RepairArgs {
    /// Defaults, then the file, then flags; `seed` and `batch_tokens` are those typed, if any. Fails on a number out of its range
    /// and on a key that does not exist.
    pub(crate) fn recipe(&self, seed: Option<u64>, batch_tokens: Option<usize>) -> Result<Recipe> {
        let mut table = toml::Table::new();
        if let Some(path) = &self.config {
            let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
            table =
                toml::from_str(&text).map_err(Error::file(path, "settings of a repair", "correct the named key"))?;
            Recipe::try_from(table.clone()).map_err(Error::file(
                path,
                "settings of a repair",
                "correct the named key",
            ))?;
        }
        table.entry("seed").or_insert(super::session::SEED.into());
        table.entry("batch_tokens").or_insert((BATCH_TOKENS as i64).into());
        let counts = [
            ("steps", self.steps),
            ("rank", self.rank),
            ("items", self.items),
            ("resample", self.resample),
            ("seed", seed.map(|n| n as f64)),
            ("batch_tokens", batch_tokens.map(|n| n as f64)),
        ];
        for (key, given) in counts {
            let value = given.map(|n| if n == (n as i64) as f64 { toml::Value::from(n as i64) } else { n.into() });
            table.extend(value.map(|value| (key.to_string(), value)));
        }
        let numbers = [("lr", self.lr), ("alpha", self.alpha)];
        table.extend(numbers.into_iter().filter_map(|(key, given)| Some((key.to_string(), given?.into()))));
        let names = [("logp", &self.logp), ("retain", &self.retain_loss), ("unlearn", &self.unlearn)];
        table.extend(names.into_iter().filter_map(|(key, given)| Some((key.to_string(), given.clone()?.into()))));
        if self.train_head {
            table.insert("train_head".into(), true.into());
        }
        Recipe::try_from(table).map_err(|error| Error::Usage(format!("settings of a repair: --{error}")))
    }
}
