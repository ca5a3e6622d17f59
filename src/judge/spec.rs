//! `--judge SPEC`: which judge, as typed.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::classifier::Classifier;
use super::{Judge, Lexicon};
use crate::error::{Error, Result};
use crate::ops::Ops;

/// Where a judgement comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub enum JudgeSpec {
    /// `model:DIR`: a sequence classifier.
    Model(PathBuf),
    /// `lexicon:FILE`: starts and phrases that give an answer away.
    Lexicon(PathBuf),
}

impl From<JudgeSpec> for String {
    fn from(spec: JudgeSpec) -> String {
        match spec {
            JudgeSpec::Model(dir) => format!("model:{}", dir.display()),
            JudgeSpec::Lexicon(file) => format!("lexicon:{}", file.display()),
        }
    }
}

impl FromStr for JudgeSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<JudgeSpec> {
        match text.split_once(':') {
            Some(("model", dir)) if !dir.is_empty() => Ok(JudgeSpec::Model(dir.into())),
            Some(("lexicon", file)) if !file.is_empty() => Ok(JudgeSpec::Lexicon(file.into())),
            _ => Err(Error::Usage(format!("--judge: expected model:DIR or lexicon:FILE, found `{text}`"))),
        }
    }
}

impl JudgeSpec {
    /// The folder or file that it is read from.
    pub(crate) fn place(&self) -> &Path {
        match self {
            JudgeSpec::Model(place) | JudgeSpec::Lexicon(place) => place,
        }
    }

    /// Opens the judge.
    pub fn open<B: Ops>(&self, ops: &B, batch_tokens: usize, interrupt: &Arc<AtomicBool>) -> Result<Box<dyn Judge>> {
        Ok(match self {
            JudgeSpec::Model(dir) => Box::new(Classifier::open(ops, dir, batch_tokens, interrupt.clone())?),
            JudgeSpec::Lexicon(file) => Box::new(Lexicon::open(file)?),
        })
    }
}
