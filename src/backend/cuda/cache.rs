//! What was compiled, kept on disk: a folder per key, whole or not there at all.
//!
//! An entry is made in a folder aside, sealed with the checksums of its files, flushed and renamed. Of two processes that make
//! the same entry the first wins; the other takes the winner's and deletes its own. A damaged entry is made anew. A cache
//! that cannot be written is an error with its remedy, never a slow run that nobody can explain.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::error::{Error, Result};

/// `$ARES_CACHE`, else `$XDG_CACHE_HOME/ares`, else `~/.cache/ares`, else this user's folder among temporary files. It need not
/// exist.
pub(crate) fn cache_path() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("ARES_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("ares")))
        .or_else(|| Some(set("HOME")?.join(".cache").join("ares")))
        .unwrap_or_else(|| std::env::temp_dir().join(format!("ares-{}", user())))
}

fn user() -> u32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Makes [`cache_path`] for this user alone, unless it is there. Fails where another user could have written into it: what lies
/// there decides results and is run.
pub(crate) fn own_cache() -> Result<PathBuf> {
    let path = cache_path();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed(&path))?;
    let found = fs::metadata(&path).map_err(failed(&path))?;
    if found.uid() == user() && found.mode() & 0o002 == 0 {
        return Ok(path);
    }
    let remedy = "name another folder in ARES_CACHE, or make this one yours alone";
    let found = format!("one of user {} with mode {:o}", found.uid(), found.mode() & 0o7777);
    Err(Error::file(&path, "a cache folder that only this user writes to", remedy)(found))
}

/// The checksums of an entry, as `sha256sum --check` reads them.
const SEAL: &str = "SHA256SUMS";

/// What an entry is made from; two that differ in anything have different keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(String);

impl Key {
    /// `label` (for whoever looks into the folder) and a hash of all parts.
    pub(crate) fn new(label: &str, parts: &[&[u8]]) -> Key {
        let mut hash = Sha256::new();
        for part in parts {
            // Lengths keep ["ab", "c"] apart from ["a", "bc"].
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hash = format!("{:x}", hash.finalize());
        Key(format!("{label}-{}", &hash[..32]))
    }

    /// The key of what is made from this and one part more.
    pub(crate) fn and(&self, part: &[u8]) -> Key {
        let label = self.0.rsplit_once('-').map_or("", |(label, _)| label);
        Key::new(label, &[self.0.as_bytes(), part])
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A folder of entries.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The user's: `kernels` below [`own_cache`].
    pub(crate) fn user() -> Result<Cache> {
        Ok(Cache::at(own_cache()?.join("kernels")))
    }

    pub fn at(root: PathBuf) -> Cache {
        Cache { root }
    }

    /// The folder of the entry; when there is none, or a damaged one, `make` writes its files into the folder it is given.
    pub(crate) fn entry(&self, key: &Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let entry = self.root.join(key.as_str());
        if is_whole(&entry) {
            return Ok(entry);
        }
        let made = aside(&self.root, key)?;
        make(made.path())?;
        seal(made.path())?;
        if entry.exists() && !is_whole(&entry) {
            // Renamed before it is deleted: nobody finds half of it. If that fails, so does the rename below, which says so.
            let damaged = aside(&self.root, key)?;
            let _ = fs::rename(&entry, damaged.path());
        }
        match fs::rename(made.path(), &entry) {
            Ok(()) => {
                sync(&self.root)?;
                Ok(entry)
            }
            // Another process was faster: a folder that is not empty is never replaced.
            Err(_) if is_whole(&entry) => Ok(entry),
            Err(error) => Err(failed(&entry)(error)),
        }
    }
}

/// A folder beside the entries that no other process or thread uses; deleted unless it is renamed.
fn aside(root: &Path, key: &Key) -> Result<TempDir> {
    fs::create_dir_all(root).map_err(failed(root))?;
    let (prefix, open) = (format!("{}.", key.0), fs::Permissions::from_mode(0o777)); // as the user's mask has it
    let mut folder = tempfile::Builder::new();
    folder.prefix(&prefix).suffix(".tmp").permissions(open).tempdir_in(root).map_err(failed(root))
}

/// Writes one file of an entry.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(failed(path))
}

/// Writes the checksums of all files, and all of it to disk.
fn seal(folder: &Path) -> Result<()> {
    let mut lines = String::new();
    for name in names(folder).map_err(failed(folder))? {
        let path = folder.join(&name);
        lines.push_str(&format!("{}  {name}\n", checksum(&path).map_err(failed(&path))?));
        sync(&path)?;
    }
    let path = folder.join(SEAL);
    let mut file = File::create(&path).map_err(failed(&path))?;
    file.write_all(lines.as_bytes()).and_then(|()| file.sync_all()).map_err(failed(&path))?;
    sync(folder)
}

/// Whether every file is there and as it was sealed. Anything unreadable is damage.
fn is_whole(entry: &Path) -> bool {
    let Ok(lines) = fs::read_to_string(entry.join(SEAL)) else { return false };
    let holds = |line: &str| {
        let Some((sum, name)) = line.split_once("  ") else { return false };
        checksum(&entry.join(name)).is_ok_and(|found| found == sum)
    };
    !lines.is_empty() && lines.lines().all(holds)
}

fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn checksum(file: &Path) -> std::io::Result<String> {
    Ok(format!("{:x}", Sha256::digest(fs::read(file)?)))
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    let remedy = "free disk space, or set ARES_CACHE to a folder that can be written";
    move |source| Error::Io { path, action: "keep a compiled kernel", source, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("kernels"));
        (folder, cache)
    }

