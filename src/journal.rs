//! The journal of a run. A run is the list of its *units*: each is a function of earlier units' results, and what it gave is on
//! the disk before the next one begins. The same program over the same journal passes through the units that are done and goes on
//! where it ended, whatever ended it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// The file's name in a run directory.
pub(crate) const NAME: &str = "journal.jsonl";

const DAMAGED: &str = "restore the file, or begin a new run with another --out";

/// Items of the first portion of a long question: enough to learn how fast they go.
const FIRST: usize = 128;
/// A portion may be so many times as large as the one before.
const GROWTH: f64 = 16.0;
/// What one portion is meant to take; at most so much is lost when a run is stopped.
const SECONDS: f64 = 4.0;

/// An append-only file with one finished unit a line: its name and its result.
#[derive(Debug, Default)]
pub struct Journal {
    path: PathBuf,
    /// `None` keeps nothing.
    file: Option<File>,
    length: u64,
    /// Where the result of each unit lies. Of a unit that was done twice the later one counts.
    done: HashMap<String, Range<u64>>,
    stage: String,
    next: usize,
    interrupt: Arc<AtomicBool>,
}

/// One line, its result unread.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    unit: String,
    #[serde(borrow)]
    result: &'a RawValue,
}

impl Journal {
    /// Keeps nothing: every unit is computed.
    pub fn none() -> Journal {
        Journal::default()
    }

