//! The frame of the commands that take rows and give rows: same order, unknown fields kept, one bad row is one error row.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, Value};

use super::Session;
use super::device::Device;
use crate::error::{Error, Result, start_thread};
use crate::model::{ModelSpec, Pretrained};
use crate::ops::Ops;
use crate::run::detect::Added;
use crate::run::{Manifest, interrupt};
use crate::text::rows::{Format, Row, RowReader, RowWriter};
use crate::text::template::{Argument, Arguments, arguments};

#[derive(Debug, Args)]
#[command(next_help_heading = "Rows")]
pub(crate) struct RowArgs {
    /// Rows to read: JSONL, JSON, CSV or plain text [default: stdin]
    ///
    /// A prompt stands in `prompt`, `messages` or `tokens` (ids), or where a list that is known by its columns puts it (see --as); an
    /// answer in `response`, `output`, `completion` or `target_response`, or at the end of `messages`. A row with `tokens` and a
    /// text is an error row unless the model makes these ids of the text.
    #[arg(long, short, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Take the rows for those of this list or set, whatever their columns look like
    #[arg(long = "as", value_name = "NAME", value_enum)]
    told: Option<Format>,
    /// Where rows go: JSONL, or CSV by its name [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Pack at most N tokens into one forward pass [default: 1024 on the CPU, 8192 on a GPU]
    #[arg(long, value_name = "N")]
    batch_tokens: Option<NonZeroUsize>,
    /// Stop at the first bad row; the rows before it stay in FILE.part
    #[arg(long)]
    strict: bool,
    /// Go on where an earlier run of the same command left FILE.part
    #[arg(long, requires = "output")]
    resume: bool,
    /// Give the model's chat template this too: a name, and JSON or a text (`enable_thinking=false`)
    #[arg(long, value_name = "NAME=VALUE")]
    template_arg: Vec<Argument>,
    /// Use texts as they stand, without a chat template
    #[arg(long)]
    pub(crate) raw: bool,
}

/// Rows of the first window: enough to keep every slot of generation busy.
const WINDOW: usize = 512;
/// A window has at most so many rows, and about so many bytes.
const MOST_ROWS: usize = 8192;
const MOST_BYTES: u64 = 16 << 20;
/// What a window is meant to take; at most so much is lost when the program is stopped.
const SECONDS: f64 = 4.0;
/// Rows that the reading thread hands over at once.
const CHUNK: usize = 256;

impl RowArgs {
    /// Those that were asked for; else the backend's own `BATCH`.
    pub(crate) fn batch_tokens(&self) -> Option<usize> {
        self.batch_tokens.map(NonZeroUsize::get)
    }

    /// What the chat templates are given.
    pub(crate) fn arguments(&self) -> Arguments {
        arguments(&self.template_arg)
    }

    /// On this backend.
    pub(crate) fn batch<B: Ops>(&self, _: &B) -> usize {
        self.batch_tokens().unwrap_or(B::BATCH)
    }

    /// Opens a model with them.
    pub(crate) fn open<B: Ops>(&self, ops: &B, model: &ModelSpec) -> Result<Pretrained<B>> {
        Pretrained::open_with(ops, model, &self.arguments(), self.batch(ops), interrupt::flag())
    }

    /// Opens input and output. Called before a model is opened: a wrong path should not cost a load. `inputs` are the files and folders
    /// that decide what comes out: with --resume they must be what they were.
    pub fn read<'a>(&'a self, session: &Session, device: &Device, inputs: &[&Path]) -> Result<RowJob<'a>> {
        if session.json && self.output.is_none() {
            let why = "--json: expected --output FILE beside it, found rows and result both on stdout";
            return Err(Error::Usage(why.to_string()));
        }
        let mut reader = RowReader::open(self.input.as_deref())?;
        reader.told = self.told;
        // What cannot be written is reported before anything is computed.
        let resumed = match &self.output {
            Some(output) if self.resume => RowWriter::resume(output)?,
            _ => None,
        };
        let (writer, done) = match resumed {
            Some((writer, done)) => (writer, Some(done)),
            None => (RowWriter::create(self.output.as_deref())?, None),
        };
        let receipt = writer.is_part().then(|| writer.place().with_added_extension("toml"));
        let agreed = receipt.as_ref().map_or(Ok(()), |path| {
            let manifest = Manifest::of_rows(&device.to_string(), inputs)?;
            if done.is_some() { Manifest::read(path)?.expect_same(&manifest, path) } else { manifest.write(path) }
        });
        match agreed {
            Ok(()) => Ok(RowJob { args: self, reader, writer, done, receipt }),
            Err(error) if done.is_some() => Err(error),
            Err(error) => {
                writer.discard();
                Err(error)
            }
        }
    }
}

