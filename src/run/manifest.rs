//! `run.toml`, the receipt: what was run, on what, with which settings.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
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
    /// As a person reads it: `cpu (2 threads)`.
    pub(crate) device: String,
    pub(crate) seeds: Vec<u64>,
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
        let versions =
            [("ares", env!("CARGO_PKG_VERSION")), ("system", std::env::consts::OS), ("cpu", std::env::consts::ARCH)];
        Ok(Manifest {
            command: command.to_string(),
            started: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            device: device.to_string(),
            seeds: seeds.to_vec(),
            versions: versions.map(|(name, version)| (name.to_string(), version.to_string())).into(),
            settings,
            inputs: BTreeMap::new(),
        })
    }

    /// Hashes a file, or what a model is read from: in its folder the configuration, the tokenizer, the template and the weights.
    /// What else lies there (other formats, an optimiser's state) says nothing about a run.
    pub(crate) fn add_input(&mut self, place: &Path) -> Result<()> {
        if !place.is_dir() {
            self.inputs.insert(place.display().to_string(), sha256_file(place)?);
            return Ok(());
        }
        for entry in fs::read_dir(place).map_err(Error::read(place))? {
            let path = entry.map_err(Error::read(place))?.path();
            let read = path.extension().is_some_and(|kind| ["json", "safetensors", "jinja"].iter().any(|k| kind == *k));
            if read && path.is_file() {
                self.add_input(&path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text =
            toml::to_string(self).map_err(Error::file(path, "settings that TOML can hold", "please report it"))?;
        write_atomic(path, text.as_bytes())
    }

    pub fn read(path: &Path) -> Result<Manifest> {
        let text = fs::read_to_string(path).map_err(Error::read(path))?;
        toml::from_str(&text).map_err(Error::file(path, "the receipt of a run", "restore the file"))
    }
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
