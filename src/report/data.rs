//! A run directory as the report reads it. `summary.json` must be there; what else is missing is left out of the report.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::detect::measure::MethodResult;
use crate::detect::outcome::Outcome;
use crate::detect::rows::Kind;
use crate::error::{Error, Result};
use crate::judge::Verdict;
use crate::repair::StepMetrics;
use crate::run::summary::{self, Summary};
use crate::run::{Manifest, manifest};

/// The name under which `outcomes.jsonl` holds what was measured before any repair.
pub(crate) const BEFORE: &str = "before";

/// Everything that `report.html` is made from.
#[derive(Debug, Clone)]
pub(crate) struct RunData {
    pub(crate) summary: Summary,
    pub(crate) manifest: Option<Manifest>,
    pub(crate) outcomes: Vec<Measured>,
    pub(crate) metrics: Vec<StepMetrics>,
    pub(crate) probes: Vec<Query>,
}

/// One line of `outcomes.jsonl`: one prompt under one method.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Measured {
    /// [`BEFORE`] or a method's name.
    method: String,
    seed: u64,
    #[serde(flatten)]
    outcome: Outcome,
}

/// One line of `probes.jsonl`: one query of the search.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Query {
    pub(crate) topic: String,
    pub(crate) domain: String,
    pub(crate) tactic: String,
    pub(crate) tags: Vec<String>,
    pub(crate) verdict: Option<Verdict>,
    /// Whether the query was asked of the repaired models.
    pub(crate) after: bool,
    /// Of a loop: the round after which it was asked.
    pub(crate) round: Option<u64>,
    /// Whether it belongs to the uniform run that the search is compared with.
    pub(crate) uniform: bool,
}

impl RunData {
    /// Reads what `directory` holds. Fails without a `summary.json`, and on a file that is damaged.
    pub fn read(directory: &Path) -> Result<RunData> {
        let path = directory.join(summary::NAME);
        if !path.is_file() {
            return Err(Error::Usage(format!(
                "{}: expected the directory of a run that has measured something, found no {}; give what --out named, such as runs/demo",
                directory.display(),
                summary::NAME
            )));
        }
        let (receipt, summary) = (directory.join(manifest::NAME), summary::read(&path)?);
        // What still grows may end in half a line.
        let lines = Lines { torn: summary.unfinished.is_some() };
        Ok(RunData {
            summary,
            manifest: if receipt.is_file() { Some(Manifest::read(&receipt)?) } else { None },
            outcomes: lines.read(&directory.join("outcomes.jsonl"))?,
            metrics: lines.read(&directory.join("metrics.jsonl"))?,
            probes: lines.read(&directory.join("probes.jsonl"))?,
        })
    }

    /// Picks the method whose result is the headline: `joint` if it was run, else the last one; of several seeds the first.
    pub(crate) fn headline(&self) -> Option<&MethodResult> {
        let methods = &self.summary.methods;
        methods.iter().find(|method| method.name == "joint").or(methods.last())
    }

    /// Finds the free answers to harmful prompts under a method; `before` is the same for every seed.
    pub(crate) fn outcomes_of(&self, method: &str, seed: u64) -> Vec<&Outcome> {
        let same = |o: &&Measured| o.method == method && (method == BEFORE || o.seed == seed);
        let free = |o: &&Outcome| o.prefill.is_none() && o.kind == Kind::Harmful;
        self.outcomes.iter().filter(same).map(|o| &o.outcome).filter(free).collect()
    }
}

/// How JSON-lines files are read.
struct Lines {
    /// A last line without an end is left out.
    torn: bool,
}

impl Lines {
    /// Reads the rows of a file; none if there is no file. A line that is no JSON is an error with its number.
    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Vec<T>> {
        if !path.is_file() {
            return Ok(Vec::new());
        }
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        let whole = if self.torn { text.rfind('\n').map_or(0, |end| end + 1) } else { text.len() };
        let remedy = "restore the file, or move it away and write the report without it";
        let row = |(index, line): (usize, &str)| {
            let found = |error: serde_json::Error| format!("line {}: {error}", index + 1);
            serde_json::from_str(line)
                .map_err(|error| Error::file(path, "one JSON object on every line", remedy)(found(error)))
        };
        text[..whole].lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
    }
}
