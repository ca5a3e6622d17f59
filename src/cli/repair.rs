//! `ares repair`.

use std::path::PathBuf;

use clap::Args;

use super::Session;
use super::device::on_device;
use super::groups::{JudgeArgs, PairArgs, RepairArgs};
use super::watch::Stages;
use crate::error::{Error, Result};
use crate::model::AdapterInit;
use crate::repair::Method;
use crate::run::repair::{RepairOptions, repair};
use crate::run::{Earlier, RunDir, Scale};

/// Train adapters that repair failures: what `ares probe` wrote to failures.jsonl
#[derive(Debug, Args)]
pub(crate) struct Repair {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    judges: JudgeArgs,
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
    /// policy, reward, rlhf, joint, joint-uncoupled
    #[arg(long, value_name = "NAME", default_value = "joint")]
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
    /// Directory to write; it must not exist yet
    #[arg(long, value_name = "DIR", default_value = "runs/repair")]
    out: PathBuf,
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
        let config = self.settings.recipe(session.given_seed, self.pair.batch_tokens)?;
        let options = RepairOptions {
            models: self.pair.models(&self.judges),
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
        let directory = RunDir::create(&self.out, Earlier::Refuse)?;
        let done = on_device!(device, |ops| repair(ops, &options, &directory, &mut Stages::new(session)))?;
        for item in &done.left_out {
            session.detail(&format!("left out: {}: {}", item.prompt, item.reason));
        }
        done.outcome.warnings.iter().for_each(|warning| session.say(&format!("warning: {warning}")));
        done.written.iter().for_each(|path| session.say(&format!("wrote {}", path.display())));
        session.result(&done)
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
