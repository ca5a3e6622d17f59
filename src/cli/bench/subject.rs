//! Which models are timed.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::{Head, ModelConfig, RandomWeights, Transformer};
use crate::ops::Ops;

/// A model to time: one that is there, or a shape.
pub(super) enum Subject {
    Folder(PathBuf),
    Config(Box<ModelConfig>, String),
}

impl Subject {
    /// A folder, or a config.json cut to its first `layers`.
    pub(crate) fn of(path: &Path, layers: Option<usize>) -> Result<Subject> {
        if path.extension().is_some_and(|e| e == "json") {
            let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
            let mut config = ModelConfig::parse(path, &text)?;
            config.layers = layers.unwrap_or(config.layers).clamp(1, config.layers);
            return Ok(Subject::Config(Box::new(config), path.display().to_string()));
        }
        if !path.is_dir() {
            return Err(Error::Usage(format!(
                "{}: expected a model's folder, or a config.json whose shape gets random weights; found {}",
                path.display(),
                if path.exists() { "another file" } else { "nothing" }
            )));
        }
        // A checkpoint is timed as it is.
        if let Some(layers) = layers {
            return Err(Error::Usage(format!(
                "--layers {layers}: expected a config.json, whose first layers get random weights; found the folder {}: give its \
                 config.json, or leave out --layers",
                path.display()
            )));
        }
        Ok(Subject::Folder(path.to_path_buf()))
    }

    pub(crate) fn config(&self) -> Result<ModelConfig> {
        match self {
            Subject::Folder(dir) => ModelConfig::open(dir),
            Subject::Config(config, _) => Ok((**config).clone()),
        }
    }

    /// The folder; random weights are made here, so there is nothing to load.
    pub(crate) fn checkpoint(&self) -> Result<&Path> {
        match self {
            Subject::Folder(dir) => Ok(dir),
            Subject::Config(_, name) => Err(Error::Usage(format!(
                "bench load: expected a model's folder, whose checkpoint is loaded; found {name}, a shape whose random weights \
                 would be made here: give a folder, or leave out `load`"
            ))),
        }
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Subject::Folder(dir) => dir.display().to_string(),
            Subject::Config(config, name) => format!("{name}, {} layers, random weights", config.layers),
        }
    }

    /// A config made for a language model serves as reward model too: with a score head.
    pub(crate) fn load<B: Ops>(&self, ops: &B, scores: bool, seed: u64) -> Result<Transformer<B>> {
        match self {
            Subject::Folder(dir) => Transformer::open(ops, dir),
            Subject::Config(config, _) => {
                let mut config = (**config).clone();
                config.head = match scores {
                    true => Head::Classification { labels: 1 },
                    false => Head::Causal,
                };
                let weights = RandomWeights::new(&config, seed);
                Transformer::load(ops, config, &weights)
            }
        }
    }
}
