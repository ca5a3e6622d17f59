//! Chat templates: Jinja code that came with a model. It is foreign, so it runs on limited fuel and its output is limited too.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

use crate::error::{Error, Result};
use crate::text::Message;
use crate::text::fields::{Fields, brief};

pub(crate) mod clock;
mod json;
#[cfg(test)]
mod tests;

/// Instructions per rendering; the longest real template needs some thousand per turn.
const FUEL: u64 = 20_000_000;
/// Bytes per rendering.
const LONGEST: usize = 16 << 20;
const NAME: &str = "chat_template";

/// Special tokens that a template may name, as tokenizer_config.json and special_tokens_map.json list them.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A model's chat template, behaving as in transformers.
pub(crate) struct Template {
    file: PathBuf,
    environment: Environment<'static>,
    specials: BTreeMap<String, String>,
}

impl Template {
    /// Finds the template of the model in `dir`: chat_template.jinja, else `chat_template` in tokenizer_config.json (a text, or
    /// a list in which one is named `default`). `None` when it has none.
    pub(crate) fn open(dir: &Path) -> Result<Option<Template>> {
        let specials = special_tokens(dir)?;
        let file = dir.join("chat_template.jinja");
        if file.exists() {
            let source = std::fs::read_to_string(&file).map_err(Error::read(&file))?;
            return Template::new(&file, source, specials).map(Some);
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
        Template::new(&file, source, specials).map(Some)
    }

    /// Compiles `source`, which is what `file` holds. Fails if it is no Jinja.
    pub(crate) fn new(file: &Path, source: String, specials: BTreeMap<String, String>) -> Result<Template> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        // Fixed when the model is opened: a run must not change its prompts at midnight.
        let now = clock::now();
        environment.add_function("strftime_now", move |format: &str| clock::format(now, format));
        let broken = Error::file(file, "a chat template in Jinja", "correct the template, or use --raw");
        // Jinja reads every kind of line end as a line feed.
        let source = without_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(NAME, source).map_err(|error| broken(on_one_line(&error)))?;
        Ok(Template { file: file.to_path_buf(), environment, specials })
    }

    /// Renders a conversation, with the beginning of the answer's turn when `add_generation_prompt`. What the template refuses
    /// is that row's error.
    pub(crate) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let place = format!("chat template of {}", self.file.display());
        let row = |expected: &str, found: String| Error::row(&place, expected, found);
        let failed = |error| row("a conversation that it renders", on_one_line(&error));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let none = Value::from(());
        let call = context! { messages, add_generation_prompt, tools => none, documents => none };
        let mut out = Limited(Vec::new());
        template
            .render_captured_to(context! { ..call, ..Value::from_serialize(&self.specials) }, &mut out)
            .map_err(failed)?;
        String::from_utf8(out.0).map_err(|error| row("UTF-8", error.to_string()))
    }

    /// Gets the text of a special token (`eos_token`, …), if the tokenizer has it.
    pub(crate) fn special(&self, key: &str) -> Option<&str> {
        self.specials.get(key).map(String::as_str)
    }
}

/// Output that grows no further than [`LONGEST`].
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST {
            return Err(std::io::Error::other(format!("more than {LONGEST} bytes of text")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// Joins an error and its causes: the innermost says what happened, the rest where.
fn on_one_line(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Finds the template named `default` in a list of `{"name": …, "template": …}`.
fn default_of(list: &serde_json::Value) -> Option<String> {
    let named = |entry: &&serde_json::Value| entry.get("name").and_then(|name| name.as_str()) == Some("default");
    list.as_array()?.iter().find(named)?.get("template")?.as_str().map(str::to_string)
}

fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    // The first file wins, as in transformers.
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let file = dir.join(name);
        if !file.exists() {
            continue;
        }
        let fields = Fields::open(&file)?;
        for key in SPECIAL {
            // Either the text itself or an AddedToken.
            let Some(value) = fields.get(key) else { continue };
            let Some(text) = value.as_str().or_else(|| value.get("content")?.as_str()) else {
                return Err(fields.wrong(key, "a text, or an object with `content`", &brief(value)));
            };
            found.entry(key.to_string()).or_insert_with(|| text.to_string());
        }
    }
    Ok(found)
}

/// Turns `{% generation %}…{% endgeneration %}`, by which transformers marks the assistant's part and which adds no text, into
/// a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let (tag, end) = (&rest[open + 2..open + length], open + length);
        out.push_str(&rest[..open + 2]);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out + rest
}
