//! The directory of a run: made whole or not at all, held by one process, never overwritten.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{checkpoint, manifest};
use crate::error::{Error, Result};
use crate::journal;
use crate::text::output::{held_folder, sweep};

/// Hidden beside the run's files. The lock is the kernel's, on the open file: it ends with the process that holds it, however
/// that ends, so a stale lock cannot exist. The file itself stays and only says who held it last.
const LOCK: &str = ".lock";

/// Failures that came by standard input.
pub(super) const FAILURES_IN: &str = "failures-in";

/// Any of these marks a directory as a run's, which may be moved aside; a stranger's directory is left alone.
const MARKS: [&str; 4] = [LOCK, "run.toml", "journal.jsonl", "summary.json"];

/// What happens to an earlier run in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// It is renamed to `PATH.1`, `PATH.2`, …, whichever is free.
    Keep,
    /// The new run is refused.
    Refuse,
}

/// A run directory that this process holds until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Where an earlier run was moved.
    pub kept: Option<PathBuf>,
    /// An earlier process began the run.
    pub(crate) resumed: bool,
    _lock: File,
}

impl RunDir {
    /// Makes `path` and takes its lock. Nothing may be there, or an empty directory, or, with [`Earlier::Keep`], an earlier
    /// run. `Busy` when a live run holds it.
    pub fn create(path: &Path, earlier: Earlier) -> Result<RunDir> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if path.file_name().is_none() {
            return Err(Error::Usage(format!("--out {}: expected the name of a directory to make", path.display())));
        }
        fs::create_dir_all(parent).map_err(Error::write(parent))?;
        let kept = make_room(path, earlier)?;
        // Made aside, locked, then renamed: nobody ever sees a run directory without its lock.
        sweep(parent);
        let (aside, _held) = held_folder(parent).map_err(Error::write(parent))?;
        let placed = lock(aside.path()).and_then(|lock| match fs::rename(aside.path(), path) {
            Ok(()) => Ok(lock),
            Err(_) if path.exists() => Err(refusal(path, "another run took this place just now")),
            Err(error) => Err(Error::write(path)(error)),
        })?;
        let _ = aside.keep(); // it has another name now
        Ok(RunDir { path: path.to_path_buf(), kept, resumed: false, _lock: placed })
    }

    /// Takes the lock of a run that goes on.
    pub(crate) fn resume(path: &Path) -> Result<RunDir> {
        Ok(RunDir { resumed: true, ..RunDir::open(path)? })
    }

    /// A directory below this one for a part of the run: made, or gone on with where it is there.
    pub(super) fn inner(&self, name: &str) -> Result<RunDir> {
        let path = self.file(name);
        if self.resumed && path.is_dir() { RunDir::resume(&path) } else { RunDir::create(&path, Earlier::Refuse) }
    }

    /// Takes the lock of a run that exists: to write its report again.
    pub(crate) fn open(path: &Path) -> Result<RunDir> {
        if !path.is_dir() {
            return Err(Error::Usage(format!("{}: expected a run directory, found none", path.display())));
        }
        let lock = lock(path)?;
        sweep_below(path);
        Ok(RunDir { path: path.to_path_buf(), kept: None, resumed: false, _lock: lock })
    }

    /// Removes what only an unfinished run needs. Best effort: left over it harms nobody.
    pub(super) fn drop_checkpoints(&self) {
        let _ = fs::remove_dir_all(self.file(checkpoint::FOLDER));
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of one of the run's files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// [`sweep`] of a run's folder and of all in it: rounds hold adapters, which are folders, too. Links are not followed.
fn sweep_below(folder: &Path) {
    sweep(folder);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let inner = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    inner.for_each(|entry| sweep_below(&entry.path()));
}

/// Leaves `path` free or empty. Returns where an earlier run went.
fn make_room(path: &Path, earlier: Earlier) -> Result<Option<PathBuf>> {
    let mut entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(refusal(path, "found a file")),
        Err(error) => return Err(Error::read(path)(error)),
    };
    if entries.next().is_none() {
        return Ok(None);
    }
    if !MARKS.iter().any(|mark| path.join(mark).exists()) {
        return Err(refusal(path, "found a directory with other files in it"));
    }
    // The lock is tried even when the run is refused: that it still goes on is the more useful message.
    let _lock = lock(path)?;
    if never_began(path)? {
        return Ok(None);
    }
    if earlier == Earlier::Refuse {
        return Err(refusal(path, "found an earlier run, which is never overwritten"));
    }
    let free = (1..u32::MAX).map(|n| numbered(path, n)).find(|place| fs::symlink_metadata(place).is_err());
    let Some(free) = free else { return Err(refusal(path, "found no free number to keep the earlier run under")) };
    fs::rename(path, &free).map_err(Error::write(&free))?;
    Ok(Some(free))
}

