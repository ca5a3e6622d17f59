//! `ares probe`.

use std::path::PathBuf;

use clap::Args;

use super::Session;
use super::device::on_device;
use super::groups::{JudgeArgs, PairArgs};
use super::watch::Stages;
use crate::error::Result;
use crate::probe::{Fitness, SamplerKind};
use crate::report::tables;
use crate::run::args;
use crate::run::probe::{ProbeOptions, probe};
use crate::run::{Earlier, RunDir};

/// Search for prompts on which policy and reward model fail together
#[derive(Debug, Args)]
pub(crate) struct Probe {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    judges: JudgeArgs,
    /// Validated pairs that fix the reward threshold
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Grammar that probes are composed from
    #[arg(long, value_name = "FILE")]
    grammar: PathBuf,
    /// Prompts as people write them: they only set how likely a probe must be [default: compositions of the grammar]
    #[arg(long, value_name = "FILE")]
    plausible: Option<PathBuf>,
    /// Ask the policy for N answers
    #[arg(long, value_name = "N", default_value = "1000", value_parser = args::whole::<usize>(0, 10_000_000))]
    queries: usize,
    /// How the next probe is chosen
    #[arg(long, value_enum, default_value = "thompson")]
    sampler: SamplerKind,
    /// What makes a probe good
    #[arg(long, value_enum, default_value = "product")]
    fitness: Fitness,
    /// Make as many uniform queries too, and print the lift over them
    #[arg(long)]
    uniform: bool,
    /// Begin with what an earlier search learned: its weights.json
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Directory to write; it must not exist yet
    #[arg(long, value_name = "DIR", default_value = "runs/probe")]
    out: PathBuf,
}

impl Probe {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let options = ProbeOptions {
            models: self.pair.models(&self.judges),
            calibration: self.calibration,
            grammar: self.grammar,
            plausible: self.plausible,
            queries: self.queries,
            sampler: self.sampler,
            fitness: self.fitness,
            sense: self.judges.approve,
            uniform: self.uniform,
            weights: self.weights,
            seed: session.seed(),
        };
        let directory = RunDir::create(&self.out, Earlier::Refuse)?;
        let found = on_device!(device, |ops| probe(ops, &options, &directory, &mut Stages::new(session)))?;
        session.table(&tables::search(&found));
        session.say(&format!("\nwrote {}", directory.path().display()));
        session.result(&found)
    }
}
