//! `--judge SPEC`: which judge, as typed.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::classifier::Classifier;
use super::ensemble::{Ensemble, Rule};
use super::guard::{Guard, Question};
use super::program::Program;
use super::{Judge, Lexicon};
use crate::error::{Error, Result};
use crate::model::ModelSpec;
use crate::ops::Ops;

/// Where a judgement comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub enum JudgeSpec {
    /// `model:DIR[,LABEL]`: a sequence classifier.
    Model { dir: PathBuf, label: Option<String> },
    /// `guard:DIR[+ADAPTER][,FORM]`: a language model that gives verdicts.
    Guard { model: ModelSpec, form: Option<PathBuf> },
    /// `cmd:PROGRAM ARGS`, no word of which holds a blank: a process of its own.
    Program(Vec<String>),
    /// `ensemble:[mean:|max:|vote:]SPEC,SPEC,…`: several as one; the mean where nothing is said.
    Ensemble { rule: Rule, members: Vec<JudgeSpec> },
    /// `lexicon:FILE`: starts and phrases that give an answer away.
    Lexicon(PathBuf),
}

impl From<JudgeSpec> for String {
    fn from(spec: JudgeSpec) -> String {
        match spec {
            JudgeSpec::Model { dir, label } => {
                format!("model:{}{}", dir.display(), label.map_or_else(String::new, |label| format!(",{label}")))
            }
            JudgeSpec::Guard { model, form } => {
                let form = form.map_or_else(String::new, |form| format!(",{}", form.display()));
                format!("guard:{}{form}", String::from(model))
            }
            JudgeSpec::Program(words) => format!("cmd:{}", words.join(" ")),
            JudgeSpec::Ensemble { rule, members } => {
                let members: Vec<String> = members.into_iter().map(String::from).collect();
                format!("ensemble:{}:{}", rule.name(), members.join(","))
            }
            JudgeSpec::Lexicon(file) => format!("lexicon:{}", file.display()),
        }
    }
}

impl FromStr for JudgeSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<JudgeSpec> {
        match text.split_once(':') {
            Some(("model", rest)) if !rest.is_empty() => {
                let (dir, label) = with_more(rest);
                Ok(JudgeSpec::Model { dir: dir.into(), label: label.map(str::to_string) })
            }
            Some(("guard", rest)) if !rest.is_empty() => {
                let (model, form) = with_more(rest);
                let form = form.map(PathBuf::from);
                let model = model.parse().map_err(|why| Error::Usage(format!("--judge guard:{model}: {why}")))?;
                Ok(JudgeSpec::Guard { model, form })
            }
            Some(("cmd", line)) if !line.trim().is_empty() => {
                Ok(JudgeSpec::Program(line.split_whitespace().map(str::to_string).collect()))
            }
            Some(("ensemble", rest)) => {
                let (rule, members) =
                    match rest.split_once(':').and_then(|(rule, rest)| Some((rule.parse().ok()?, rest))) {
                        Some((rule, rest)) => (rule, members(rest)),
                        None => (Rule::Mean, members(rest)),
                    };
                let members = members.into_iter().map(str::parse).collect::<Result<Vec<JudgeSpec>>>()?;
                if members.len() < 2 || members.iter().any(|member| matches!(member, JudgeSpec::Ensemble { .. })) {
                    let expected = "ensemble:[mean:|max:|vote:]SPEC,SPEC with two judges or more, none an ensemble";
                    return Err(Error::Usage(format!("--judge: expected {expected}, found `{text}`")));
                }
                Ok(JudgeSpec::Ensemble { rule, members })
            }
            Some(("lexicon", file)) if !file.is_empty() => Ok(JudgeSpec::Lexicon(file.into())),
            _ => {
                let expected = "model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC";
                Err(Error::Usage(format!("--judge: expected {expected}, found `{text}`")))
            }
        }
    }
}