/// Whether all that is there is a start that failed before its first unit; then it is removed.
fn never_began(path: &Path) -> Result<bool> {
    for entry in fs::read_dir(path).map_err(Error::read(path))? {
        let entry = entry.map_err(Error::read(path))?;
        let empty = entry.metadata().is_ok_and(|found| found.len() == 0);
        let name = entry.file_name();
        if !([LOCK, manifest::NAME, FAILURES_IN].iter().any(|left| name == *left) || (name == journal::NAME && empty)) {
            return Ok(false);
        }
    }
    for name in [journal::NAME, manifest::NAME, FAILURES_IN, LOCK] {
        let file = path.join(name);
        fs::remove_file(&file)
            .or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
            .map_err(Error::write(&file))?;
    }
    Ok(true)
}

fn refusal(path: &Path, found: &str) -> Error {
    Error::Usage(format!(
        "--out {}: expected a new or empty directory, {found}; choose another --out or move it away",
        path.display()
    ))
}

/// `runs/demo` → `runs/demo.1`.
fn numbered(path: &Path, n: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    PathBuf::from(name)
}

/// Takes the directory's lock and writes into it who holds it.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open.map_err(Error::write(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Some systems do not let a locked file be read; then the holder stays nameless.
            let named = file.read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
            let holder = if named { holder.trim().to_string() } else { "an unknown process".to_string() };
            return Err(Error::Busy { path: directory.to_path_buf(), holder });
        }
        Err(TryLockError::Error(error)) => return Err(Error::write(&path)(error)),
    }
    let held = file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0)));
    held.and_then(|_| writeln!(file, "process {}", std::process::id())).map_err(Error::write(&path))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(path: &Path, text: &str) -> RunDir {
        let run = RunDir::create(path, Earlier::Keep).unwrap();
        fs::write(run.file("summary.json"), text).unwrap();
        run
    }

    #[test]
    fn earlier_runs_are_kept_under_the_next_free_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/demo");
        assert_eq!(run(&path, "first").kept.as_deref(), None);
        assert_eq!(run(&path, "second").kept.as_deref(), Some(numbered(&path, 1).as_path()));
        assert_eq!(run(&path, "third").kept.as_deref(), Some(numbered(&path, 2).as_path()));
        let text = |place: &Path| fs::read_to_string(place.join("summary.json")).unwrap();
        assert_eq!([text(&numbered(&path, 1)), text(&numbered(&path, 2)), text(&path)], ["first", "second", "third"]);
        let names: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "nothing else may stay: {names:?}");
    }

    #[test]
    fn what_a_killed_run_left_half_written_goes_however_deep_it_lies() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        run(&path, "x");
        let adapter = path.join("round-1/policy");
        fs::create_dir_all(adapter.join(".ares-one.tmp/.ares-two.tmp")).unwrap();
        fs::write(adapter.join(".ares-three.tmp"), "half").unwrap();
        fs::write(adapter.join("adapter_config.json"), "whole").unwrap();
        let held = fs::File::create(adapter.join(".ares-held.tmp")).unwrap();
        held.lock().unwrap();
        drop(RunDir::open(&path).unwrap());
        let mut left: Vec<_> = fs::read_dir(&adapter).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".ares-held.tmp", "adapter_config.json"], "what another process holds stays");
    }

    #[test]
    fn an_empty_directory_is_taken_and_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Earlier::Refuse).unwrap();
        assert_eq!(run.path(), folder.path());
        let file = RunDir::create(&run.file(LOCK), Earlier::Keep).unwrap_err();
        assert!(file.to_string().contains("found a file"), "{file}");
    }
}
