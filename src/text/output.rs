//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::{NamedTempFile, TempDir, TempPath};

use crate::error::{Error, Result};

/// Writes `bytes` to `path`: at every moment the old file or the new one is there, and never a part.
/// Fails if it cannot be written there.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::write(path))?;
    file.commit()
}

/// A file that takes its name only in [`AtomicFile::commit`]: written under a temporary name in the same folder, flushed to the
/// disk, then renamed. Dropped without commit it leaves nothing.
pub(crate) struct AtomicFile {
    /// For messages, too.
    pub(crate) path: PathBuf,
    out: BufWriter<Box<dyn Write>>,
    /// `None` for what is no file: a pipe, `/dev/null`. Such a thing is written directly; a rename would replace it.
    temporary: Option<(Arc<File>, TempPath)>,
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl AtomicFile {
    /// Opens the temporary file. Fails if `path` is a folder, or lies in one that cannot be written.
    pub(crate) fn create(path: &Path) -> Result<AtomicFile> {
        if path.file_name().is_none() || path.is_dir() {
            return Err(Error::Usage(format!("{}: expected the path of a file, found a folder", path.display())));
        }
        let path = target(path)?;
        let earlier = fs::metadata(&path).ok();
        if earlier.as_ref().is_some_and(|found| !found.is_file()) {
            let out = BufWriter::new(Box::new(File::create(&path).map_err(Error::write(&path))?) as Box<dyn Write>);
            return Ok(AtomicFile { path, out, temporary: None });
        }
        // Made by hand, since tempfile's own files are readable by their owner alone.
        let make = || hidden().make_in(folder(&path), |hidden| File::create_new(hidden)).map(NamedTempFile::into_parts);
        let (file, temporary) = held(make, |(file, place)| (file, &**place)).map_err(Error::write(&path))?;
        if let Some(earlier) = earlier {
            file.set_permissions(earlier.permissions()).map_err(Error::write(&path))?;
        }
        let file = Arc::new(file);
        Ok(AtomicFile { path, out: BufWriter::new(Box::new(file.clone())), temporary: Some((file, temporary)) })
    }

    /// Flushes to the disk and gives the file its name. Fails, without harm to an earlier file, if either cannot be done.
    pub(crate) fn commit(mut self) -> Result<()> {
        let done = self.out.flush().and_then(|()| {
            let Some((file, temporary)) = self.temporary else { return Ok(()) };
            file.sync_all()?;
            temporary.persist(&self.path)?;
            sync(folder(&self.path))
        });
        done.map_err(Error::write(&self.path))
    }
}

/// Follows links: the file that `path` leads to is replaced, not the link. Fails on one that leads nowhere.
pub(crate) fn target(path: &Path) -> Result<PathBuf> {
    match (fs::canonicalize(path), path.is_symlink()) {
        (Ok(path), _) => Ok(path),
        (Err(_), false) => Ok(path.to_path_buf()),
        (Err(error), true) => {
            let why = "expected a file, or a link to one, found a link that leads nowhere";
            Err(Error::Usage(format!("{}: {why} ({error}); remove it, or make what it leads to", path.display())))
        }
    }
}

/// Removes what writers that are dead left in `folder`: temporary files and folders that nobody holds. Best effort.
pub(crate) fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let ours = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
        let Some(file) = ours.then(|| File::open(&path).ok()).flatten() else { continue };
        // Held while it is removed, so that who has just made it, and waits for the lock, finds it gone and makes another.
        if file.try_lock().is_ok() {
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Makes something temporary and takes its lock, by which [`sweep`] knows that its maker lives.
fn held<T>(make: impl Fn() -> std::io::Result<T>, parts: impl Fn(&T) -> (&File, &Path)) -> std::io::Result<T> {
    loop {
        let made = make()?;
        let (file, place) = parts(&made);
        file.lock()?;
        if place.exists() {
            return Ok(made);
        }
    }
}

/// A temporary folder in `parent`, and its lock. It goes unless it is kept.
pub(crate) fn held_folder(parent: &Path) -> std::io::Result<(TempDir, File)> {
    let open = fs::Permissions::from_mode(0o777); // as the user's mask has it
    let make = || {
        let made = hidden().permissions(open.clone()).tempdir_in(parent)?;
        let file = File::open(made.path())?;
        Ok((made, file))
    };
    held(make, |(made, file)| (file, made.path()))
}

/// Writes several files into the folder `dir`. A folder that is not there yet appears whole or not at all; in one that is, each
/// file is replaced as a whole, in the order given.
pub(crate) fn write_folder(dir: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    let write = |dir: &Path| files.iter().try_for_each(|(name, bytes)| write_atomic(&dir.join(name), bytes));
    if dir.exists() { write(dir) } else { folder_of(dir, write) }
}

/// Makes the folder `dir`, which must not be there, of what `write` puts into it: it appears whole or not at all.
pub(crate) fn folder_of(dir: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if dir.file_name().is_none() || dir.exists() {
        return Err(Error::Usage(format!("{}: expected the name of a new folder", dir.display())));
    }
    let parent = folder(dir);
    fs::create_dir_all(parent).map_err(Error::write(parent))?;
    let (staging, _held) = held_folder(parent).map_err(Error::write(dir))?;
    write(staging.path())?;
    fs::rename(staging.path(), dir).and_then(|()| sync(parent)).map_err(Error::write(dir))?;
    let _ = staging.keep(); // it has another name now
    Ok(())
}

/// Temporary files and folders are called so.
const PREFIX: &str = ".ares-";
const SUFFIX: &str = ".tmp";

/// Makes names that no listing shows, should one ever remain.
fn hidden() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    builder
}

/// Names the folder in which `path` lies.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename in `folder` durable.
pub(crate) fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Counts the lines of a growing file that have an end, and their bytes: what follows is torn.
pub(crate) fn whole_lines(file: &File) -> std::io::Result<(usize, u64)> {
    let (mut reader, mut line, mut lines, mut bytes) = (BufReader::new(file), Vec::new(), 0, 0);
    while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        (lines, bytes) = (lines + 1, bytes + line.len() as u64);
        line.clear();
    }
    Ok((lines, bytes))
}

/// Hashes `bytes` with SHA-256, in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_the_old_one_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        write_atomic(&path, b"first").unwrap();
        write_atomic(&path, b"second").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file may stay");
    }

    #[test]
    fn links_and_devices_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("out.json"), dir.path().join("link.json"));
        write_atomic(&path, b"old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_atomic(&link, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(link.symlink_metadata().unwrap().is_symlink());
        let device = Path::new("/dev/null");
        write_atomic(device, b"gone").unwrap();
        assert!(!device.metadata().unwrap().is_file());
    }

    #[test]
    fn a_folder_appears_whole_and_keeps_what_else_it_holds() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("deep/adapter");
        write_folder(&dir, &[("a", b"1"), ("b", b"2")]).unwrap();
        assert_eq!(fs::read(dir.join("b")).unwrap(), b"2");
        fs::write(dir.join("note"), "mine").unwrap();
        write_folder(&dir, &[("a", b"3")]).unwrap();
        assert_eq!(
            (fs::read(dir.join("a")).unwrap(), fs::read(dir.join("note")).unwrap()),
            (b"3".into(), b"mine".into())
        );
        // A name that cannot be written in the staging folder: nothing may remain.
        assert!(write_folder(&root.path().join("other"), &[("a", b"1"), ("no/such", b"2")]).is_err());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
