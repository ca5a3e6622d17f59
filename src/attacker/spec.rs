//! `--attacker SPEC`: who writes, as typed.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::Attacker;
use super::model::Model;
use super::program::Program;
use crate::error::Result;
use crate::judge::spec::with_more;
use crate::model::ModelSpec;
use crate::ops::Ops;
use crate::text::template::Arguments;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub(crate) enum AttackerSpec {
    /// `DIR[+ADAPTER][,FORM]`
    Model { model: ModelSpec, form: Option<PathBuf> },
    /// `cmd:PROGRAM ARGS`, no word of which holds a blank.
    Program(Vec<String>),
}

impl From<AttackerSpec> for String {
    fn from(spec: AttackerSpec) -> String {
        match spec {
            AttackerSpec::Model { model, form } => {
                let form = form.map_or_else(String::new, |form| format!(",{}", form.display()));
                format!("{}{form}", String::from(model))
            }
            AttackerSpec::Program(words) => format!("cmd:{}", words.join(" ")),
        }
    }
}

impl FromStr for AttackerSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<AttackerSpec, String> {
        let wrong = |why| format!("{why}: expected DIR[+ADAPTER][,FORM] or cmd:PROGRAM ARGS");
        if let Some(line) = text.strip_prefix("cmd:") {
            let words: Vec<String> = line.split_whitespace().map(str::to_string).collect();
            return if words.is_empty() { Err(wrong("no program".into())) } else { Ok(AttackerSpec::Program(words)) };
        }
        let (model, form) = with_more(text);
        Ok(AttackerSpec::Model { model: model.parse().map_err(wrong)?, form: form.map(PathBuf::from) })
    }
}

impl AttackerSpec {
    /// The folders and files that it is read from.
    pub(crate) fn places(&self) -> Vec<&Path> {
        match self {
            AttackerSpec::Model { model, form } => model.places().into_iter().chain(form.as_deref()).collect(),
            AttackerSpec::Program(words) => words.iter().map(Path::new).filter(|word| word.is_file()).collect(),
        }
    }

    pub(crate) fn open<B: Ops>(
        &self,
        ops: &B,
        arguments: &Arguments,
        batch_tokens: usize,
        interrupt: Arc<AtomicBool>,
    ) -> Result<Box<dyn Attacker>> {
        Ok(match self {
            AttackerSpec::Model { model, form } => {
                Box::new(Model::open(ops, model, form.as_deref(), arguments, batch_tokens, interrupt)?)
            }
            AttackerSpec::Program(words) => Box::new(Program::open(words, interrupt)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_what_is_shown() {
        for text in ["a", "a+b", "a+b,form.toml", "a,form.toml", "cmd:python3 attacker.py 5"] {
            assert_eq!(String::from(text.parse::<AttackerSpec>().unwrap()), text);
        }
        for text in ["", "cmd:", "cmd: ", "+a"] {
            assert!(text.parse::<AttackerSpec>().is_err(), "{text}");
        }
    }
}