/// Rows that are read, and where they go.
pub(crate) struct RowJob<'a> {
    args: &'a RowArgs,
    reader: RowReader,
    writer: RowWriter,
    /// Rows that an earlier run has written.
    done: Option<RowReader>,
    /// What that run and this one must have in common.
    receipt: Option<PathBuf>,
}

/// How far it is.
#[derive(Default)]
struct Tally {
    rows: usize,
    errors: usize,
    last: Option<Error>,
}

impl Tally {
    fn error(&mut self, error: Error) {
        (self.errors, self.last) = (self.errors + 1, Some(error));
    }
}

impl RowJob<'_> {
    /// Gives windows of rows to `work`, which returns what is added to each of them or the row's own error, in order; `passed` hears of
    /// the rows that were done before, as they were read and as they were written. Whatever ends it, the windows done are kept.
    pub(crate) fn work(
        mut self,
        session: &Session,
        label: &str,
        passed: impl FnMut(&Row, &Map<String, Value>) -> Result<()>,
        mut work: impl FnMut(&[Row]) -> Result<Vec<Result<Added>>>,
    ) -> Result<Done> {
        interrupt::at_work();
        let (begin, mut tally) = (Instant::now(), Tally::default());
        let named = self.args.input.as_deref().map(|input| format!("{}: ", input.display())).unwrap_or_default();
        self.pass(&mut tally, passed)?;
        if tally.rows > 0 {
            session.say(&format!("{label}: going on after {} rows", tally.rows));
        }
        let before = tally.rows;
        let rate = |rows: usize| (rows - before) as f64 / begin.elapsed().as_secs_f64().max(1e-3);
        let RowJob { args, reader, mut writer, receipt, .. } = self;
        let (bytes, bar) = (reader.bytes(), session.progress_of_bytes(label, reader.length));
        let (chunks, mut size) = (chunks(reader)?, WINDOW);
        let ended = loop {
            let window = match window(&chunks, size) {
                Ok(window) if window.is_empty() => break Ok(()),
                window => window,
            };
            let started = Instant::now();
            let format = window.as_ref().ok().and_then(|window| window.first()?.format());
            if let Some(format) = format.filter(|_| tally.rows == before) {
                session.say(&format!("{named}read as {format}"));
            }
            match window.and_then(|window| step(window, args.strict, &mut writer, &mut tally, &mut work)) {
                Ok(rows) => {
                    let factor = (SECONDS / started.elapsed().as_secs_f64().max(1e-6)).clamp(0.25, 4.0);
                    size = ((rows as f64 * factor) as usize).clamp(16, MOST_ROWS);
                }
                Err(error) => break Err(error),
            }
            bar.set_position(bytes.load(Ordering::Relaxed));
            bar.set_message(format!("{} rows, {:.0} a second", tally.rows, rate(tally.rows)));
        };
        bar.finish_and_clear();
        let Tally { rows, errors, last } = tally;
        if let Err(error) = ended {
            return Err(give_up(error, rows, writer, receipt, session));
        }
        writer.finish()?;
        remove(&receipt);
        let (seconds, rate) = (begin.elapsed().as_secs_f64(), rate(rows));
        session.say(&format!("{label}: {rows} rows, {errors} with an error, {seconds:.1} s, {rate:.0} a second"));
        match last {
            // A whole file of errors is a mistake of another kind than a bad row.
            Some(error) if errors == rows => Err(error),
            _ => Ok(Done { rows, errors, seconds }),
        }
    }

    /// Passes over the rows that an earlier run has done. Fails where they came of others.
    fn pass(
        &mut self,
        tally: &mut Tally,
        mut passed: impl FnMut(&Row, &Map<String, Value>) -> Result<()>,
    ) -> Result<()> {
        for done in self.done.take().into_iter().flatten() {
            let (row, done) = (self.reader.next().transpose()?, done?);
            let Some(row) = row.filter(|row| agrees(row, &done.object)) else {
                let found = format!("another row {}, or none", tally.rows + 1);
                let expected = format!("the rows that {} holds already", self.writer.place().display());
                let remedy = "resume with the same --input, or delete the part".to_string();
                return Err(Error::Data { what: "--resume".into(), expected, found, remedy });
            };
            passed(&row, &done.object)?;
            tally.rows += 1;
            let new = |error: &&Value| row.fault().is_some() || row.object.get("error") != Some(*error);
            if let Some(error) = done.object.get("error").filter(new).and_then(Value::as_str) {
                tally.error(row.wrong("a row that can be worked on", error));
            }
        }
        Ok(())
    }
}

