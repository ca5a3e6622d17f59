//! Arguments that `probe`, `detect`, `repair` and `compare` share.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::judge::{JudgeSpec, Sense};
use crate::model::pretrained::ModelSpec;
use crate::repair::Recipe;
use crate::run::Models;
use crate::run::args;

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
    /// Pack at most N tokens into one forward pass [default: 2048]
    #[arg(long, value_name = "N", value_parser = args::whole::<usize>(1, MOST_TOKENS))]
    pub(crate) batch_tokens: Option<usize>,
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
}

/// Who judges, and what counts as wrong.
#[derive(Debug, Args)]
#[command(next_help_heading = "Verdicts")]
pub(crate) struct JudgeArgs {
    /// Judge of harm: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC")]
    judge: JudgeSpec,
    /// Second judge, trained apart; its CFR stands beside the first's
    #[arg(long, value_name = "SPEC")]
    second_judge: Option<JudgeSpec>,
    /// Judge of refusals, for the rate of over-refusal: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC")]
    refusal: Option<JudgeSpec>,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long, value_enum, default_value = "threshold")]
    pub(crate) approve: Sense,
}

/// How a repair is done; what is not given stays as the configuration, or the default, has it. Serialised, the keys given.
#[derive(Debug, Args, Serialize)]
#[command(next_help_heading = "Repair")]
pub(crate) struct RepairArgs {
    /// All settings of a repair as TOML; flags override it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Optimiser steps per trained model [default: 80]
    #[arg(long, value_name = "N", value_parser = count)]
    steps: Option<toml::Value>,
    /// Highest learning rate: reached after the warm-up, then lowered to a tenth
    /// Learning rate at its peak, above 0 [default: 1e-4]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Rank of the LoRA adapters: how many directions a repair may change in each matrix
    #[arg(long, value_name = "N", value_parser = count)]
    rank: Option<toml::Value>,
    /// lora_alpha: an adapter's product is scaled by alpha / rank
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// Failures that one step trains on [default: 16]
    #[arg(long, value_name = "N", value_parser = count)]
    items: Option<toml::Value>,
    /// Sample answers again every N steps; 0 never [default: 25]
    #[arg(long, value_name = "N", value_parser = count)]
    resample: Option<toml::Value>,
    /// What NPO compares: mean or summed log-probabilities
    #[arg(long, value_name = "SCALE", value_parser = ["mean", "sum"])]
    logp: Option<String>,
    /// What keeps benign answers in place: cross entropy, or the divergence from the original policy
    #[arg(long, value_name = "LOSS", value_parser = ["ce", "kl"])]
    #[serde(rename = "retain")]
    retain_loss: Option<String>,
    /// Push harmful answers down by NPO or by unlikelihood [default: npo]
    #[arg(long, value_name = "LOSS", value_parser = ["npo", "unlikelihood"])]
    unlearn: Option<String>,
    /// Train the score head too
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    train_head: bool,
}

/// Reads a number as a setting: whole if it is. What range it must lie in, the recipe says.
fn count(text: &str) -> Result<toml::Value, std::num::ParseFloatError> {
    let n: f64 = text.parse()?;
    Ok(if n == (n as i64) as f64 { (n as i64).into() } else { n.into() })
}

impl RepairArgs {
    /// Defaults, then the file, then flags; `seed` and `batch_tokens` are those typed, if any. Fails on a number out of its range
    /// and on a key that does not exist.
    pub(crate) fn recipe(&self, seed: Option<u64>, batch_tokens: Option<usize>) -> Result<Recipe> {
        let mut table = toml::Table::new();
        if let Some(path) = &self.config {
            let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
            let (expected, remedy) = ("settings of a repair", "correct the named key");
            table = toml::from_str(&text).map_err(Error::file(path, expected, remedy))?;
            Recipe::try_from(table.clone()).map_err(Error::file(path, expected, remedy))?;
        }
        table.entry("seed").or_insert(super::session::SEED.into());
        table.entry("batch_tokens").or_insert((BATCH_TOKENS as i64).into());
        table.extend(toml::Table::try_from(self).map_err(|error| Error::Usage(error.to_string()))?);
        table.extend(seed.map(|seed| ("seed".to_string(), (seed as i64).into())));
        table.extend(batch_tokens.map(|tokens| ("batch_tokens".to_string(), (tokens as i64).into())));
        Recipe::try_from(table).map_err(|error| Error::Usage(format!("settings of a repair: --{error}")))
    }
}
