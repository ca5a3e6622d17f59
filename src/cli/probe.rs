//! `ares probe`.

use clap::Args;

use super::Session;
use super::compare::show_authors;
use super::device::on_device;
use super::place::Place;
use super::watch::Stages;
use crate::error::Result;
use crate::report::tables;
use crate::run::Earlier;
use crate::run::probe::{ProbeOptions, probe};

/// Search for prompts on which policy and reward model fail together
#[derive(Debug, Args)]
pub(crate) struct Probe {
    #[command(flatten)]
    options: ProbeOptions,
    #[command(flatten)]
    place: Place,
}

impl Probe {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let options = ProbeOptions { seed: session.seed(), ..self.options };
        self.place.run("probe", Earlier::Refuse, |dir| {
            let found = on_device!(device, |ops| probe(ops, &options, dir, &mut Stages::new(session)))?;
            session.table(&tables::search(&found));
            show_authors(session, &found);
            session.say(&format!("\nwrote {}", dir.path().display()));
            session.result(&found)
        })
    }
}
