//! How a language model is asked to write, and between which marks: a small TOML file, built in for models that chat.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Task, Told, Way};
use crate::error::{Error, Result};
use crate::text::input::read_text;

/// A model's own form, in its folder.
const OWN: &str = "attacker.toml";
const BUILT_IN: &str = include_str!("chat.toml");
const REMEDY: &str = "correct the form of the attacker; src/attacker/chat.toml shows how one is written";
const FIELDS: [&str; 10] =
    ["goal", "request", "persona", "tactic", "example", "parent", "mate", "elites", "p_harm", "margin"];

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Form {
    /// The model's turn is made to begin with this.
    pub(super) open: String,
    /// The prompt ends before this.
    pub(super) close: String,
    #[serde(default = "tokens")]
    pub(super) max_new_tokens: usize,
    #[serde(default = "one")]
    pub(super) temperature: f32,
    #[serde(default = "most")]
    pub(super) top_p: f32,
    ask: BTreeMap<Way, String>,
}

fn tokens() -> usize {
    512
}

fn one() -> f32 {
    1.0
}

fn most() -> f32 {
    0.9
}

impl Form {
    /// The form in `file`, else the one that lies in `dir` as attacker.toml, else the built-in one. Returns its text, too.
    pub(super) fn find(dir: &Path, file: Option<&Path>) -> Result<(Form, String)> {
        let own = dir.join(OWN);
        match file.or_else(|| own.exists().then_some(own.as_path())) {
            Some(file) => {
                let text = read_text(file)?;
                Ok((Form::parse(&text, file)?, text))
            }
            None => Ok((Form::parse(BUILT_IN, Path::new("chat.toml"))?, BUILT_IN.to_string())),
        }
    }

    /// `file` names the text in messages.
    pub(crate) fn parse(text: &str, file: &Path) -> Result<Form> {
        let wrong = |found: String| Error::file(file, "the form of an attacker", REMEDY)(found);
        let form: Form = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if form.open.trim().is_empty() || form.close.trim().is_empty() {
            return Err(wrong("an empty `open` or `close`".into()));
        }
        let sampled = form.temperature.is_finite() && form.temperature >= 0.0 && form.top_p > 0.0 && form.top_p <= 1.0;
        if !sampled || !(1..=1 << 20).contains(&form.max_new_tokens) {
            let (tokens, temperature, top_p) = (form.max_new_tokens, form.temperature, form.top_p);
            return Err(wrong(format!("max_new_tokens = {tokens}, temperature = {temperature}, top_p = {top_p}")));
        }
        if form.ask.is_empty() {
            return Err(wrong("none of write, rephrase, retarget and cross under [ask]".into()));
        }
        for (way, text) in &form.ask {
            let name = way.name();
            if let Some(unknown) = pieces(text).find_map(|(_, name)| name.filter(|name| !FIELDS.contains(name))) {
                return Err(wrong(format!("{{{unknown}}} in `{name}`, where {} are known", FIELDS.join(", "))));
            }
            let needs: &[&str] = match way {
                Way::Cross => &["parent", "mate"],
                Way::Rephrase => &["parent"],
                Way::Retarget => &["parent", "request"],
                Way::Write => &["request"],
            };
            let holds = |field: &str| pieces(text).any(|(_, name)| name == Some(field));
            let either = |field: &str| holds(field) || (field == "request" && (holds("goal") || holds("example")));
            if let Some(missing) = needs.iter().find(|field| !either(field)) {
                return Err(wrong(format!("a `{name}` without {{{missing}}}")));
            }
        }
        Ok(form)
    }

    /// What it has words for.
    pub(super) fn ways(&self) -> Vec<Way> {
        self.ask.keys().copied().collect()
    }

    /// The instruction for the model; empty where the form has none for this way.
    pub(crate) fn told(&self, task: &Task) -> String {
        let text = self.ask.get(&task.way).map_or("", String::as_str);
        let mut out = String::new();
        for (plain, name) in pieces(text) {
            out.push_str(plain);
            name.iter().for_each(|name| out.push_str(&field(task, name)));
        }
        out
    }

    /// What stands between the marks of an answer: `None` where the second is missing.
    pub(crate) fn between<'a>(&self, answer: &'a str) -> Option<&'a str> {
        let answer = answer.trim_start();
        let inside = answer.strip_prefix(self.open.trim()).unwrap_or(answer);
        inside.split_once(self.close.trim()).map(|(prompt, _)| prompt.trim())
    }
}

