//! Which models are timed.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::{BlankWeights, Head, ModelConfig, RandomWeights, Transformer};
use crate::ops::Ops;

/// A model to time: a folder's, or one of random weights at the shape of a config.json.
pub(super) struct Subject {
    path: PathBuf,
    pub(super) config: ModelConfig,
    random: bool,
}

impl Subject {
    /// A folder, or a config.json cut to its first `layers`.
    pub(super) fn of(path: &Path, layers: Option<usize>) -> Result<Subject> {
        let place = path.display();
        if path.extension().is_some_and(|e| e == "json") {
            let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
            let mut config = ModelConfig::parse(path, &text)?;
            config.layers = layers.unwrap_or(config.layers).clamp(1, config.layers);
            return Ok(Subject { path: path.to_path_buf(), config, random: true });
        }
        if !path.is_dir() {
            return Err(Error::Usage(format!(
                "{place}: expected a model's folder, or a config.json whose shape gets random weights; found {}",
                if path.exists() { "another file" } else { "nothing" }
            )));
        }
        // A checkpoint is timed as it is.
        if let Some(layers) = layers {
            return Err(Error::Usage(format!(
                "--layers {layers}: expected a config.json, whose first layers get random weights; found the folder {place}: give \
                 its config.json, or leave out --layers"
            )));
        }
        Ok(Subject { path: path.to_path_buf(), config: ModelConfig::open(path)?, random: false })
    }

    /// The folder; random weights are made here, so there is nothing to load.
    pub(super) fn checkpoint(&self) -> Result<&Path> {
        if self.random {
            return Err(Error::Usage(format!(
                "bench load: expected a model's folder, whose checkpoint is loaded; found {}, a shape whose random weights would be \
                 made here: give a folder, or leave out `load`",
                self.path.display()
            )));
        }
        Ok(&self.path)
    }

    pub(super) fn name(&self) -> String {
        let more = if self.random { format!(", {} layers, random weights", self.config.layers) } else { String::new() };
        format!("{}{more}", self.path.display())
    }

    /// A config made for a language model serves as reward model too: with a score head.
    pub(super) fn load<B: Ops>(&self, ops: &B, scores: bool, seed: u64) -> Result<Transformer<B>> {
        if !self.random {
            return Transformer::open(ops, &self.path);
        }
        let config = self.shape(scores);
        let weights = RandomWeights::new(&config, seed);
        Transformer::load(ops, config, &weights)
    }

    /// The same without its weights, for a device that only counts.
    pub(super) fn blank<B: Ops>(&self, ops: &B, scores: bool) -> Result<Transformer<B>> {
        let config = if self.random { self.shape(scores) } else { self.config.clone() };
        let weights = BlankWeights(RandomWeights::new(&config, 0));
        Transformer::load(ops, config, &weights)
    }

    fn shape(&self, scores: bool) -> ModelConfig {
        let mut config = self.config.clone();
        config.head = if scores { Head::Classification { labels: 1 } } else { Head::Causal };
        config
    }
}
