//! `ares repair`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Session;
use super::device::on_device;
use super::place::Place;
use super::watch::Stages;
use crate::error::{Error, Result};
use crate::model::AdapterInit;
use crate::repair::{Method, Recipe};
use crate::run::models::BATCH_TOKENS;
use crate::run::repair::{RepairOptions, repair};
use crate::run::{Earlier, Models, Scale};

/// Train adapters that repair failures: what `ares probe` wrote to failures.jsonl
#[derive(Debug, Args)]
pub(crate) struct Repair {
    #[command(flatten)]
    models: Models,
    /// Failures: prompt, rejected, chosen, verdict [default: stdin]
    #[arg(long, short, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Benign and borderline prompts with the answers to keep
    #[arg(long, value_name = "FILE")]
    retain: PathBuf,
    /// Validated pairs that are trained on
    #[arg(long, value_name = "FILE")]
    replay: PathBuf,
    /// Validated pairs that fix the reward threshold
    #[arg(long, value_name = "FILE", required_unless_present = "thresholds")]
    calibration: Option<PathBuf>,
    /// The reward threshold, and mean and deviation of rewards, where an earlier calibration fixed them
    #[arg(long, value_name = "TAU_R,MU_0,S", value_parser = scale, allow_hyphen_values = true, conflicts_with = "calibration")]
    thresholds: Option<Scale>,
    /// sham, sft, dpo, policy, reward, rlhf, joint, joint-uncoupled, joint-shuffled, sequential, alternating
    #[arg(long, value_name = "NAME", default_value = "joint", hide_possible_values = true)]
    method: Method,
    #[command(flatten)]
    settings: RepairArgs,
    /// How an adapter begins that does not come with its model: zero (B is zero: the adapted model begins as the original) or
    /// random:SEED (no gradient is zero)
    #[arg(long, value_name = "INIT", default_value = "zero", value_parser = init)]
    adapter_init: AdapterInit,
    /// Only compute the first step: its loss terms, and its gradients under PEFT's names, go to this safetensors file
    #[arg(long, value_name = "FILE")]
    dump_gradients: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

/// `--adapter-init` as typed; `zero` takes the run's seed.
fn init(text: &str) -> Result<AdapterInit, String> {
    match text.split_once(':') {
        None if text == "zero" => Ok(AdapterInit::Zero { seed: 0 }),
        Some(("random", seed)) => match seed.parse() {
            Ok(seed) => Ok(AdapterInit::Random { seed }),
            Err(_) => Err(format!("{seed:?} is no seed")),
        },
        _ => Err("expected zero or random:SEED".to_string()),
    }
}

/// `--thresholds` as typed: three numbers of a size that rewards have.
fn scale(text: &str) -> Result<Scale, String> {
    let numbers: Result<Vec<f64>, _> = text.split(',').map(str::parse).collect();
    match numbers.as_deref() {
        Ok(&[tau_r, mu_0, s]) if tau_r.abs() <= 1e6 && mu_0.abs() <= 1e6 && (1e-6..=1e6).contains(&s) => {
            Ok(Scale::Given { tau_r, mu_0, s })
        }
        _ => Err("expected three numbers TAU_R,MU_0,S: two from -1e6 to 1e6, and S from 1e-6 to 1e6".to_string()),
    }
}

impl Repair {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let scale = match (self.thresholds, self.calibration) {
            (Some(given), _) => given,
            (None, Some(path)) => Scale::Calibration(path),
            (None, None) => return Err(Error::Usage("--calibration: expected a file, or --thresholds".to_string())),
        };
        let config = self.settings.recipe(session.given_seed, self.models.batch_tokens)?;
        let options = RepairOptions {
            models: self.models,
            method: self.method,
            init: match self.adapter_init {
                AdapterInit::Zero { .. } => AdapterInit::Zero { seed: config.seed },
                random => random,
            },
            config,
            failures: self.input,
            retain: self.retain,
            replay: self.replay,
            scale,
            dump_gradients: self.dump_gradients,
        };
        let done = self.place.run("repair", Earlier::Refuse, |dir| {
            on_device!(device, |ops| repair(ops, &options, dir, &mut Stages::new(session)))
        })?;
        for item in &done.left_out {
            session.detail(&format!("left out: {}: {}", item.prompt, item.reason));
        }
        done.outcome.warnings.iter().for_each(|warning| session.say(&format!("warning: {warning}")));
        done.written.iter().for_each(|path| session.say(&format!("wrote {}", path.display())));
        session.result(&done)
    }
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
    /// Highest learning rate: reached after the warm-up, then lowered to a tenth [default: 1e-4]
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
    /// Compute once more in backward, instead of keeping it: nothing, or all of a block but its input, where memory is short
    #[arg(long, value_name = "WHAT", value_parser = ["nothing", "block"])]
    recompute: Option<String>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_three_numbers_of_a_size_that_rewards_have() {
        assert!(matches!(scale("0.5,-1,2"), Ok(Scale::Given { tau_r: 0.5, mu_0: -1.0, s: 2.0 })));
        for wrong in ["", "1,2", "1,2,3,4", "1,2,0", "1,2,-1", "NaN,0,1", "0,0,inf", "0,1e308,1", "0,0,1e308", "a,b,c"]
        {
            assert!(scale(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn how_adapters_may_begin() {
        assert_eq!(init("zero"), Ok(AdapterInit::Zero { seed: 0 }));
        assert_eq!(init("random:7"), Ok(AdapterInit::Random { seed: 7 }));
        for wrong in ["", "random", "random:", "random:-1", "ones"] {
            assert!(init(wrong).is_err(), "{wrong:?}");
        }
    }
}
