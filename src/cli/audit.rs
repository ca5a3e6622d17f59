//! `ares audit`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Session;
use crate::error::{Error, Result};
use crate::judge::Sense;
use crate::report::tables;
use crate::run::audit::{self, Which};
use crate::text::write_atomic;

/// Hold what a judge measured against people's labels of some answers: rates that are right however the judge errs
///
/// First draw what is to be labelled (--pick), fill in `label` of each row (harmful or safe), then give the rows with --labels. Each
/// rate is the judge's over all answers plus what labels say more than it over the labelled ones, with a 95 % interval; the first
/// method (a run's `before`) is what the others are held against.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    ares audit runs/demo --pick 100 --out to-label.jsonl\n  \
    ares audit runs/demo --labels labelled.jsonl")]
pub(crate) struct Audit {
    /// A run's folder, its outcomes.jsonl, or rows that `ares detect` wrote; what stands first is what the others are held against
    #[arg(value_name = "OUTCOMES", required = true)]
    outcomes: Vec<PathBuf>,
    /// Only these methods, `before` among them [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    method: Vec<String>,
    /// Labels: rows with `prompt`, `response` and `label`, harmful (unsafe, true, 1) or safe (false, 0)
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Draw N prompts at random, and write what every method answered to them: each answer once, without method or verdict. With the
    /// same seed a larger N goes on where a smaller one ended; what has a label already is left out
    #[arg(long, value_name = "N", requires = "out")]
    pick: Option<NonZeroUsize>,
    /// File for what is to be labelled; it must not be there yet
    #[arg(long, value_name = "FILE", requires = "pick")]
    out: Option<PathBuf>,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long, value_name = "APPROVE", value_enum, default_value = "threshold")]
    approve: Sense,
}

impl Audit {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let which = Which { files: &self.outcomes, methods: &self.method, labels: self.labels.as_deref() };
        let audit = audit::Audit::open(&which)?;
        match audit.strangers() {
            0 => {}
            n => {
                session.say(&format!("{n} labels are of answers that nobody gave here, or to other prompts: left out"))
            }
        }
        let Some((pick, out)) = self.pick.zip(self.out) else {
            let findings = audit.findings(self.approve)?;
            session.inform(&tables::audit(&findings), &json!({ "approve": self.approve, "methods": findings }))?;
            let warned = findings.iter().flat_map(|found| found.warnings.iter().map(move |warning| (found, warning)));
            warned.for_each(|(found, warning)| session.say(&format!("{}: {warning}", found.name)));
            return Ok(());
        };
        if out.exists() {
            let why = format!("{}: expected a new file, found one: labels in it would be lost", out.display());
            return Err(Error::Usage(why));
        }
        let rows = audit.pick(pick.get(), session.seed());
        let text: String = rows.iter().map(|row| format!("{}\n", json!(row))).collect();
        write_atomic(&out, text.as_bytes())?;
        session.say(&format!("wrote {}: {} answers; fill in `label` (harmful or safe)", out.display(), rows.len()));
        session.result(&json!({ "out": out, "answers": rows.len() }))
    }
}
