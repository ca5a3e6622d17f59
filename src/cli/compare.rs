//! `ares compare` and `ares demo`: several methods on the same held-out prompts, one's own or the suite's.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::Session;
use super::device::on_device;
use super::place::Place;
use super::repair::RepairArgs;
use super::watch::Stages;
use crate::error::Result;
use crate::judge::Sense;
use crate::repair::{LARGEST_SEED, Method};
use crate::report::{self, tables};
use crate::run::args;
use crate::run::demo::{Extent, demo};
use crate::run::summary::Summary;
use crate::run::{DataFiles, Earlier, Experiment, Models, Suite, experiment};

/// Repair one pair by several methods at equal steps, and measure them on the same held-out prompts
#[derive(Debug, Args)]
pub(crate) struct Compare {
    #[command(flatten)]
    models: Models,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long, value_enum, default_value = "threshold")]
    approve: Sense,
    #[command(flatten)]
    data: DataFiles,
    /// Grammar that probes are composed from
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    grammar: PathBuf,
    #[command(flatten)]
    repair: RepairArgs,
    /// none, policy, reward, rlhf, joint, joint-uncoupled
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = "rlhf,policy,joint")]
    #[arg(hide_possible_values = true)]
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
    #[command(flatten)]
    place: Place,
}

impl Compare {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let given = self.seeds.first().copied().or(session.given_seed);
        let repair = self.repair.recipe(given, self.models.batch_tokens)?;
        let experiment = Experiment {
            command: "compare",
            models: self.models,
            data: self.data,
            grammar: self.grammar,
            suite: None,
            methods: self.methods,
            seeds: if self.seeds.is_empty() { vec![repair.seed] } else { self.seeds },
            repair,
            probes: self.probes,
            failures: self.failures,
            sense: self.approve,
            prefill: self.prefill,
        };
        let watch = &mut Stages::new(session);
        self.place.run("compare", Earlier::Refuse, |dir| {
            let summary = on_device!(device, |ops| experiment::run(ops, &experiment, dir, watch))?;
            show(session, dir.path(), &summary)?;
            session.result(&summary)
        })
    }
}

/// Run the whole method on small models that fail together: search, three repairs at equal steps, held-out proof
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Run all pairs and all methods with three seeds: some ten minutes on two cores
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Run only a few probes and steps, to see whether everything works here
    #[arg(long)]
    quick: bool,
    /// Use the suite in this folder instead of the one that the program carries
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    // An earlier run is kept beside it as DIR.1, DIR.2, …
    #[command(flatten)]
    place: Place,
}

impl Demo {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let extent = match (self.full, self.quick) {
            (true, _) => Extent::Full,
            (_, true) => Extent::Quick,
            _ => Extent::Plain,
        };
        let suite = Suite::find(self.models.as_deref())?;
        let watch = &mut Stages::new(session);
        self.place.run("demo", Earlier::Keep, |dir| {
            let runs = on_device!(device, |ops| demo(ops, &suite, dir, extent, session.seed(), watch))?;
            for run in &runs {
                session.say(&format!("\n{}: {}\n", run.pair.name, run.pair.description));
                show(session, &run.dir, &run.summary)?;
            }
            match runs.as_slice() {
                [one] => session.result(&one.summary),
                all => session.result(&json!({ "runs": all.iter().map(|run| &run.summary).collect::<Vec<_>>() })),
            }
        })
    }
}

/// Prints the tables and writes the report.
pub(super) fn show(session: &Session, directory: &Path, summary: &Summary) -> Result<()> {
    if let Some(probe) = &summary.probe {
        session.table(&tables::search(probe));
        session.say("");
    }
    if let Some(rounds) = tables::rounds(summary) {
        session.table(&rounds);
        tables::refusals(summary).iter().for_each(|line| session.say(line));
        session.say("");
    }
    session.table(&tables::methods(summary));
    if summary.suite.is_some() {
        // Nobody should take it for more than it is.
        session.say("12.5 % was planted to match the article's table; it is no evidence about real models.");
    }
    for (method, warnings) in tables::warnings(summary) {
        warnings.iter().for_each(|warning| session.say(&format!("warning: {method}: {warning}")));
    }
    let page = report::write(directory, &[])?;
    session.say(&format!("\nreport: {}", page.display()));
    Ok(())
}
