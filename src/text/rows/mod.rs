//! Rows in and out: one JSON object each, order kept, fields that nobody knows carried through.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::fields::brief;
use crate::text::{Message, Prompt, Rendering};

mod format;
mod pair;
mod read;
#[cfg(test)]
mod tests;
mod turns;
mod write;

pub(crate) use format::Format;
pub use pair::Preference;
pub(crate) use read::RowReader;
#[cfg(test)]
pub(crate) use read::parse;
pub use read::read;
pub(crate) use read::read_told;
pub(crate) use write::RowWriter;

/// Where a prompt may stand, the first that a row has counts. JailbreakBench's `Behavior` is a title, its `Goal` the prompt;
/// WildJailbreak has the plain request where there is no adversarial one.
const PROMPT: [&str; 11] = [
    "prompt",
    "messages",
    "Goal",
    "goal",
    "forbidden_prompt",
    "Behavior",
    "instruction",
    "input",
    "question",
    "adversarial",
    "vanilla",
];
/// Where an answer may stand: `output` is garak's, `completion` XSTest's and TRL's, `target_response` JailbreakBench's.
const RESPONSE: [&str; 4] = ["response", "output", "completion", "target_response"];

/// One row. A line that was no row is kept as one whose accessors all give that error, so that it comes out as an error row in
/// its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    file: Arc<str>,
    /// The line it begins on, counted from 1.
    pub(crate) line: usize,
    /// All fields, in order.
    pub object: Map<String, Value>,
    fault: Option<(String, String)>,
    /// Told by `--as`; else the columns say it.
    told: Option<Format>,
}

/// What is scored: an answer as text, or ids as they are.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Exchange {
    Text {
        prompt: Prompt,
        answer: String,
    },
    /// `prompt_len` is 0 where the row does not say it.
    Tokens {
        tokens: Vec<u32>,
        prompt_len: usize,
    },
}

impl Row {
    /// `file` is named in errors.
    pub(crate) fn new(file: &Arc<str>, line: usize, object: Map<String, Value>) -> Row {
        Row { file: file.clone(), line, object, fault: None, told: None }
    }

    /// Takes the row for one of `format`; one that lacks its columns is no row.
    fn told(mut self, format: Option<Format>) -> Row {
        self.told = format;
        let lacks = |format: &Format| format.columns().iter().any(|column| !self.object.contains_key(*column));
        if self.fault.is_none()
            && let Some(format) = format.filter(lacks)
        {
            let (expected, found) = (format!("the columns of {format} ({})", format.columns().join(", ")), self.keys());
            self.fail(&self.wrong(&expected, &found));
            self.fault = Some((expected, found));
        }
        self
    }

    /// Whose list or set the row is of, where that is known.
    pub(crate) fn format(&self) -> Option<Format> {
        self.told.or_else(|| Format::of(&self.object))
    }

    fn broken(file: &Arc<str>, line: usize, expected: &str, found: String) -> Row {
        let mut row = Row::new(file, line, Map::new());
        row.fail(&row.wrong(expected, &found));
        Row { fault: Some((expected.to_string(), found)), ..row }
    }

    /// Why the line is no row, if it is none.
    pub(crate) fn fault(&self) -> Option<Error> {
        self.fault.as_ref().map(|(expected, found)| self.wrong(expected, found))
    }

    /// The row itself; with `strict` an error where it is none.
    pub(crate) fn checked(self, strict: bool) -> Result<Row> {
        match self.fault() {
            Some(error) if strict => Err(error),
            _ => Ok(self),
        }
    }

    /// Puts `error` and `line` into the row: what becomes of a row that could not be worked on.
    pub(crate) fn fail(&mut self, error: &Error) {
        self.object.insert("line".into(), self.line.into());
        self.object.insert("error".into(), error.to_string().into());
    }