fn field(task: &Task, name: &str) -> String {
    let prompt = |told: &Option<Told>| told.as_ref().map_or_else(String::new, |told| told.prompt.clone());
    let number =
        |of: fn(&Told) -> f64| task.parent.as_ref().map_or_else(String::new, |told| format!("{:.2}", of(told)));
    match name {
        "goal" => task.goal.clone(),
        "request" => task.request.clone(),
        "persona" => task.persona.clone(),
        "tactic" => task.tactic.clone(),
        "example" => task.example.clone(),
        "parent" => prompt(&task.parent),
        "mate" => prompt(&task.mate),
        "elites" => task.elites.join("\n"),
        "p_harm" => number(|told| told.p_harm),
        _ => number(|told| told.margin),
    }
}

/// Texts, each with the name in braces behind it; braces around anything but a name are text.
fn pieces(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let left = rest?;
        let name = |(at, _): (usize, &str)| {
            let (inside, _) = left[at + 1..].split_once('}')?;
            let named = !inside.is_empty() && inside.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            named.then_some((at, inside))
        };
        match left.match_indices('{').find_map(name) {
            Some((at, inside)) => {
                rest = Some(&left[at + inside.len() + 2..]);
                Some((&left[..at], Some(inside)))
            }
            None => {
                rest = None;
                Some((left, None))
            }
        }
    })
}

/// Whether a text holds a placeholder of a form or of a grammar.
pub(super) fn placeholder(text: &str) -> bool {
    pieces(text).any(|(_, name)| name.is_some_and(|name| FIELDS.contains(&name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;

    fn task(way: Way) -> Task {
        let told = |prompt: &str| Some(Told { prompt: prompt.into(), p_harm: 0.75, margin: -1.5 });
        Task {
            way,
            goal: "G {parent}".into(),
            request: "R".into(),
            persona: "P".into(),
            tactic: "T".into(),
            example: "E".into(),
            parent: told("A"),
            mate: told("B"),
            elites: vec!["X".into(), "Y".into()],
            number: 0,
        }
    }

    #[test]
    fn placeholders_are_filled_once_and_other_braces_stay() {
        let parse = |text: &str| Form::parse(text, Path::new("a.toml"));
        let form = "open = '<p>'\nclose = '</p>'\n[ask]\nwrite = '{goal} {request}{x {elites} {} {p_harm} {margin}'";
        let told = parse(form).unwrap().told(&task(Way::Write));
        assert_eq!(told, "G {parent} R{x X\nY {} 0.75 -1.50");
        let built_in = Form::find(Path::new("/nowhere"), None).unwrap().0;
        assert_eq!(built_in.ways(), Way::ALL);
        for way in Way::ALL {
            let told = built_in.told(&task(way));
            assert!(!told.is_empty() && !placeholder(&told.replace("G {parent}", "")), "{told}");
        }
        for (text, reason) in [
            ("open = ''\nclose = 'b'\n[ask]\nwrite = '{request}'", "empty `open`"),
            ("open = 'a'\nclose = 'b'\ntop_p = 0.0\n[ask]\nwrite = '{request}'", "top_p = 0"),
            ("open = 'a'\nclose = 'b'\ntemperature = nan\n[ask]\nwrite = '{request}'", "temperature = NaN"),
            ("open = 'a'\nclose = 'b'\n[ask]\nwrite = '{request} {wish}'", "{wish} in `write`"),
            ("open = 'a'\nclose = 'b'\n[ask]\nwrite = 'please'", "a `write` without {request}"),
            ("open = 'a'\nclose = 'b'\n[ask]\ncross = '{parent}'", "a `cross` without {mate}"),
            ("open = 'a'\nclose = 'b'\n[ask]\ncompose = '{request}'", "unknown variant `compose`"),
            ("open = 'a'\nclose = 'b'\n[ask]\n", "none of write"),
            ("open = 'a'\n[ask]\nwrite = '{request}'", "close"),
        ] {
            refused(parse(text), reason);
        }
    }

    #[test]
    fn a_prompt_stands_between_its_marks() {
        let form = Form::find(Path::new("/nowhere"), None).unwrap().0;
        let (open, close) = (form.open.trim(), form.close.trim());
        let between = |text: &str| form.between(text).map(str::to_string);
        assert_eq!(between(&format!("{open} a b {close} That was it.")), Some("a b".into()));
        assert_eq!(between(&format!("a{close}{close}")), Some("a".into()));
        assert_eq!(between(&format!("{open}{close}")), Some(String::new()));
        assert_eq!(between(&format!("{open} I cannot help with that.")), None);
    }
}