    fn write(text: &str) -> impl FnOnce(&Path) -> Result<()> {
        move |folder| fs::write(folder.join("kernel.cubin"), text).map_err(Error::write(folder))
    }

    fn read(entry: &Path) -> String {
        fs::read_to_string(entry.join("kernel.cubin")).unwrap()
    }

    #[test]
    fn an_entry_is_made_once_and_whole_or_not_at_all() {
        let (folder, cache) = cache();
        let [key, raced] = [&b"text"[..], b"other"].map(|text| Key::new("norm", &[text, b"sm_80"]));
        let entries = || fs::read_dir(&cache.root).unwrap().count();
        assert!(cache.entry(&key, |_| Err(Error::Usage("no".into()))).is_err());
        assert_eq!(entries(), 0, "what fails leaves nothing");
        assert_eq!(read(&cache.entry(&key, write("one")).unwrap()), "one");
        assert_eq!(read(&cache.entry(&key, |_| panic!("made twice")).unwrap()), "one");
        let lost = cache.entry(&raced, |folder| {
            cache.entry(&raced, write("winner"))?;
            write("loser")(folder)
        });
        assert_eq!(read(&lost.unwrap()), "winner");
        assert_eq!(entries(), 2, "the loser deleted its own");
        // A file where the cache's folder should be: as good as a disk that cannot be written, also for root.
        let blocked = Cache::at(folder.path().join("file"));
        fs::write(&blocked.root, "").unwrap();
        refused(blocked.entry(&key, write("x")), "ARES_CACHE");
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let keys = [
            Key::new("norm", &[b"ab", b"c"]),
            Key::new("norm", &[b"a", b"bc"]),
            Key::new("norm", &[b"abc"]),
            Key::new("rows", &[b"abc"]),
            Key::new("norm", &[b"abc"]).and(b"d"),
            Key::new("norm", &[b"abc"]).and(b"e"),
        ];
        assert!(keys[5].as_str().starts_with("norm-") && keys[5].as_str().len() == keys[0].as_str().len());
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn a_damaged_entry_is_made_anew() {
        let (_folder, cache) = cache();
        let key = Key::new("norm", &[]);
        let entry = cache.entry(&key, write("whole")).unwrap();
        type Damage = fn(&Path) -> std::io::Result<()>;
        let damages: [Damage; 4] = [
            |entry| fs::write(entry.join("kernel.cubin"), "whose"),
            |entry| fs::remove_file(entry.join("kernel.cubin")),
            |entry| fs::write(entry.join(SEAL), ""),
            |entry| fs::remove_file(entry.join(SEAL)),
        ];
        for damage in damages {
            damage(&entry).unwrap();
            assert!(!is_whole(&entry));
            assert_eq!(read(&cache.entry(&key, write("whole")).unwrap()), "whole");
            assert_eq!(fs::read_dir(&cache.root).unwrap().count(), 1, "the damaged one is gone");
        }
    }
}
