//! The journal: one line of JSON per finished unit, on the disk before the next unit begins. A run resumes from it and from
//! nothing else.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// An append-only file of units `T`.
#[derive(Debug)]
pub struct Journal<T> {
    path: PathBuf,
    file: File,
    _unit: PhantomData<fn(T)>,
}

impl<T: Serialize + DeserializeOwned> Journal<T> {
    /// Opens or makes the journal and returns the units it holds. A torn last line, which is what a killed process or a full
    /// disk leaves, is cut off: that unit is done again. Damage anywhere else is an error.
    pub fn open(path: &Path) -> Result<(Journal<T>, Vec<T>)> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(Error::write(path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::read(path))?;
        let (units, whole) = replay(path, &bytes)?;
        file.set_len(whole as u64).map_err(Error::write(path))?;
        file.seek(SeekFrom::Start(whole as u64)).map_err(Error::write(path))?;
        Ok((Journal { path: path.to_path_buf(), file, _unit: PhantomData }, units))
    }

    /// Writes one unit and waits until it is on the disk.
    pub fn append(&mut self, unit: &T) -> Result<()> {
        let mut line = serde_json::to_vec(unit).map_err(|e| Error::write(&self.path)(e.into()))?;
        line.push(b'\n');
        // One write: a line is torn only if the system itself stops within it.
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(Error::write(&self.path))
    }
}

/// The units of `bytes` and the length of the whole lines that hold them.
fn replay<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<(Vec<T>, usize)> {
    let (mut units, mut whole) = (Vec::new(), 0);
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let is_last = whole + line.len() == bytes.len();
        match serde_json::from_slice(line) {
            Ok(unit) if line.ends_with(b"\n") => units.push(unit),
            Err(error) if !is_last => {
                let remedy = "restore the file, or begin a new run with another --out";
                let wrong = Error::file(path, "one finished unit as JSON on every line", remedy);
                return Err(wrong(format!("line {}: {error}", index + 1)));
            }
            _ => break, // torn
        }
        whole += line.len();
    }
    Ok((units, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn what_was_appended_is_replayed() {
        let (_folder, path) = journal("");
        let (mut first, units) = Journal::<(u32, String)>::open(&path).unwrap();
        assert_eq!(units, []);
        first.append(&(1, "a\nb".into())).unwrap();
        first.append(&(2, "c".into())).unwrap();
        drop(first);
        let (_, units) = Journal::<(u32, String)>::open(&path).unwrap();
        assert_eq!(units, [(1, "a\nb".to_string()), (2, "c".to_string())]);
    }

    #[test]
    fn a_line_torn_anywhere_is_cut_off_and_work_goes_on() {
        let whole = "[1]\n[22]\n";
        for torn in ["[3", "[333]", "[3\n", "\0\0\0\n", "\0\0"] {
            let (_folder, path) = journal(&format!("{whole}{torn}"));
            let (mut journal, units) = Journal::<Vec<u32>>::open(&path).unwrap();
            assert_eq!(units, [vec![1], vec![22]], "after {torn:?}");
            journal.append(&vec![4]).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{whole}[4]\n"));
        }
    }

    #[test]
    fn damage_before_the_end_is_an_error_that_names_the_line() {
        let (_folder, path) = journal("[1]\n[2\n[3]\n");
        let error = Journal::<Vec<u32>>::open(&path).unwrap_err().to_string();
        assert!(error.contains("journal.jsonl") && error.contains("line 2"), "{error}");
    }
}
