//! `ares demo`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::device::on_device;
use super::watch::Stages;
use super::{Session, outcome};
use crate::error::Result;
use crate::run::Suite;
use crate::run::demo::{Extent, demo};

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
    /// Write the run here; an earlier one is kept beside it as DIR.1, DIR.2, …
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
        match runs.as_slice() {
            [one] => session.result(&one.summary),
            all => session.result(&json!({ "runs": all.iter().map(|run| &run.summary).collect::<Vec<_>>() })),
        }
    }
}
