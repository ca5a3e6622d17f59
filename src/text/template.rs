//! Chat templates: Jinja code that came with a model. It is foreign, so the program runs it in a process apart, on limited fuel,
//! memory and time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use self::engine::Engine;
pub use self::helper::isolate_templates;
use self::helper::{Helper, Started};
use crate::error::{Error, Result};
use crate::text::Message;
use crate::text::fields::{Fields, brief};
use crate::text::input::read_text;

pub(crate) mod clock;
mod engine;
mod helper;
mod json;
#[cfg(test)]
mod tests;

/// A model's chat template, behaving as in transformers.
pub(crate) struct Template {
    file: PathBuf,
    text: String,
    runner: Runner,
}

/// What a model's file says, and what its template may name.
#[derive(Debug, Serialize, Deserialize)]
struct Source {
    text: String,
    specials: BTreeMap<String, String>,
    arguments: Arguments,
    /// Seconds since 1970. Fixed when the model is opened: a run must not change its prompts at midnight.
    now: u64,
}

/// What a template is given beside a conversation.
pub(crate) type Arguments = BTreeMap<String, serde_json::Value>;

/// `NAME=VALUE`, as typed; the value is JSON where it can be read as such, else a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Argument(String);

impl FromStr for Argument {
    type Err = String;

    fn from_str(text: &str) -> Result<Argument, String> {
        let name = text.split_once('=').map_or("", |(name, _)| name);
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if is_name { Ok(Argument(text.to_string())) } else { Err("expected NAME=VALUE".to_string()) }
    }
}

/// What was typed, by name; of one that was typed twice the last.
pub(crate) fn arguments(typed: &[Argument]) -> Arguments {
    let parts = typed.iter().filter_map(|argument| argument.0.split_once('='));
    parts
        .map(|(name, value)| (name.to_string(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
        .collect()
}

/// A conversation, and whether the beginning of the answer's turn is to follow it.
pub(crate) type Conversation<'a> = (Cow<'a, [Message]>, bool);

/// What came of it, or why nothing did, on one line.
type Reply<T> = Result<T, String>;

/// Where a template runs.
enum Runner {
    /// In this process: where the program is not what has opened the model (tests, say), and no helper can be started.
    Here(Box<Engine>),
    Apart(Helper),
}

impl Template {
    /// Finds the template of the model in `dir`: chat_template.jinja, else `chat_template` in tokenizer_config.json (a text, or
    /// a list in which one is named `default`). `None` when it has none.
    pub(crate) fn open(
        dir: &Path,
        specials: BTreeMap<String, String>,
        arguments: &Arguments,
    ) -> Result<Option<Template>> {
        let file = dir.join("chat_template.jinja");
        if file.exists() {
            let source = read_text(&file)?;
            return Template::new(&file, source, specials, arguments).map(Some);
        }
        let file = dir.join("tokenizer_config.json");
        if !file.exists() {
            return Ok(None);
        }
        let config = Fields::open(&file)?;
        let source = match config.get("chat_template") {
            None => return Ok(None),
            Some(serde_json::Value::String(source)) => source.clone(),
            Some(list) => default_of(list).ok_or_else(|| {
                config.wrong("chat_template", "a text, or a list with one named `default`", &brief(list))
            })?,
        };
        Template::new(&file, source, specials, arguments).map(Some)
    }

    /// Compiles `text`, which is what `file` holds. Fails if it is no Jinja, or cannot be compiled within the bounds.
    pub(crate) fn new(
        file: &Path,
        text: String,
        specials: BTreeMap<String, String>,
        arguments: &Arguments,
    ) -> Result<Template> {
        let broken = Error::file(file, "a chat template in Jinja", "correct the template, or use --raw");
        let arguments = arguments.clone();
        let source = Source { text: text.clone(), specials, arguments, now: clock::now() };
        let runner = match Helper::start(source)? {
            Started::Unavailable(source) => Engine::compile(&source).map(|engine| Runner::Here(Box::new(engine))),
            Started::Refused(why) => Err(why),
            Started::Ready(helper) => Ok(Runner::Apart(helper)),
        };
        Ok(Template { file: file.to_path_buf(), text, runner: runner.map_err(broken)? })
    }

    /// Renders the conversations of each row, all of a row's or none: what the template refuses is that row's error.
    pub(crate) fn render(&self, rows: &[&[Conversation]]) -> Vec<Result<Vec<String>>> {
        let rendered = match &self.runner {
            Runner::Here(engine) => engine.render(rows),
            Runner::Apart(helper) => helper.render(rows),
        };
        let place = || format!("chat template of {}", self.file.display());
        let refused = |found: String| Error::row(&place(), "a conversation that it renders", found);
        rendered.into_iter().map(|texts| texts.map_err(refused)).collect()
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

/// Finds the template named `default` in a list of `{"name": …, "template": …}`.
fn default_of(list: &serde_json::Value) -> Option<String> {
    let named = |entry: &&serde_json::Value| entry.get("name").and_then(|name| name.as_str()) == Some("default");
    list.as_array()?.iter().find(named)?.get("template")?.as_str().map(str::to_string)
}
