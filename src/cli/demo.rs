//! `ares demo`.

use std::path::PathBuf;

use clap::Args;

use super::device::OnDevice;
use super::watch::Stages;
use super::{Session, outcome};
use crate::error::Result;
use crate::ops::Ops;
use crate::run::demo::{DemoOptions, Extent, demo};

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
        let options = DemoOptions { models: self.models, out: self.out, extent, seed: session.seed() };
        device.run(Work { options, session })
    }
}

struct Work<'a> {
    options: DemoOptions,
    session: &'a Session,
}

impl OnDevice for Work<'_> {
    type Output = ();

    fn run<B: Ops>(self, ops: &B) -> Result<()> {
        let runs = demo(ops, &self.options, &mut Stages::new(self.session))?;
        for run in &runs {
            self.session.say(&format!("\n{}: {}\n", run.pair.name, run.pair.description));
            outcome::show(self.session, &run.dir, &run.summary)?;
        }
        outcome::result(self.session, runs.iter().map(|run| &run.summary))
    }
}
