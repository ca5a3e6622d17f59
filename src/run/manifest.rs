//! `run.toml`, the receipt: what was run, on what, with which settings.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::args::strip;
use crate::error::{Error, Result};
use crate::text::output::sha256;
use crate::text::write_atomic;

/// The file's name in a run directory.
pub(crate) const NAME: &str = "run.toml";

/// What a run was made from. With the same program, the same inputs and the same settings it ends with the same result.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Manifest {
    /// `demo`, `compare`, …
    pub(crate) command: String,
    /// Seconds since 1970, UTC.
    pub(crate) started: u64,
    /// As a person reads it: `cpu (2 threads of …)`.
    pub(crate) device: String,
    pub(crate) seeds: Vec<u64>,
    /// What was typed after the program's name, without `--out`, and in which folder: enough to go on with the run.
    pub(crate) arguments: Vec<String>,
    pub(crate) directory: String,
    /// Of the program and of what decides its numbers.
    pub(crate) versions: BTreeMap<String, String>,
    /// Every setting after defaults were filled in.
    pub(crate) settings: toml::Table,
    /// Path → SHA-256 of every file that was read.
    pub(crate) inputs: BTreeMap<String, String>,
}

impl Manifest {
    /// `settings` is any structure that serialises to a table: the command's own options.
    pub(crate) fn new(command: &str, device: &str, seeds: &[u64], settings: &impl Serialize) -> Result<Manifest> {
        let settings = toml::Table::try_from(settings)
            .map_err(|error| Error::Usage(format!("the settings cannot be written to {NAME}: {error}")))?;
        let text = |word: OsString| word.to_string_lossy().into_owned();
        let versions =
            [("ares", env!("CARGO_PKG_VERSION")), ("system", std::env::consts::OS), ("cpu", std::env::consts::ARCH)];
        Ok(Manifest {
            command: command.to_string(),
            started: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            device: device.to_string(),
            seeds: seeds.to_vec(),
            arguments: strip(std::env::args_os().skip(1).collect(), "--out").0.into_iter().map(text).collect(),
            directory: std::env::current_dir().map(|here| text(here.into())).unwrap_or_default(),
            versions: versions.map(|(name, version)| (name.to_string(), version.to_string())).into(),
            settings,
            inputs: BTreeMap::new(),
        })
    }

    /// What decides the rows of a command that takes rows: what was typed, but where rows come from and go, and the models' files, large
    /// ones by their length and their ends alone.
    pub(crate) fn of_rows(device: &str, inputs: &[&Path]) -> Result<Manifest> {
        let mut manifest = Manifest::new("rows", device, &[], &toml::Table::new())?;
        let mut words = manifest.arguments.iter().peekable();
        manifest.command = words.next().cloned().unwrap_or_default();
        while let Some(word) = words.next() {
            let name = word.trim_start_matches('-');
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, value.to_string()),
                None => {
                    (name, words.next_if(|next| !next.starts_with('-')).cloned().unwrap_or_else(|| "yes".to_string()))
                }
            };
            if !["input", "i", "output", "o", "resume", "quiet", "q", "verbose", "v", "json", "device", "strict"]
                .contains(&name)
            {
                manifest.settings.insert(name.to_string(), value.into());
            }
        }
        manifest.arguments.clear();
        for place in inputs {
            for file in files(place)? {
                manifest.inputs.insert(file.display().to_string(), sketch(&file)?);
            }
        }
        Ok(manifest)
    }

    /// Hashes a file, or what a model is read from: in its folder the configuration, the tokenizer, the template and the weights.
    /// What else lies there (other formats, an optimiser's state) says nothing about a run. Returns a hash of them all, the same
    /// wherever they lie.
    pub(crate) fn add_input(&mut self, place: &Path) -> Result<String> {
        let mut hashes = BTreeMap::new();
        for file in files(place)? {
            let hash = sha256_file(&file)?;
            hashes.insert(file.file_name().unwrap_or_default().to_os_string(), hash.clone());
            self.inputs.insert(file.display().to_string(), hash);
        }
        Ok(sha256(format!("{hashes:?}").as_bytes()))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text =
            toml::to_string(self).map_err(Error::file(path, "settings that TOML can hold", "please report it"))?;
        write_atomic(path, text.as_bytes())
    }

    /// The receipt of the run in `dir`, and where it lies; of a demo of several pairs the first pair's. Fails where there is none.
    pub(crate) fn of_run(dir: &Path) -> Result<(PathBuf, Manifest)> {
        let own = dir.join(NAME);
        let pairs = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path().join(NAME));
        let Some(path) = std::iter::once(own).chain(pairs).find(|path| path.is_file()) else {
            let why = format!(
                "expected the directory of a run that was stopped, found no {NAME}; begin it with --out instead"
            );
            return Err(Error::Usage(format!("--resume {}: {why}", dir.display())));
        };
        Manifest::read(&path).map(|manifest| (path, manifest))
    }

    /// Fails unless a run that began with this receipt, in `path`, goes on to the same numbers with `now`: the same program, settings
    /// and input files, wherever these lie, on the same kind of device. Says what differs.
    pub(crate) fn expect_same(&self, now: &Manifest, path: &Path) -> Result<()> {
        let kind = |device: &str| device.split([' ', ':']).next().unwrap_or_default().to_string();
        let words = |seeds: &[u64]| seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let mut pairs = vec![
            ("command".to_string(), self.command.clone(), now.command.clone()),
            ("device".to_string(), kind(&self.device), kind(&now.device)),
            ("seeds".to_string(), words(&self.seeds), words(&now.seeds)),
        ];
        differing("versions", &self.versions, &now.versions, &mut pairs);
        differing("settings", &flat(&self.settings), &flat(&now.settings), &mut pairs);
        differing("input", &by_name(&self.inputs), &by_name(&now.inputs), &mut pairs);
        match pairs.into_iter().find(|(_, then, now)| then != now) {
            None => Ok(()),
            Some((what, then, now)) => Err(Error::Data {
                what: format!("{}: {what}", path.display()),
                expected: format!("{then}, as when the run began"),
                found: now,
                remedy: "resume with the same, or begin anew elsewhere".into(),
            }),
        }
    }

    pub fn read(path: &Path) -> Result<Manifest> {
        let text = fs::read_to_string(path).map_err(Error::read(path))?;
        toml::from_str(&text).map_err(Error::file(path, "the receipt of a run", "restore the file"))
    }
}