    /// Opens or makes the journal in `dir`. A torn last line, which is what a killed process or a full disk leaves, is cut off:
    /// that unit is done again. Damage anywhere else is an error. Once `interrupt` is set no unit begins.
    pub fn open(dir: &Path, interrupt: Arc<AtomicBool>) -> Result<Journal> {
        let path = dir.join(NAME);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::write(&path))?;
        let mut journal = Journal { path, interrupt, ..Journal::default() };
        journal.read(&file)?;
        file.set_len(journal.length).map_err(Error::write(&journal.path))?;
        journal.file = Some(file);
        Ok(journal)
    }

    /// Finds the units of `file` and the length of the whole lines that hold them.
    fn read(&mut self, file: &File) -> Result<()> {
        let (mut reader, mut line, mut damage) = (BufReader::new(file), Vec::new(), None);
        for number in 1.. {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(Error::read(&self.path))?;
            if read == 0 {
                break;
            }
            // What is damaged may be torn; it is not if another line follows.
            if let Some((number, error)) = damage {
                let wrong = Error::file(&self.path, "one finished unit as JSON on every line", DAMAGED);
                return Err(wrong(format!("line {number}: {error}")));
            }
            match serde_json::from_slice::<Line>(&line) {
                Ok(found) if line.ends_with(b"\n") => {
                    let begin = self.length + (found.result.get().as_ptr() as usize - line.as_ptr() as usize) as u64;
                    self.done.insert(found.unit, begin..begin + found.result.get().len() as u64);
                    self.length += read as u64;
                }
                Ok(_) => break,
                Err(error) => damage = Some((number, error)),
            }
        }
        Ok(())
    }

    /// Names the units that follow: `stage/0`, `stage/1`, … A stage is begun once in a run.
    pub fn stage(&mut self, name: &str) {
        (self.stage, self.next) = (name.to_string(), 0);
    }

    /// Returns what the stage's next unit gave: as it stands in the journal, else computed now and on the disk before it is
    /// returned. Fails as `compute` does, where the disk does, and before computing anything once the run is interrupted.
    pub fn unit<T: Serialize + DeserializeOwned>(&mut self, compute: impl FnOnce() -> Result<T>) -> Result<T> {
        let name = format!("{}/{}", self.stage, self.next);
        self.next += 1;
        if let Some(result) = self.get(&name)? {
            return Ok(result);
        }
        self.go_on()?;
        let result = compute()?;
        self.put(&name, &result)?;
        Ok(result)
    }

    /// Asks about all `items`, in portions that take some seconds each and are units of their own. Fails as [`Journal::unit`] does,
    /// and where a portion of the journal holds other results than one per item.
    pub fn portions<I, T: Serialize + DeserializeOwned>(
        &mut self,
        items: &[I],
        mut ask: impl FnMut(&[I]) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let (mut out, mut size) = (Vec::with_capacity(items.len()), FIRST);
        while out.len() < items.len() {
            let (left, mut seconds) = (&items[out.len()..], None);
            let found: Vec<T> = self.unit(|| {
                let begin = Instant::now();
                let found = ask(&left[..size.min(left.len())]);
                seconds = Some(begin.elapsed().as_secs_f64());
                found
            })?;
            if !(1..=left.len()).contains(&found.len()) {
                let what = format!("1 to {} results under {}/{}", left.len(), self.stage, self.next - 1);
                return Err(Error::file(&self.path, &what, DAMAGED)(found.len()));
            }
            // A portion that stands in the journal says how large they had become.
            let factor = seconds.map_or(1.0, |seconds: f64| (SECONDS / seconds).clamp(1.0 / GROWTH, GROWTH));
            size = ((found.len() as f64 * factor) as usize).max(1);
            out.extend(found);
        }
        Ok(out)
    }

    /// Fails once the run is interrupted.
    pub fn go_on(&self) -> Result<()> {
        if self.interrupt.load(Ordering::SeqCst) { Err(Error::Interrupted(String::new())) } else { Ok(()) }
    }

    /// Returns the result of a unit of this name, if it is done. Fails if it is no such result.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let (Some(mut file), Some(place)) = (self.file.as_ref(), self.done.get(name)) else { return Ok(None) };
        let mut bytes = vec![0; (place.end - place.start) as usize];
        let read = file.seek(SeekFrom::Start(place.start)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(Error::read(&self.path))?;
        let remedy = "resume with the version of ares that began the run, or begin a new one with another --out";
        let what = format!("the result of {name}");
        serde_json::from_slice(&bytes).map(Some).map_err(Error::file(&self.path, &what, remedy))
    }

    /// Writes a unit's result and waits until it is on the disk.
    pub fn put<T: Serialize>(&mut self, name: &str, result: &T) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let json = |error: serde_json::Error| Error::write(&self.path)(error.into());
        let result = serde_json::value::to_raw_value(result).map_err(json)?;
        let head = serde_json::to_string(name).map_err(json)?;
        let head = format!("{{\"unit\":{head},\"result\":");
        let line = format!("{head}{}}}\n", result.get());
        // One write at the end of the whole lines: what an earlier one left that failed half-way is written over.
        let written = file.set_len(self.length).and_then(|()| file.seek(SeekFrom::Start(self.length)));
        let written = written.and_then(|_| file.write_all(line.as_bytes())).and_then(|()| file.sync_data());
        written.map_err(Error::write(&self.path))?;
        let begin = self.length + head.len() as u64;
        self.done.insert(name.to_string(), begin..begin + result.get().len() as u64);
        self.length += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(text: &str) -> (tempfile::TempDir, Journal) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(NAME), text).unwrap();
        let journal = Journal::open(folder.path(), Arc::default()).unwrap();
        (folder, journal)
    }

    fn again(folder: &tempfile::TempDir) -> Journal {
        Journal::open(folder.path(), Arc::default()).unwrap()
    }

    const NEVER: fn() -> Result<f64> = || panic!("this unit is done");

    #[test]
    fn what_is_done_is_not_done_again() {
        let (folder, mut first) = journal("");
        first.stage("a\n");
        let third = 1.0 / 3.0;
        assert_eq!(first.unit(|| Ok(third)).unwrap(), third);
        assert!(first.unit(|| Err::<f64, _>(Error::Usage("failed".into()))).is_err());
        let mut second = again(&folder);
        second.stage("a\n");
        assert_eq!(second.unit(NEVER).unwrap(), third, "to the last bit");
        assert_eq!(second.unit(|| Ok(2.0)).unwrap(), 2.0, "a unit that failed is tried again");
        second.put("a\n/0", &7.0).unwrap();
        second.stage("a\n");
        assert_eq!((second.unit(NEVER).unwrap(), second.unit(NEVER).unwrap()), (7.0, 2.0), "the later one counts");
        let mut none = Journal::none();
        assert_eq!([1, 2].map(|n| none.unit(|| Ok(n)).unwrap()), [1, 2]);
    }

    #[test]
    fn a_line_torn_anywhere_is_cut_off_and_work_goes_on() {
        let whole = "{\"unit\":\"a/0\",\"result\":1}\n";
        for torn in ["{", "{\"unit\":\"a/1\",\"result\":2}", "{\"unit\":\"a/1\",\"result\":2\n", "\0\0\0\n", "\0\0"] {
            let (folder, mut journal) = journal(&format!("{whole}{torn}"));
            journal.stage("a");
            assert_eq!((journal.unit(|| Ok(5)).unwrap(), journal.unit(|| Ok(6)).unwrap()), (1, 6), "after {torn:?}");
            let text = std::fs::read_to_string(folder.path().join(NAME)).unwrap();
            assert_eq!(text, format!("{whole}{{\"unit\":\"a/1\",\"result\":6}}\n"));
        }
    }

    #[test]
    fn damage_before_the_end_is_an_error_that_names_the_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(NAME), "{\"unit\":\"a\",\"result\":1}\n[2\n{}\n").unwrap();
        let error = Journal::open(folder.path(), Arc::default()).unwrap_err().to_string();
        assert!(error.contains("journal.jsonl") && error.contains("line 2"), "{error}");
        let (_folder, journal) = journal("{\"unit\":\"a\",\"result\":\"text\"}\n");
        let error = journal.get::<f64>("a").unwrap_err().to_string();
        assert!(error.contains("the result of a"), "{error}");
    }

    #[test]
    fn a_portion_of_more_results_than_items_is_damage() {
        let (_folder, mut journal) = journal("{\"unit\":\"a/0\",\"result\":[1.0,2.0,3.0]}\n");
        journal.stage("a");
        let found = journal.portions(&[1, 2], |_| Ok(vec![NEVER().unwrap()]));
        crate::error::refused(found, "expected 1 to 2 results under a/0, found 3; restore the file");
    }

    #[test]
    fn portions_cover_everything_once_and_in_order() {
        let items: Vec<usize> = (0..1000).collect();
        let (folder, mut first) = journal("");
        let mut asked = Vec::new();
        let mut ask = |portion: &[usize]| {
            asked.push(portion.len());
            if asked.len() == 3 {
                Err(Error::Usage("killed".into()))
            } else {
                Ok(portion.iter().map(|i| 2 * i).collect())
            }
        };
        first.stage("a");
        assert!(first.portions(&items, &mut ask).is_ok(), "two portions are enough: they grow");
        assert_eq!(asked, [128, 872]);
        let mut second = again(&folder);
        second.stage("a");
        let found: Vec<usize> = second.portions(&items, |_| panic!("all is done")).unwrap();
        assert_eq!(found, items.iter().map(|i| 2 * i).collect::<Vec<_>>());
        second.stage("a");
        let fewer = second.portions(&items[..900], |_| Ok(vec![0]));
        assert!(fewer.is_err(), "the journal is of other items");
    }

    #[test]
    fn no_unit_begins_after_an_interruption_but_those_done_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let interrupt = Arc::new(AtomicBool::new(false));
        let mut journal = Journal::open(folder.path(), interrupt.clone()).unwrap();
        journal.stage("a");
        journal.unit(|| Ok(1.0)).unwrap();
        interrupt.store(true, Ordering::SeqCst);
        journal.stage("a");
        assert_eq!(journal.unit(NEVER).unwrap(), 1.0);
        assert!(matches!(journal.unit(NEVER), Err(Error::Interrupted(_))));
    }
}
