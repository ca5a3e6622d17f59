//! The frame of the commands that take rows and give rows: same order, unknown fields kept, one bad row is one error row.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::Session;
use crate::error::{Error, Result};
use crate::model::{ModelSpec, Pretrained};
use crate::ops::Ops;
use crate::run::detect::Added;
use crate::run::interrupt;
use crate::text::rows::{Row, RowWriter, read};

#[derive(Debug, Args)]
#[command(next_help_heading = "Rows")]
pub(crate) struct RowArgs {
    /// Rows to read: JSONL, JSON, CSV or plain text [default: stdin]
    ///
    /// A prompt stands in `prompt`, `messages` or `tokens` (ids), or where HarmBench, JailbreakBench, AdvBench, StrongREJECT and
    /// evals samples put it; an answer in `response`, `output`, `completion` or `target_response`, or at the end of `messages`.
    /// A row with `tokens` and a text is an error row unless the model makes these ids of the text.
    #[arg(long, short, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where rows go: JSONL, or CSV by its name [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Pack at most N tokens into one forward pass [default: 1024 on the CPU, 8192 on a GPU]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<NonZeroUsize>,
    /// Stop at the first bad row, and write nothing
    #[arg(long)]
    strict: bool,
    /// Use texts as they stand, without a chat template
    #[arg(long)]
    pub(crate) raw: bool,
}

/// Rows worked on before their results are written: enough to keep every slot of generation busy.
const CHUNK: usize = 512;

impl RowArgs {
    /// Those that were asked for; else the backend's own `BATCH`.
    pub(crate) fn batch_tokens(&self) -> Option<usize> {
        self.batch_tokens.map(NonZeroUsize::get)
    }

    /// On this backend.
    pub(crate) fn batch<B: Ops>(&self, _: &B) -> usize {
        self.batch_tokens().unwrap_or(B::BATCH)
    }

    /// Opens a model with them.
    pub(crate) fn open<B: Ops>(&self, ops: &B, model: &ModelSpec) -> Result<Pretrained<B>> {
        Pretrained::open(ops, model, self.batch(ops), interrupt::flag())
    }

    /// Reads all rows. Called before a model is opened: a wrong path should not cost a load.
    pub fn read(&self, session: &Session) -> Result<RowJob<'_>> {
        if session.json && self.output.is_none() {
            let why = "--json: expected --output FILE beside it, found rows and result both on stdout";
            return Err(Error::Usage(why.to_string()));
        }
        // What cannot be written is reported before anything is computed.
        let writer = RowWriter::create(self.output.as_deref())?;
        Ok(RowJob { args: self, rows: read(self.input.as_deref(), self.strict)?, writer })
    }
}

/// Rows that were read, and where they go.
pub(crate) struct RowJob<'a> {
    args: &'a RowArgs,
    rows: Vec<Row>,
    writer: RowWriter,
}

impl RowJob<'_> {
    /// Gives chunks of rows to `work`, which returns what is added to each of them or the row's own error, in order. After
    /// Ctrl-C the finished chunks are kept: on stdout, or beside the output as `FILE.part`.
    pub(crate) fn work(
        mut self,
        session: &Session,
        label: &str,
        mut work: impl FnMut(&[Row]) -> Result<Vec<Result<Added>>>,
    ) -> Result<Done> {
        let (begin, total) = (Instant::now(), self.rows.len());
        let bar = session.progress(label, total as u64);
        let (mut done, mut errors, mut last) = (0, 0, None);
        for chunk in self.rows.chunks_mut(CHUNK) {
            let results = interrupt::check().and_then(|()| work(chunk));
            let results = match results {
                Err(Error::Interrupted(_)) => return Err(self.keep_part(done)?),
                results => results?,
            };
            for (row, result) in chunk.iter_mut().zip(results) {
                match result {
                    Ok(added) => added.into_iter().for_each(|(key, value)| row.set(&key, value)),
                    Err(error) if self.args.strict => return Err(row.placed(error)),
                    Err(error) => {
                        let error = row.placed(error);
                        row.fail(&error);
                        (errors, last) = (errors + 1, Some(error));
                    }
                }
                self.writer.write(&row.object)?;
            }
            done += chunk.len();
            bar.set_position(done as u64);
        }
        self.writer.finish()?;
        bar.finish_and_clear();
        let seconds = begin.elapsed().as_secs_f64();
        session.say(&format!("{label}: {total} rows, {errors} with an error, {seconds:.1} s"));
        match last {
            // A whole file of errors is a mistake of another kind than a bad row.
            Some(error) if errors == total => Err(error),
            _ => Ok(Done { rows: total, errors, seconds }),
        }
    }

    /// Writes what is done, and returns what there is to say.
    fn keep_part(self, done: usize) -> Result<Error> {
        let Some(output) = &self.args.output else {
            self.writer.finish()?;
            return Ok(Error::Interrupted(format!(" ({done} of {} rows, on stdout)", self.rows.len())));
        };
        let mut name = output.as_os_str().to_owned();
        name.push(".part");
        let mut part = RowWriter::create(Some(Path::new(&name)))?;
        self.rows[..done].iter().try_for_each(|row| part.write(&row.object))?;
        part.finish()?;
        Ok(Error::Interrupted(format!(" ({done} of {} rows, in {})", self.rows.len(), Path::new(&name).display())))
    }
}

/// How many rows came out.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Done {
    pub(crate) rows: usize,
    pub(crate) errors: usize,
    pub(crate) seconds: f64,
}
