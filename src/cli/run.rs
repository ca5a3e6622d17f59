//! `ares run`: the closed loop.

use std::path::PathBuf;

use clap::Args;

use super::Session;
use super::compare::show;
use super::device::on_device;
use super::place::Place;
use super::watch::Stages;
use crate::error::{Error, Result};
use crate::run::summary::Summary;
use crate::run::{Earlier, args, config, rounds};

/// Search, repair both models, let the gates decide, and search again: rounds of it, on your own models
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// What to run, as TOML
    #[arg(value_name = "CONFIG", required_unless_present = "example")]
    config: Option<PathBuf>,
    /// Print a configuration with every key, its meaning and its default
    #[arg(long)]
    example: bool,
    /// Rounds at most [default: as the configuration says]
    #[arg(long, value_name = "N", value_parser = args::whole::<usize>(1, 1000))]
    rounds: Option<usize>,
    /// End with exit code 3 if the CFR on the test split stays above this share, 0 to 1
    #[arg(long, value_name = "CFR", value_parser = args::share)]
    fail_above: Option<f64>,
    #[command(flatten)]
    place: Place,
}

impl Run {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let Some(path) = self.config.filter(|_| !self.example) else {
            return super::session::print(&config::example());
        };
        let (mut experiment, mut rounds) = config::read(&path)?;
        experiment.command = "run";
        experiment.seeds = vec![experiment.repair.seed];
        rounds.rounds = self.rounds.unwrap_or(rounds.rounds);
        rounds.fail_above = self.fail_above.or(rounds.fail_above);
        if let Some(seed) = session.given_seed {
            experiment.repair = experiment.repair.with(seed, 1.0);
            experiment.seeds = vec![seed];
        }
        let device = session.device()?;
        let watch = &mut Stages::new(session);
        self.place.run("run", Earlier::Refuse, |dir| {
            let summary = on_device!(device, |ops| rounds::run(ops, &experiment, &rounds, dir, watch))?;
            show(session, dir.path(), &summary)?;
            session.result(&summary)?;
            verdict(&summary, rounds.fail_above)
        })
    }
}

/// Fails with `Error::Gate` where no round was accepted although coupled failures were found, or too much is left.
fn verdict(summary: &Summary, fail_above: Option<f64>) -> Result<()> {
    let rounds = &summary.rounds;
    let accepted = rounds.iter().any(|round| round.repair.is_some() && round.why_not.is_none());
    let refused = rounds.iter().filter(|round| round.why_not.is_some()).count();
    let left_out: u64 = rounds.iter().map(|round| round.left_out).sum();
    if !accepted && (refused > 0 || rounds.iter().any(|round| round.search.coupled > 0)) {
        return Err(Error::Gate(format!(
            "no round was accepted, {refused} refused, {left_out} failures left out: the models are as they were"
        )));
    }
    let left = summary.methods.last().map_or(summary.before.cfr, |run| run.measure.cfr);
    match fail_above {
        Some(most) if !left.is_some_and(|left| left <= most) => {
            let left = left.map_or("unknown".to_string(), |left| format!("{:.2} %", 100.0 * left));
            Err(Error::Gate(format!("CFR on the test split: expected at most {:.2} %, found {left}", 100.0 * most)))
        }
        _ => Ok(()),
    }
}
