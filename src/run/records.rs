//! The run's JSON-lines files. They grow while the run goes on.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::dir::RunDir;
use crate::detect::evaluate::{Evaluation, Sampled};
use crate::detect::outcome::Outcome;
use crate::error::{Error, Result};
use crate::probe::record::ProbeRecord;
use crate::repair::{Failure, StepMetrics};
use crate::text::output::whole_lines;

/// All of them.
pub(crate) struct Lines {
    outcomes: Growing,
    probes: Growing,
    failures: Growing,
    metrics: Growing,
    samples: Growing,
}

/// Which search a query belongs to.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Search {
    pub(crate) seed: u64,
    pub(crate) uniform: bool,
    /// On the models as a round left them.
    pub(crate) after: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) round: Option<u64>,
    /// Over tactics that no repair sees.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) held_out: bool,
}

impl Lines {
    pub(crate) fn new(dir: &RunDir) -> Lines {
        let growing = |name: &str| Growing { path: dir.file(name), file: None, there: 0 };
        Lines {
            outcomes: growing("outcomes.jsonl"),
            probes: growing("probes.jsonl"),
            failures: growing("failures.jsonl"),
            metrics: growing("metrics.jsonl"),
            samples: growing("samples.jsonl"),
        }
    }

    pub(crate) fn outcomes(&mut self, method: &str, seed: u64, evaluation: &Evaluation) -> Result<()> {
        let line = |outcome: &Outcome| {
            let mut object = object([("method", method.into()), ("seed", seed.into())]);
            object.extend(outcome.to_object());
            object
        };
        self.outcomes.write(evaluation.outcomes.iter().chain(evaluation.prefill.values().flatten()).map(line))
    }

    pub(crate) fn probes(&mut self, records: &[ProbeRecord], search: &Search) -> Result<()> {
        let more = json!(search);
        self.probes.write(records.iter().map(|record| {
            let mut value = json!(record);
            let more = more.as_object().cloned();
            value.as_object_mut().into_iter().for_each(|fields| fields.extend(more.clone().into_iter().flatten()));
            value
        }))
    }

    pub(crate) fn failures(&mut self, failures: &[Failure], seed: u64) -> Result<()> {
        self.failures.write(failures.iter().map(|failure| failure.to_line(seed)))
    }

    /// `method` is what the steps are called; their own method where there is none.
    pub(crate) fn metrics(&mut self, steps: &[StepMetrics], method: Option<&str>, round: Option<u64>) -> Result<()> {
        let name = |step: &StepMetrics| method.map_or(step.method.clone(), str::to_string);
        self.metrics.write(steps.iter().map(|step| StepMetrics { round, method: name(step), ..step.clone() }))
    }

    /// `stage`: `best of 8`, or `relapse`.
    pub(crate) fn samples(&mut self, method: &str, seed: u64, stage: &str, sampled: &[Sampled]) -> Result<()> {
        self.samples.write(sampled.iter().map(|sampled| {
            let mut line = object([("method", method.into()), ("seed", seed.into()), ("stage", stage.into())]);
            line.extend(json!(sampled).as_object().cloned().into_iter().flatten());
            line
        }))
    }
}

/// One file. A resumed run passes through what is done in the same order: the lines that stand there already are not written again.
struct Growing {
    path: PathBuf,
    /// `None` until the first line.
    file: Option<File>,
    /// Lines that are there and have not been passed yet.
    there: usize,
}

impl Growing {
    fn write<T: Serialize>(&mut self, lines: impl Iterator<Item = T>) -> Result<()> {
        if self.file.is_none() {
            self.open().map_err(Error::write(&self.path))?;
        }
        let mut text = Vec::new();
        for line in lines {
            if self.there > 0 {
                self.there -= 1;
                continue;
            }
            serde_json::to_writer(&mut text, &line).map_err(|error| Error::write(&self.path)(error.into()))?;
            text.push(b'\n');
        }
        self.file.iter_mut().try_for_each(|file| file.write_all(&text)).map_err(Error::write(&self.path))
    }

    /// Counts the whole lines of an earlier time and cuts off a torn one.
    fn open(&mut self) -> std::io::Result<()> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&self.path)?;
        let whole;
        (self.there, whole) = whole_lines(&file)?;
        file.set_len(whole)?;
        file.seek(SeekFrom::Start(whole))?;
        self.file = Some(file);
        Ok(())
    }
}

pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_adds_only_what_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        let growing = || Growing { path: path.clone(), file: None, there: 0 };
        let text = || std::fs::read_to_string(&path).unwrap();
        let mut first = growing();
        first.write([1, 2].into_iter()).unwrap();
        first.write([3].into_iter()).unwrap();
        assert_eq!(text(), "1\n2\n3\n");
        std::fs::write(&path, "1\n2\n3").unwrap();
        let mut second = growing();
        second.write([1].into_iter()).unwrap();
        second.write([2, 3, 4].into_iter()).unwrap();
        assert_eq!(text(), "1\n2\n3\n4\n");
        assert!(growing().write([1, 2, 3, 4].into_iter()).is_ok() && text().len() == 8, "all was there");
    }
}
