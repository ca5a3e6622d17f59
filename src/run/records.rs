//! The lines of a run's JSON-lines files.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::dir::RunDir;
use crate::detect::evaluate::Evaluation;
use crate::detect::outcome::Outcome;
use crate::error::{Error, Result};
use crate::probe::record::ProbeRecord;
use crate::repair::{Failure, StepMetrics};
use crate::text::write_atomic;

/// The run's JSON-lines files, gathered and written whole.
#[derive(Default)]
pub(super) struct Lines {
    pub(crate) outcomes: Vec<Map<String, Value>>,
    pub(crate) probes: Vec<Value>,
    pub(crate) failures: Vec<Value>,
    pub(crate) metrics: Vec<StepMetrics>,
}

impl Lines {
    pub(crate) fn outcomes(&mut self, method: &str, seed: u64, evaluation: &Evaluation) {
        let line = |outcome: &Outcome| {
            let mut object = object([("method", method.into()), ("seed", seed.into())]);
            object.extend(outcome.to_object());
            object
        };
        self.outcomes.extend(evaluation.outcomes.iter().chain(evaluation.prefill.values().flatten()).map(line));
    }

    pub(crate) fn probes(&mut self, records: &[ProbeRecord], seed: u64, uniform: bool) {
        for record in records {
            let mut value = json!(record);
            let more = object([("seed", seed.into()), ("uniform", uniform.into()), ("after", false.into())]);
            value.as_object_mut().into_iter().for_each(|fields| fields.extend(more.clone()));
            self.probes.push(value);
        }
    }

    pub(crate) fn failures(&mut self, failures: &[Failure], seed: u64) {
        self.failures.extend(failures.iter().map(|failure| failure.to_line(seed)));
    }

    pub(crate) fn write(&self, dir: &RunDir) -> Result<()> {
        write_lines(&dir.file("outcomes.jsonl"), &self.outcomes)?;
        write_lines(&dir.file("probes.jsonl"), &self.probes)?;
        write_lines(&dir.file("failures.jsonl"), &self.failures)?;
        write_lines(&dir.file("metrics.jsonl"), &self.metrics)
    }
}

pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
}

/// One JSON object a line; the file appears whole.
pub(super) fn write_lines<T: Serialize>(path: &Path, lines: &[T]) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line).map_err(|error| Error::write(path)(error.into()))?;
        text.push(b'\n');
    }
    write_atomic(path, &text)
}