/// Works on one window and writes it; returns its rows. Fails as `work` does, and with `strict` at a row's own error.
fn step(
    mut window: Vec<Row>,
    strict: bool,
    writer: &mut RowWriter,
    tally: &mut Tally,
    work: &mut impl FnMut(&[Row]) -> Result<Vec<Result<Added>>>,
) -> Result<usize> {
    let results = interrupt::check().and_then(|()| work(&window))?;
    for (row, result) in window.iter_mut().zip(results) {
        match result.map_err(|error| row.placed(error)) {
            Ok(added) => added.into_iter().for_each(|(key, value)| row.set(&key, value)),
            Err(error) if strict => return writer.flush().and(Err(error)),
            Err(error) => {
                row.fail(&error);
                tally.error(error);
            }
        }
        writer.write(&row.object)?;
        tally.rows += 1;
    }
    writer.flush()?;
    Ok(window.len())
}

/// Keeps what is done and returns the error with what there is to say of it.
fn give_up(error: Error, rows: usize, mut writer: RowWriter, receipt: Option<PathBuf>, session: &Session) -> Error {
    if rows == 0 {
        // Nothing that could be gone on with, and nothing that should block the next try.
        remove(&receipt);
        writer.discard();
        return error;
    }
    // Where the disk is full not all of them have reached it.
    let done = if writer.flush().is_ok() { format!("{rows} rows") } else { format!("at most {rows} rows") };
    let place = writer.place();
    let go_on = if receipt.is_some() { ": go on with --resume" } else { "" };
    let kept = format!("{done} are done, in {}{go_on}", place.display());
    if let Error::Interrupted(_) = error {
        return Error::Interrupted(format!("; {kept}"));
    }
    session.say(&kept);
    error
}

/// Best effort: beside a whole file a receipt says nothing.
fn remove(receipt: &Option<PathBuf>) {
    receipt.iter().for_each(|receipt| drop(std::fs::remove_file(receipt)));
}

/// Whether `done` came of `row`: what a command may have written over aside, it holds the same.
fn agrees(row: &Row, done: &Map<String, Value>) -> bool {
    const WRITTEN: &str = " response tokens_out finish reward logprob logprobs n p_harm ambiguous verdict verdict_pairwise id kind \
        domain topic tactic distance planted label truth served refusal prefill tau_h tau_r error ";
    let same = |(key, value): (&String, &Value)| done.get(key) == Some(value) || WRITTEN.contains(&format!(" {key} "));
    row.object.iter().filter(|(key, value)| *key != "prompt" || value.is_string()).all(same)
}

/// Rows, and the bytes that they took.
type Chunk = Result<(Vec<Row>, u64)>;

/// Reads ahead on a thread of its own, a few chunks at most.
fn chunks(mut reader: RowReader) -> Result<Receiver<Chunk>> {
    let (send, receive) = sync_channel(4);
    start_thread(move || {
        let bytes = reader.bytes();
        loop {
            let begin = bytes.load(Ordering::Relaxed);
            let full = |rows: &Vec<Row>| rows.len() == CHUNK || bytes.load(Ordering::Relaxed) - begin > MOST_BYTES / 8;
            let mut rows = Vec::new();
            let ended = loop {
                match reader.next() {
                    Some(Ok(row)) => rows.push(row),
                    other => break Some(other),
                }
                if full(&rows) {
                    break None;
                }
            };
            let read = bytes.load(Ordering::Relaxed) - begin;
            // Whoever does not listen any more has ended.
            let listens = rows.is_empty() || send.send(Ok((rows, read))).is_ok();
            match ended {
                None if listens => {}
                Some(Some(Err(error))) => return drop(send.send(Err(error))),
                _ => return,
            }
        }
    })?;
    Ok(receive)
}

/// The next `size` rows or so; none at the end. Fails where reading does, and, however long it waits for input, once interrupted.
fn window(chunks: &Receiver<Chunk>, size: usize) -> Result<Vec<Row>> {
    let (mut window, mut bytes) = (Vec::new(), 0);
    while window.len() < size && bytes < MOST_BYTES {
        match chunks.recv_timeout(Duration::from_millis(100)) {
            Ok(chunk) => {
                let (rows, read) = chunk?;
                window.extend(rows);
                bytes += read;
            }
            Err(RecvTimeoutError::Timeout) => interrupt::check()?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(window)
}

/// How many rows came out.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Done {
    pub(crate) rows: usize,
    pub(crate) errors: usize,
    pub(crate) seconds: f64,
}
