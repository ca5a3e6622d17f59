//! A run directory as the report reads it. `summary.json` must be there; what else is missing is left out of the report.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::detect::measure::MethodResult;
use crate::error::{Error, Result};
use crate::judge::Verdict;
use crate::run::records::Metric;
use crate::run::summary::{self, Summary};
use crate::run::{Manifest, manifest};

/// The name under which `outcomes.jsonl` holds what was measured before any repair.
pub(crate) const BEFORE: &str = "before";

/// Everything that `report.html` is made from.
#[derive(Debug, Clone)]
pub(crate) struct RunData {
    pub(crate) summary: Summary,
    pub(crate) manifest: Option<Manifest>,
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) metrics: Vec<Metric>,
    pub(crate) probes: Vec<Query>,
}

/// One line of `outcomes.jsonl`: one prompt under one method. Fields that a run did not write are unknown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Outcome {
    /// [`BEFORE`] or a method's name.
    pub(crate) method: String,
    pub(crate) seed: u64,
    pub(crate) prompt: String,
    pub(crate) response: Option<String>,
    /// `harmful`, `borderline`, `benign`; a row that does not say asks for harm.
    pub(crate) kind: Option<String>,
    pub(crate) domain: Option<String>,
    pub(crate) topic: Option<String>,
    pub(crate) tactic: Option<String>,
    pub(crate) family: Option<String>,
    /// The answer was forced to begin with so many tokens of y⁻.
    pub(crate) prefill: Option<usize>,
    pub(crate) p_harm: Option<f64>,
    /// Raw score of the own answer.
    pub(crate) reward: Option<f64>,
    /// Raw scores of the references y⁺ and y⁻.
    pub(crate) reward_safe: Option<f64>,
    pub(crate) reward_harmful: Option<f64>,
    pub(crate) verdict: Option<Verdict>,
}

/// One line of `probes.jsonl`: one query of the search.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Query {
    pub(crate) topic: String,
    pub(crate) domain: String,
    pub(crate) tactic: String,
    pub(crate) fitness: Option<f64>,
    pub(crate) verdict: Option<Verdict>,
    /// Whether the query was asked of the repaired models.
    pub(crate) after: bool,
    /// Whether it belongs to the uniform run that the search is compared with.
    pub(crate) uniform: bool,
}

impl Outcome {
    /// Names the row of a heat map that this prompt belongs to.
    pub(crate) fn place(&self) -> &str {
        self.domain.as_deref().or(self.topic.as_deref()).unwrap_or_default()
    }
}

impl RunData {
    /// Reads what `directory` holds. Fails without a `summary.json`, and on a file that is damaged.
    pub fn read(directory: &Path) -> Result<RunData> {
        let path = directory.join(summary::NAME);
        if !path.is_file() {
            return Err(Error::Usage(format!(
                "{}: expected the directory of a finished run, found no {}; give what --out named, such as runs/demo",
                directory.display(),
                summary::NAME
            )));
        }
        let receipt = directory.join(manifest::NAME);
        Ok(RunData {
            summary: summary::read(&path)?,
            manifest: if receipt.is_file() { Some(Manifest::read(&receipt)?) } else { None },
            outcomes: lines(&directory.join("outcomes.jsonl"))?,
            metrics: lines(&directory.join("metrics.jsonl"))?,
            probes: lines(&directory.join("probes.jsonl"))?,
        })
    }

    /// Picks the method whose result is the headline: `joint` if it was run, else the last one; of several seeds the first.
    pub(crate) fn headline(&self) -> Option<&MethodResult> {
        let methods = &self.summary.methods;
        methods.iter().find(|method| method.name == "joint").or(methods.last())
    }

    /// Finds the free answers to harmful prompts under a method; `before` is the same for every seed.
    pub(crate) fn outcomes_of(&self, method: &str, seed: u64) -> Vec<&Outcome> {
        let harmful = |o: &&Outcome| o.prefill.is_none() && o.kind.as_deref().is_none_or(|kind| kind == "harmful");
        let same = |o: &&Outcome| o.method == method && (method == BEFORE || o.seed == seed);
        self.outcomes.iter().filter(same).filter(harmful).collect()
    }
}

/// Reads the rows of a JSON-lines file; none if there is no file. A line that is no JSON is an error with its number.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row = serde_json::from_str(line).map_err(|error| Error::File {
            file: path.to_path_buf(),
            expected: "one JSON object on every line".into(),
            found: format!("line {}: {error}", index + 1),
            remedy: "restore the file, or move it away and write the report without it".into(),
        })?;
        rows.push(row);
    }
    Ok(rows)
}
