//! `ares probe`.

use std::path::PathBuf;

use clap::Args;

use super::Session;
use super::device::on_device;
use super::watch::Stages;
use crate::error::Result;
use crate::report::tables;
use crate::run::probe::{ProbeOptions, probe};
use crate::run::{Earlier, RunDir};

/// Search for prompts on which policy and reward model fail together
#[derive(Debug, Args)]
pub(crate) struct Probe {
    #[command(flatten)]
    options: ProbeOptions,
    /// Directory to write; it must not exist yet
    #[arg(long, value_name = "DIR", default_value = "runs/probe")]
    out: PathBuf,
}

impl Probe {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let options = ProbeOptions { seed: session.seed(), ..self.options };
        let directory = RunDir::create(&self.out, Earlier::Refuse)?;
        let found = on_device!(device, |ops| probe(ops, &options, &directory, &mut Stages::new(session)))?;
        session.table(&tables::search(&found));
        session.say(&format!("\nwrote {}", directory.path().display()));
        session.result(&found)
    }
}
