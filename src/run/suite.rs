//! The weakened suite: two pairs with planted faults, carried in the binary and unpacked once into the user's cache.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::ZlibDecoder;
use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::models::Models;
use crate::attacker::AttackerSpec;
use crate::backend::cuda::cache::own_cache;
use crate::error::{Error, Result};
use crate::judge::JudgeSpec;
use crate::model::ModelSpec;
use crate::repair::{Recipe, RepairConfig};
use crate::text::output::{held_folder, sweep, write_atomic};

include!(concat!(env!("OUT_DIR"), "/suite/files.rs"));

/// `suite.json`; paths lie in the suite's folder.
#[derive(Debug, Clone, Deserialize)]
struct SuiteFile {
    name: String,
    version: String,
    judge: PathBuf,
    second_judge: PathBuf,
    guard: PathBuf,
    attacker: Option<PathBuf>,
    refusal: PathBuf,
    truth: PathBuf,
    pairs: Vec<SuitePair>,
    #[serde(default)]
    hyperparameters: toml::Table,
}

/// A suite on disk.
#[derive(Debug, Clone)]
pub struct Suite {
    file: SuiteFile,
    repair: Recipe,
}

/// One weakened pair with all that a comparison needs.
#[derive(Debug, Clone, Deserialize)]
pub struct SuitePair {
    pub(crate) name: String,
    pub(crate) description: String,
    #[serde(skip)]
    dir: PathBuf,
}

impl SuitePair {
    /// The file of a split: `calibration`, `replay`, `retain`, `discovery`, `gate`, `check` or `test`.
    pub fn split(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.jsonl"))
    }

    pub(crate) fn grammar(&self) -> PathBuf {
        self.dir.join("grammar.json")
    }

    /// `policy` or `reward`.
    pub fn model(&self, role: &str) -> ModelSpec {
        ModelSpec { dir: self.dir.join(role), adapter: None }
    }
}

impl Suite {
    /// The suite in `dir`.
    pub fn open(dir: &Path) -> Result<Suite> {
        let path = dir.join("suite.json");
        let text = crate::text::input::read_text(&path)?;
        let remedy = "give --models the folder of a suite, or leave it out for the built-in one";
        let read = serde_json::from_str(&text);
        let mut file: SuiteFile = read.map_err(Error::file(&path, "a suite's manifest", remedy))?;
        if file.pairs.is_empty() {
            return Err(Error::file(&path, "at least one pair", remedy)("none"));
        }
        for judge in [&mut file.judge, &mut file.second_judge, &mut file.guard, &mut file.refusal, &mut file.truth] {
            *judge = dir.join(&*judge);
        }
        file.attacker = file.attacker.map(|attacker| dir.join(attacker));
        file.pairs.iter_mut().for_each(|pair| pair.dir = dir.join(&pair.name));
        let repair = Recipe::try_from(file.hyperparameters.clone());
        let repair = repair.map_err(Error::file(&path, "hyperparameters of a repair", remedy))?;
        Ok(Suite { file, repair })
    }

    /// The suite that this binary carries, unpacked below `cache` unless it is there already, unchanged.
    pub(crate) fn embedded(cache: &Path) -> Result<Suite> {
        let mut all = Sha256::new();
        FILES.iter().for_each(|(name, hash, _)| all.update([name.as_bytes(), &[0], hash].concat()));
        let key = format!("{:x}", all.finalize());
        let dir = cache.join(format!("suite-{}", &key[..16]));
        // Looked at each time: figures that look like the suite's must be the suite's.
        if !is_whole(&dir) {
            unpack(&dir)?;
        }
        Suite::open(&dir)
    }

    /// `--models DIR`, or the built-in suite in the user's cache.
    pub(crate) fn find(models: Option<&Path>) -> Result<Suite> {
        match models {
            Some(dir) => Suite::open(dir),
            None => Suite::embedded(&own_cache()?),
        }
    }

    /// `ares-weakened 1`
    pub(crate) fn label(&self) -> String {
        format!("{} {}", self.file.name, self.file.version)
    }

    pub fn pairs(&self) -> &[SuitePair] {
        &self.file.pairs
    }

    pub fn judge(&self) -> JudgeSpec {
        JudgeSpec::Model { dir: self.file.judge.clone(), label: None }
    }

