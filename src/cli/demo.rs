//! `ares demo`.

use std::path::PathBuf;

use clap::Args;

use super::device::on_device;
use super::watch::Stages;
use super::{Session, outcome};
use crate::error::Result;
use crate::run::Suite;
use crate::run::demo::{Extent, demo};

/// The whole method on small models that fail together: search, three repairs at equal steps, held-out proof
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// All pairs, all methods, three seeds: under an hour
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// A few probes and steps: does everything work here?
    #[arg(long)]
    quick: bool,
    /// Another suite than the one that the program carries
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Where the run goes; an earlier one is kept beside it as DIR.1, DIR.2, …
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    out: PathBuf,
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
        let runs = on_device!(device, |ops| demo(ops, &suite, &self.out, extent, session.seed(), watch))?;
        for run in &runs {
            session.say(&format!("\n{}: {}\n", run.pair.name, run.pair.description));
            outcome::show(session, &run.dir, &run.summary)?;
        }
        outcome::result(session, runs.iter().map(|run| &run.summary))
    }
}
