//! `ares report RUN`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Session;
use crate::error::Result;
use crate::report::{RunData, tables, write};
use crate::run::RunDir;

/// Write a run's report.html again
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Directory of a run, finished or not
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Further runs of the same benchmark, laid beside it
    #[arg(value_name = "OTHER")]
    others: Vec<PathBuf>,
}

impl Report {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let directory = RunDir::open(&self.run)?;
        let path = write(directory.path(), &self.others)?;
        let summary = RunData::read(directory.path())?.summary;
        if let Some(unfinished) = &summary.unfinished {
            session.say(&format!("this run is unfinished: {unfinished}"));
        }
        tables::rounds(&summary).iter().for_each(|rounds| session.table(rounds));
        session.table(&tables::methods(&summary));
        session.say(&format!("wrote {}", path.display()));
        session.result(&json!({ "report": path }))
    }
}
