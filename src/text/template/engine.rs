//! Jinja as transformers has it.

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::value::merge_maps;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

use super::{Arguments, Conversation, Reply, Source, clock, json};

/// Instructions per rendering; the longest real template needs some thousand per turn.
const FUEL: u64 = 20_000_000;
/// Bytes per rendering.
const LONGEST: usize = 16 << 20;
const NAME: &str = "chat_template";

/// A compiled template. Its errors are texts of one line. What fuel does not count (memory, the parser's depth, loops inside a
/// filter) is bounded by [`super::helper`].
pub(super) struct Engine {
    environment: Environment<'static>,
    specials: BTreeMap<String, String>,
    arguments: Arguments,
}

impl Engine {
    /// Fails if it is no Jinja.
    pub(super) fn compile(source: &Source) -> Reply<Engine> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        let now = source.now;
        environment.add_function("strftime_now", move |format: &str| clock::format(now, format));
        // Jinja reads every kind of line end as a line feed.
        let text = without_generation_tags(&source.text.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(NAME, text).map_err(|error| on_one_line(&error))?;
        Ok(Engine { environment, specials: source.specials.clone(), arguments: source.arguments.clone() })
    }

    /// The conversations of each row, all of a row's or none.
    pub(super) fn render<'a>(&self, rows: &[impl AsRef<[Conversation<'a>]>]) -> Vec<Reply<Vec<String>>> {
        let render = |row: &[Conversation]| row.iter().map(|conversation| self.render_one(conversation)).collect();
        rows.iter().map(|row| render(row.as_ref())).collect()
    }

    fn render_one(&self, (messages, add_generation_prompt): &Conversation) -> Reply<String> {
        let template = self.environment.get_template(NAME).map_err(|error| on_one_line(&error))?;
        let none = Value::from(());
        let call = context! { messages, add_generation_prompt, tools => none, documents => none };
        let given = [Value::from_serialize(&self.arguments), Value::from_serialize(&self.specials)];
        let call = context! { ..call, ..merge_maps(given) };
        let mut out = Limited(Vec::new());
        template.render_captured_to(call, &mut out).map_err(|error| on_one_line(&error))?;
        String::from_utf8(out.0).map_err(|error| error.to_string())
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

/// Turns `{% generation %}…{% endgeneration %}`, by which transformers marks the assistant's part and which adds no text, into
/// a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open + 2..].find("%}") else { break };
        let end = open + 2 + length;
        let tag = &rest[open + 2..end];
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