/// Adds what two maps have under each name of either.
fn differing(
    what: &str,
    then: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
    out: &mut Vec<(String, String, String)>,
) {
    let of = |map: &BTreeMap<String, String>, name| map.get(name).cloned().unwrap_or("nothing".into());
    out.extend(then.keys().chain(now.keys()).map(|name| (format!("{what} {name}"), of(then, name), of(now, name))));
}

/// Every setting under its dotted name. Of a path only the last part counts: a run may be moved, and what it reads is held against
/// hashes.
fn flat(table: &toml::Table) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(inner) => {
                out.extend(flat(inner).into_iter().map(|(key, value)| (format!("{name}.{key}"), value)))
            }
            toml::Value::String(text) => drop(out.insert(name.clone(), last_part(text))),
            other => drop(out.insert(name.clone(), other.to_string())),
        }
    }
    out
}

/// Hashes under the names of files, whatever folder they lie in; several of one name side by side.
fn by_name(inputs: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut out = BTreeMap::<String, Vec<&str>>::new();
    for (path, hash) in inputs {
        out.entry(last_part(path)).or_default().push(&hash[..12.min(hash.len())]);
    }
    let sorted = |mut hashes: Vec<&str>| {
        hashes.sort_unstable();
        hashes.join(", ")
    };
    out.into_iter().map(|(name, hashes)| (name, sorted(hashes))).collect()
}

fn last_part(path: &str) -> String {
    path.rsplit(['/', '\\']).next().unwrap_or(path).to_string()
}

/// The file itself, or those of a folder that a model is read from.
fn files(place: &Path) -> Result<Vec<PathBuf>> {
    if !place.is_dir() {
        return Ok(vec![place.to_path_buf()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(place).map_err(Error::read(place))? {
        let path = entry.map_err(Error::read(place))?.path();
        let read = path.extension().is_some_and(|kind| ["json", "safetensors", "jinja"].iter().any(|k| kind == *k));
        found.extend(Some(path).filter(|path| read && path.is_file()));
    }
    Ok(found)
}

/// A hash of a file's length and, where it is large, of its first and last 256 KiB alone: another model differs there.
fn sketch(path: &Path) -> Result<String> {
    const END: u64 = 256 << 10;
    let mut file = File::open(path).map_err(Error::read(path))?;
    let length = file.metadata().map_err(Error::read(path))?.len();
    let (mut hash, mut bytes) = (Sha256::new(), Vec::new());
    let begun = (&mut file).take(END).read_to_end(&mut bytes);
    let whole = begun
        .and_then(|_| file.seek(SeekFrom::Start(length.saturating_sub(END))))
        .and_then(|_| file.read_to_end(&mut bytes));
    whole.map_err(Error::read(path))?;
    hash.update(length.to_le_bytes());
    hash.update(&bytes);
    Ok(format!("{:x}", hash.finalize()))
}

/// SHA-256 of a file in hex, without holding it in memory.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(Error::read(path))?;
    std::io::copy(&mut file, &mut hash).map_err(Error::read(path))?;
    Ok(format!("{:x}", hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("model/deep.json")).unwrap();
        for (name, text) in
            [("config.json", "abc"), ("template.jinja", ""), ("optimizer.pt", ""), ("deep.json/x.json", "")]
        {
            fs::write(folder.path().join("model").join(name), text).unwrap();
        }
        let settings = BTreeMap::from([("rank", Some(8)), ("resample", None)]);
        let mut written = Manifest::new("demo", "cpu", &[1, 2], &settings).unwrap();
        written.add_input(&folder.path().join("model")).unwrap();
        let path = folder.path().join(NAME);
        written.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), written);
        assert_eq!((written.settings["rank"].as_integer(), written.settings.len()), (Some(8), 1));
        assert_eq!(written.inputs.len(), 2);
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(written.inputs.values().any(|hash| hash == known));
        let error = written.add_input(Path::new("/nowhere/prompts.jsonl")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/prompts.jsonl"), "{error}");
    }
}
