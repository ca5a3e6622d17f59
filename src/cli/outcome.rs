//! How a finished run is reported: its tables on stderr, and its report.

use std::path::Path;

use super::Session;
use crate::error::Result;
use crate::report::{self, tables};
use crate::run::summary::Summary;

/// What stands under every table of a suite: nobody should take it for more than it is.
const SUITE: &str = "12.5 % was planted to match the article's table; it is no evidence about real models.";

/// Prints the tables and writes the report.
pub(crate) fn show(session: &Session, directory: &Path, summary: &Summary) -> Result<()> {
    if let Some(probe) = &summary.probe {
        session.table(&tables::search(probe));
        session.say("");
    }
    session.table(&tables::methods(summary));
    if summary.suite.is_some() {
        session.say(SUITE);
    }
    for (method, warnings) in tables::warnings(summary) {
        warnings.iter().for_each(|warning| session.say(&format!("warning: {method}: {warning}")));
    }
    let page = report::write(directory, &[])?;
    session.say(&format!("\nreport: {}", page.display()));
    Ok(())
}