    /// A language model that gives verdicts on harm and refusal.
    pub(crate) fn guard(&self) -> JudgeSpec {
        JudgeSpec::Guard { model: ModelSpec { dir: self.file.guard.clone(), adapter: None }, form: None }
    }

    /// A language model that writes prompts for the search. Fails where the suite has none.
    pub(crate) fn attacker(&self) -> Result<AttackerSpec> {
        let missing = || Error::Usage(format!("--attacker: {} has none", self.label()));
        let dir = self.file.attacker.clone().ok_or_else(missing)?;
        Ok(AttackerSpec::Model { model: ModelSpec { dir, adapter: None }, form: None })
    }

    /// A pair with everyone who judges it.
    pub(crate) fn models(&self, pair: &SuitePair) -> Models {
        Models {
            policy: pair.model("policy"),
            reward: pair.model("reward"),
            judge: self.judge(),
            second_judge: Some(JudgeSpec::Model { dir: self.file.second_judge.clone(), label: None }),
            refusal: Some(JudgeSpec::Lexicon(self.file.refusal.clone())),
            truth: Some(self.file.truth.clone()),
            tau_h: 0.5,
            max_new_tokens: 48,
            batch_tokens: None,
            template_arg: Vec::new(),
        }
    }

    /// What suits models of this size.
    pub fn repair_config(&self) -> RepairConfig {
        (*self.repair).clone()
    }
}

/// Whether `dir` holds what the binary does, by their hashes, and nothing else.
fn is_whole(dir: &Path) -> bool {
    fn count(dir: &Path) -> std::io::Result<usize> {
        fs::read_dir(dir)?
            .map(|entry| entry.and_then(|e| if e.path().is_dir() { count(&e.path()) } else { Ok(1) }))
            .sum()
    }
    let same = |(name, hash, _): &(&str, [u8; 32], &[u8])| {
        fs::read(dir.join(name)).is_ok_and(|found| Sha256::digest(found)[..] == *hash)
    };
    count(dir).is_ok_and(|n| n == FILES.len()) && FILES.par_iter().all(same)
}

/// Writes all files into a folder aside and renames it: whoever finds the folder finds all of it. What was there before, and was
/// not the suite, goes. The loser of a race drops its own.
fn unpack(dir: &Path) -> Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    sweep(parent);
    let aside = || held_folder(parent).map_err(Error::write(dir));
    let (made, _held) = aside()?;
    for (name, _, packed) in FILES {
        let file = made.path().join(name);
        let folder = file.parent().unwrap_or(parent);
        fs::create_dir_all(folder).map_err(Error::write(folder))?;
        let mut bytes = Vec::new();
        ZlibDecoder::new(*packed).read_to_end(&mut bytes).map_err(Error::write(&file))?;
        write_atomic(&file, &bytes)?;
    }
    let (other, _held_too) = aside()?;
    // Where nothing is there, this fails, and there is nothing to move.
    let _ = fs::rename(dir, other.path());
    let renamed = fs::rename(made.path(), dir);
    if is_whole(dir) { Ok(()) } else { renamed.map_err(Error::write(dir)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_carries_a_whole_suite() {
        let cache = tempfile::tempdir().unwrap();
        let place = || fs::read_dir(cache.path()).unwrap().next().unwrap().unwrap().path();
        let weights = Path::new("judge/model.safetensors");
        let right = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(weights)).unwrap();
        for change in ["none", "zeros", "more", "less", "none"] {
            match change {
                "zeros" => fs::write(place().join(weights), vec![0; right.len()]).unwrap(),
                "more" => fs::write(place().join("judge/chat_template.jinja"), "").unwrap(),
                "less" => fs::remove_file(place().join("judge/tokenizer.json")).unwrap(),
                _ => {}
            }
            let suite = Suite::embedded(cache.path()).unwrap();
            assert_eq!(fs::read(place().join(weights)).unwrap(), right, "{change}");
            assert!(
                !place().join("judge/chat_template.jinja").exists() && place().join("judge/tokenizer.json").exists()
            );
            assert!(suite.pairs().len() >= 2);
            for pair in suite.pairs() {
                for split in ["calibration", "replay", "retain", "discovery", "gate", "check", "test"] {
                    assert!(pair.split(split).is_file(), "{}", pair.split(split).display());
                }
                assert!(
                    pair.grammar().is_file() && pair.model("policy").dir.is_dir() && pair.model("reward").dir.is_dir()
                );
            }
        }
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1, "nothing is left beside the suite");
    }
}