    /// Adds a field after the others, or replaces it in its place.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.object.insert(key.to_string(), value.into());
    }

    /// An error of this row.
    pub(crate) fn wrong(&self, expected: &str, found: &str) -> Error {
        Error::row(&self.place(), expected, found)
    }

    /// The last part of the file's path.
    pub(crate) fn file_name(&self) -> &str {
        self.file.rsplit(['/', '\\']).next().unwrap_or_default()
    }

    /// `file, line n`.
    pub fn place(&self) -> String {
        format!("{}, line {}", self.file, self.line)
    }

    /// The error of something done with this row, with the row's place put before it.
    pub(crate) fn placed(&self, error: Error) -> Error {
        match error {
            Error::Row { place, expected, found } if !place.starts_with(&*self.file) => {
                Error::Row { place: format!("{}: {place}", self.place()), expected, found }
            }
            other => other,
        }
    }

    /// The field, unless it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Result<Option<&Value>> {
        match self.fault() {
            Some(error) => Err(error),
            None => Ok(self.object.get(key).filter(|value| !value.is_null())),
        }
    }

    /// The error of a field that is something else than `expected`.
    pub(crate) fn type_error(&self, key: &str, expected: &str, value: &Value) -> Error {
        self.wrong(&format!("`{key}` to be {expected}"), &brief(value))
    }

    /// A text that must be there.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.opt_text(key)?.ok_or_else(|| self.wrong(&format!("a field `{key}`"), "none"))
    }

    /// A text that may be there.
    pub(crate) fn opt_text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.type_error(key, "a text", value))
    }

    /// A finite number that may be there; CSV columns hold numbers as text.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        if value.as_str().is_some_and(|text| text.trim().is_empty()) {
            return Ok(None);
        }
        let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|n| n.is_finite());
        number.map(Some).ok_or_else(|| self.type_error(key, "a number", value))
    }

    /// Token ids that may be there.
    pub(crate) fn ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = value.as_array().and_then(|list| list.iter().map(id).collect());
        ids.map(Some).ok_or_else(|| self.type_error(key, "a list of token ids", value))
    }

    /// What the row is called in messages: its `id`, else its line.
    pub(crate) fn name(&self) -> String {
        match self.object.get("id") {
            Some(Value::String(id)) => format!("`{id}` ({})", self.place()),
            Some(Value::Number(id)) => format!("`{id}` ({})", self.place()),
            _ => self.place(),
        }
    }

    /// What is asked: `tokens`, or `prompt` or `messages`, or what other lists of prompts call it. With `raw`, a text is taken as
    /// it stands. Never empty. A row with ids *and* a text is refused, as nothing here can tell whether they agree.
    pub fn prompt(&self, raw: bool) -> Result<Prompt> {
        self.prompt_for(raw, None)
    }

    /// [`Row::prompt`] for a model: ids and a text may stand side by side if `rendering` makes these ids of the text.
    pub(crate) fn prompt_for(&self, raw: bool, rendering: Option<&Rendering>) -> Result<Prompt> {
        let Some(ids) = self.ids("tokens")? else {
            let none = || self.wrong("`prompt`, `messages` or `tokens`", &self.keys());
            return self.written_prompt(raw)?.ok_or_else(none);
        };
        if ids.is_empty() {
            return Err(self.wrong("a prompt", "an empty list of tokens"));
        }
        self.check_agreement(raw, rendering, |written| written == ids)?;
        Ok(Prompt::Tokens(ids))
    }

    /// The prompt as text or messages, if there is one, whatever `tokens` say.
    fn written_prompt(&self, raw: bool) -> Result<Option<Prompt>> {
        for key in PROMPT {
            let nothing = |value: &&Value| key == "adversarial" && value.as_str() == Some("");
            if let Some(value) = self.get(key)?.filter(|value| !nothing(value)) {
                return self.as_prompt(key, value, raw).map(Some);
            }
        }
        Ok(None)
    }

    /// Fails if the row has a text beside its `tokens`, unless `rendering` makes ids of it that agree with them.
    fn check_agreement(&self, raw: bool, rendering: Option<&Rendering>, agree: impl Fn(&[u32]) -> bool) -> Result<()> {
        let Some(written) = self.written_prompt(raw)? else { return Ok(()) };
        match rendering {
            None => Err(self.wrong("a prompt either as text or as `tokens`", "both")),
            Some(rendering) if agree(&rendering.prompt_tokens(&written)?) => Ok(()),
            Some(_) => Err(self.wrong("`tokens` to be those of the prompt that stands beside them", "others")),
        }
    }

    fn as_prompt(&self, key: &str, value: &Value, raw: bool) -> Result<Prompt> {
        let prompt = match value.as_str() {
            Some(text) => {
                let text = self.with_context(key, text)?;
                if raw { Prompt::Raw(text) } else { Prompt::user(text) }
            }
            None => Prompt::Chat(self.turns(key, value)?),
        };
        let empty = match &prompt {
            Prompt::Chat(_) if raw => {
                return Err(self.wrong(&format!("`{key}` to be a text, as --raw uses no template"), "messages"));
            }
            Prompt::Chat(turns) => turns.iter().all(|turn| turn.content.trim().is_empty()),
            prompt => prompt.text().is_empty(),
        };
        if empty { Err(self.wrong("a prompt", "an empty text")) } else { Ok(prompt) }
    }

    /// HarmBench puts a contextual behaviour's context before it; an instruction may come with its input.
    fn with_context(&self, key: &str, text: &str) -> Result<String> {
        let present = |text: &&str| !text.trim().is_empty();
        let whole = match key {
            "Behavior" => {
                let context = self.opt_text("ContextString")?.filter(present);
                context.map(|context| format!("{context}\n\n---\n\n{text}"))
            }
            "instruction" => {
                let instance = self.get("instances")?.and_then(|list| list.get(0)?.get("input")?.as_str());
                self.opt_text("input")?.or(instance).filter(present).map(|input| format!("{text}\n\n{input}"))
            }
            _ => None,
        };
        Ok(whole.unwrap_or_else(|| text.to_string()))
    }

    /// The answer, if the row has one.
    pub(crate) fn response(&self) -> Result<Option<String>> {
        for key in RESPONSE {
            if let Some(value) = self.get(key)? {
                return turns::content(value).map(Some).ok_or_else(|| self.type_error(key, "a text", value));
            }
        }
        Ok(None)
    }

    /// HarmBench's requests for copyrighted text: hashes of that text decide whether an answer reproduces it, no judge does.
    pub(crate) fn is_judged_by_hashes(&self) -> bool {
        let tags = self.object.get("Tags").and_then(Value::as_str);
        self.format() == Some(Format::HarmBench) && tags.is_some_and(|tags| tags.contains("hash_check"))
    }

    /// The answer to hold others against: the row's own, or the first that an evals sample calls `ideal`.
    pub(crate) fn reference(&self) -> Result<Option<String>> {
        let ideal = self.get("ideal")?.filter(|_| self.format() == Some(Format::Evals));
        match ideal.map(|ideal| ideal.get(0).unwrap_or(ideal)) {
            Some(ideal) => ideal
                .as_str()
                .map(|text| Some(text.to_string()))
                .ok_or_else(|| self.type_error("ideal", "a text", ideal)),
            None => self.response(),
        }
    }

    /// What is asked, and the answer if the row has one: `response`, or what others call it, or the assistant's turn that ends
    /// `messages`.
    pub(crate) fn asked(&self, raw: bool, rendering: Option<&Rendering>) -> Result<(Prompt, Option<String>)> {
        let prompt = self.prompt_for(raw, rendering)?;
        let answer = self.response()?;
        match prompt {
            Prompt::Chat(mut turns)
                if answer.is_none() && turns.len() > 1 && turns.last().is_some_and(|turn| turn.role == "assistant") =>
            {
                let answer = turns.pop().map(|turn| turn.content);
                Ok((Prompt::Chat(turns), answer))
            }
            prompt => Ok((prompt, answer)),
        }
    }

    /// Prompt and answer, both of which must be there.
    pub(crate) fn answered(&self, raw: bool) -> Result<(Prompt, String)> {
        let (prompt, answer) = self.asked(raw, None)?;
        let answer = answer.map_or_else(|| self.reference(), |answer| Ok(Some(answer)))?;
        let none = || self.wrong("`response`, or `messages` that end with the assistant's", &self.keys());
        Ok((prompt, answer.ok_or_else(none)?))
    }

    /// Prompt and answer for a model: `tokens` (with `prompt_tokens`, their number or the ids themselves), or what
    /// [`Row::answered`] reads.
    pub(crate) fn exchange(&self, raw: bool, rendering: Option<&Rendering>) -> Result<Exchange> {
        let Some(tokens) = self.ids("tokens")? else {
            let (prompt, answer) = self.answered(raw)?;
            return Ok(Exchange::Text { prompt, answer });
        };
        let prompt_len = self.prompt_len(&tokens)?;
        self.check_agreement(raw, rendering, |prompt| match prompt_len {
            0 => tokens.starts_with(prompt),
            len => tokens[..len] == *prompt,
        })?;
        Ok(Exchange::Tokens { tokens, prompt_len })
    }

    fn prompt_len(&self, tokens: &[u32]) -> Result<usize> {
        let Some(value) = self.get("prompt_tokens")? else { return Ok(0) };
        let length = match value.as_u64() {
            Some(length) => usize::try_from(length).ok(),
            None => self.ids("prompt_tokens")?.filter(|ids| tokens.starts_with(ids)).map(|ids| ids.len()),
        };
        let expected = format!("the number of the first of the {} `tokens`, or these ids", tokens.len());
        length
            .filter(|length| *length <= tokens.len())
            .ok_or_else(|| self.type_error("prompt_tokens", &expected, value))
    }

    /// Messages from a list of `{role, content}` or `{from, value}`, or from garak's `{turns}`.
    fn turns(&self, key: &str, value: &Value) -> Result<Vec<Message>> {
        turns::messages(value)
            .ok_or_else(|| self.type_error(key, "a text, or a list of messages with role and content", value))
    }

    fn keys(&self) -> String {
        let keys: Vec<&str> = self.object.keys().map(String::as_str).take(12).collect();
        if keys.is_empty() { "an empty row".into() } else { format!("only {}", keys.join(", ")) }
    }
}