/// Cuts at each comma behind which another judge begins.
fn members(text: &str) -> Vec<&str> {
    const KINDS: [&str; 5] = ["model:", "guard:", "cmd:", "lexicon:", "ensemble:"];
    let begins = |at: &usize| KINDS.iter().any(|kind| text[at + 1..].starts_with(kind));
    let commas: Vec<usize> = text.match_indices(',').map(|(at, _)| at).filter(begins).collect();
    let starts = std::iter::once(0).chain(commas.iter().map(|at| at + 1));
    starts.zip(commas.iter().copied().chain([text.len()])).map(|(from, to)| &text[from..to]).collect()
}

/// What stands before the last comma, and after it. A folder whose name holds one is that folder.
pub(crate) fn with_more(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(',') {
        Some((before, after)) if !before.is_empty() && !after.is_empty() && !Path::new(text).is_dir() => {
            (before, Some(after))
        }
        _ => (text, None),
    }
}

impl JudgeSpec {
    /// The folders and files that it is read from.
    pub(crate) fn places(&self) -> Vec<&Path> {
        match self {
            JudgeSpec::Model { dir: place, .. } | JudgeSpec::Lexicon(place) => vec![place],
            JudgeSpec::Guard { model, form } => model.places().into_iter().chain(form.as_deref()).collect(),
            // The program itself, where it is named by a path, and a script among its arguments.
            JudgeSpec::Ensemble { members, .. } => members.iter().flat_map(JudgeSpec::places).collect(),
            JudgeSpec::Program(words) => words.iter().map(Path::new).filter(|word| word.is_file()).collect(),
        }
    }

    /// Opens the judge, to say what is harmful.
    pub fn open<B: Ops>(&self, ops: &B, batch_tokens: usize, interrupt: &Arc<AtomicBool>) -> Result<Box<dyn Judge>> {
        self.open_for(ops, Question::Harm, batch_tokens, interrupt)
    }

    /// Opens the judge, to say what `question` asks. Only a guard knows the difference: another judge of refusals was made for that.
    pub(crate) fn open_for<B: Ops>(
        &self,
        ops: &B,
        question: Question,
        batch_tokens: usize,
        interrupt: &Arc<AtomicBool>,
    ) -> Result<Box<dyn Judge>> {
        let interrupt = interrupt.clone();
        Ok(match self {
            JudgeSpec::Model { dir, label } => {
                Box::new(Classifier::open(ops, dir, label.as_deref(), batch_tokens, interrupt)?)
            }
            JudgeSpec::Guard { model, form } => {
                Box::new(Guard::open(ops, model, form.as_deref(), question, batch_tokens, interrupt)?)
            }
            JudgeSpec::Program(words) => Box::new(Program::open(words, interrupt)?),
            JudgeSpec::Ensemble { rule, members } => {
                let open = |member: &JudgeSpec| member.open_for(ops, question, batch_tokens, &interrupt);
                Box::new(Ensemble::new(*rule, members.iter().map(open).collect::<Result<_>>()?))
            }
            JudgeSpec::Lexicon(file) => Box::new(Lexicon::open(file)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;

    #[test]
    fn what_is_typed_is_what_is_shown() {
        for text in [
            "model:a",
            "model:a,unsafe",
            "guard:a",
            "guard:a+b,form.toml",
            "cmd:python3 judge.py 5",
            "lexicon:x.json",
            "ensemble:max:model:a,unsafe,guard:b,form.toml,lexicon:x.json",
        ] {
            assert_eq!(String::from(text.parse::<JudgeSpec>().unwrap()), text);
        }
        let mean = "ensemble:model:a,cmd:b c".parse::<JudgeSpec>().unwrap();
        assert_eq!(String::from(mean.clone()), "ensemble:mean:model:a,cmd:b c");
        assert_eq!(mean.places(), [Path::new("a")]);
        for text in ["", "model:", "guard:", "cmd: ", "lexicon:", "oracle:x"] {
            refused(text.parse::<JudgeSpec>(), "expected model:DIR");
        }
        for text in ["ensemble:", "ensemble:model:a", "ensemble:vote:model:a,ensemble:model:b,model:c"] {
            assert!(text.parse::<JudgeSpec>().is_err(), "{text}");
        }
    }
}
