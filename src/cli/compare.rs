//! `ares compare`.

use std::path::PathBuf;

use clap::Args;

use super::device::on_device;
use super::groups::{JudgeArgs, PairArgs, RepairArgs};
use super::watch::Stages;
use super::{Session, args, outcome};
use crate::error::Result;
use crate::repair::{LARGEST_SEED, Method};
use crate::run::{DataFiles, Earlier, Experiment, RunDir, experiment};

/// Repair one pair by several methods at equal steps, and measure them on the same held-out prompts
#[derive(Debug, Args)]
pub(crate) struct Compare {
    #[command(flatten)]
    pair: PairArgs,
    #[command(flatten)]
    judges: JudgeArgs,
    #[command(flatten)]
    data: DataFiles,
    /// Grammar that probes are composed from
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    grammar: PathBuf,
    #[command(flatten)]
    repair: RepairArgs,
    /// none, policy, reward, rlhf, joint, joint-uncoupled
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "rlhf,policy,joint")]
    methods: Vec<Method>,
    /// Repeat everything with each of these seeds: one row of the table per method and seed [default: --seed]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = args::whole::<u64>(0, LARGEST_SEED))]
    seeds: Vec<u64>,
    /// Queries of the search, and as many of the uniform one beside it
    #[arg(long, value_name = "N", default_value = "1000", value_parser = args::whole::<usize>(0, 10_000_000))]
    probes: usize,
    /// Repair at most N failures
    #[arg(long, value_name = "N", default_value = "240", value_parser = args::whole::<usize>(0, 10_000_000))]
    failures: usize,
    /// Measure also with the first K tokens of the harmful reference forced
    #[arg(long, value_name = "K,…", value_delimiter = ',', default_value = "5", value_parser = args::whole::<usize>(0, 4096))]
    prefill: Vec<usize>,
    /// Directory to write; it must not exist yet
    #[arg(long, value_name = "DIR", default_value = "runs/compare")]
    out: PathBuf,
}

impl Compare {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let experiment = self.experiment(session)?;
        let directory = RunDir::create(&self.out, Earlier::Refuse)?;
        let watch = &mut Stages::new(session);
        let summary = on_device!(device, |ops| experiment::run(ops, &experiment, &directory, watch))?;
        outcome::show(session, directory.path(), &summary)?;
        session.result(&summary)
    }

    fn experiment(&self, session: &Session) -> Result<Experiment> {
        let (pair, judges) = (&self.pair, &self.judges);
        let given = self.seeds.first().copied().or(session.given_seed);
        let repair = self.repair.recipe(given, pair.batch_tokens)?;
        let seeds = if self.seeds.is_empty() { vec![repair.seed] } else { self.seeds.clone() };
        Ok(Experiment {
            command: "compare",
            models: pair.models(judges),
            data: self.data.clone(),
            grammar: self.grammar.clone(),
            suite: None,
            methods: self.methods.clone(),
            repair,
            seeds,
            probes: self.probes,
            failures: self.failures,
            sense: judges.approve,
            prefill: self.prefill.clone(),
        })
    }
}
