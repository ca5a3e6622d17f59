//! `ares compare` and `ares demo`: several methods on the same held-out prompts, one's own or the suite's.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::Session;
use super::device::on_device;
use super::place::Place;
use super::watch::Stages;
use crate::error::Result;
use crate::probe::ProbeResult;
use crate::report::{self, tables};
use crate::run::args;
use crate::run::demo::{Extent, demo};
use crate::run::summary::Summary;
use crate::run::{Earlier, Suite, config, experiment};

/// Repair one pair by several methods at equal steps, and measure them on the same held-out prompts
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// What to compare, as TOML: `ares run --example` shows every key
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Run every method with each of these values of a setting of [repair]; what they reach goes to pareto.csv
    #[arg(long, value_name = "NAME=VALUE,…", value_parser = args::sweep)]
    sweep: Option<(String, Vec<toml::Value>)>,
    #[command(flatten)]
    place: Place,
}

impl Compare {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let (mut experiment, _) = config::read(&self.config)?;
        experiment.sweep = self.sweep;
        if let Some(seed) = session.given_seed {
            experiment.repair = experiment.repair.with(seed, 1.0);
            experiment.seeds = vec![seed];
        }
        let device = session.device()?;
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
    /// Run all pairs and all methods with three seeds: an hour on two cores
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Run only a few probes and steps, to see whether everything works here
    #[arg(long)]
    quick: bool,
    /// Use the suite in this folder instead of the one that the program carries
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Judge by this: a SPEC as of `ares detect`, or `guard` for the suite's own guard; its classifier then judges second
    #[arg(long, value_name = "guard|SPEC")]
    judge: Option<String>,
    /// Let the suite's attacker, a small language model, write some of the probes
    #[arg(long)]
    attacker: bool,
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
        let judge = match self.judge.as_deref() {
            Some("guard") => Some(suite.guard()),
            given => given.map(str::parse).transpose()?,
        };
        let watch = &mut Stages::new(session);
        self.place.run("demo", Earlier::Keep, |dir| {
            let what = (extent, judge.as_ref(), self.attacker);
            let runs = on_device!(device, |ops| demo(ops, &suite, dir, what, session.seed(), watch))?;
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

/// Who found what, where an attacker wrote beside the grammar.
pub(super) fn show_authors(session: &Session, probe: &ProbeResult) {
    if let Some(table) = &tables::authors(probe) {
        session.say("");
        session.table(table);
    }
}

/// Prints the tables and writes the report.
pub(super) fn show(session: &Session, directory: &Path, summary: &Summary) -> Result<()> {
    if let Some(probe) = &summary.probe {
        session.table(&tables::search(probe));
        show_authors(session, probe);
        session.say("");
    }
    if let Some(rounds) = tables::rounds(summary) {
        session.table(&rounds);
        tables::refusals(summary).iter().for_each(|line| session.say(line));
        session.say("");
    }
    session.table(&tables::methods(summary));
    tables::verdict(summary).iter().for_each(|line| session.say(line));
    if summary.suite.is_some() {
        // Nobody should take it for more than it is.
        session.say("The suite's faults were planted: they are no evidence about real models.");
    }
    for (method, warnings) in tables::warnings(summary) {
        warnings.iter().for_each(|warning| session.say(&format!("warning: {method}: {warning}")));
    }
    let page = report::write(directory, &[])?;
    session.say(&format!("\nreport: {}", page.display()));
    Ok(())
}
