//! How a guard is asked and what it can say: a small TOML file, built in for the guards that people use.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::text::input::read_text;

/// A guard's own form, in its folder.
const OWN: &str = "guard.toml";
const PROMPT: &str = "{prompt}";
const RESPONSE: &str = "{response}";
const REMEDY: &str =
    "correct the form of the guard; the built-in ones in src/judge/guard/forms show how they are written";

/// Name and text of those that are built in.
pub(crate) const BUILT_IN: [(&str, &str); 6] = [
    ("harmbench-llama-2", include_str!("forms/harmbench-llama-2.toml")),
    ("harmbench-mistral", include_str!("forms/harmbench-mistral.toml")),
    ("llama-guard", include_str!("forms/llama-guard.toml")),
    ("md-judge-v0.1", include_str!("forms/md-judge-v0.1.toml")),
    ("qwen3guard", include_str!("forms/qwen3guard.toml")),
    ("wildguard", include_str!("forms/wildguard.toml")),
];

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Form {
    /// A model whose folder's name holds one of these, in lower case, is asked so.
    #[serde(default)]
    names: Vec<String>,
    /// The text that asks, with `{prompt}` and `{response}`; without one the model's own chat template is asked about the conversation.
    template: Option<String>,
    /// What the chat template is given beside the conversation.
    #[serde(default)]
    pub(super) arguments: BTreeMap<String, serde_json::Value>,
    /// The chat template begins the guard's turn when told to.
    #[serde(default)]
    pub(super) generation_prompt: bool,
    /// What the tokenizer puts around every text stands around `template`.
    #[serde(default)]
    pub(super) around: bool,
    /// Tokens; the model's own limit where it is less.
    #[serde(default = "unlimited")]
    pub(super) context: usize,
    /// A row whose verdicts leave more than this to other texts is an error row.
    #[serde(default = "tenth")]
    pub(super) uncovered: f64,
    #[serde(rename = "verdict")]
    pub(super) verdicts: Vec<Verdict>,
}

/// One thing that a guard can say, in all its spellings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Verdict {
    pub(super) texts: Vec<String>,
    /// 1 where it calls the answer harmful, 0 where safe.
    pub(super) harmful: f64,
    /// 1 where it calls the answer a refusal, if it says so.
    pub(super) refusal: Option<f64>,
}

fn unlimited() -> usize {
    usize::MAX
}

fn tenth() -> f64 {
    0.1
}

impl Form {
    /// The form in `file`, else the one that lies in `dir` as guard.toml, else the built-in one for the model in `dir`. Returns its
    /// text too. Fails where none is known.
    pub(super) fn find(dir: &Path, file: Option<&Path>) -> Result<(Form, String)> {
        let own = dir.join(OWN);
        if let Some(file) = file.or_else(|| own.exists().then_some(own.as_path())) {
            let text = read_text(file)?;
            return Ok((Form::parse(&text, file)?, text));
        }
        let folder = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().to_lowercase());
        for (name, text) in BUILT_IN {
            let form = Form::parse(text, Path::new(name))?;
            if form.names.iter().any(|name| folder.contains(name)) {
                return Ok((form, text.to_string()));
            }
        }
        let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
        let known = known.join(", ");
        let expected = format!("the folder of a guard that is known by its name ({known}), or that holds a {OWN}");
        Err(Error::file(dir, &expected, "write its form into a file: guard:DIR,FORM")(folder))
    }

    /// `file` names the text in messages.
    pub(crate) fn parse(text: &str, file: &Path) -> Result<Form> {
        let wrong = |found: String| Error::file(file, "the form of a guard", REMEDY)(found);
        let form: Form = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        for field in [PROMPT, RESPONSE] {
            if form.template.as_ref().is_some_and(|template| template.matches(field).count() != 1) {
                return Err(wrong(format!("a template in which {field} does not stand once")));
            }
        }
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let good = |v: &Verdict| share(v.harmful) && v.refusal.is_none_or(share) && !v.texts.is_empty();
        match form.verdicts.iter().position(|verdict| !good(verdict)) {
            _ if !share(form.uncovered) => Err(wrong(format!("uncovered = {}", form.uncovered))),
            _ if form.verdicts.len() < 2 => Err(wrong(format!("{} verdicts", form.verdicts.len()))),
            Some(at) => Err(wrong(format!("verdict {}, which lacks texts or has a weight beyond 0 to 1", at + 1))),
            None => Ok(form),
        }
    }

    /// The text that asks about an answer, where there is a template.
    pub(crate) fn ask(&self, prompt: &str, response: &str) -> Option<String> {
        let (before, rest) = self.template.as_ref()?.split_once(PROMPT)?;
        let (between, after) = rest.split_once(RESPONSE)?;
        Some([before, prompt, between, response, after].concat())
    }

    /// What of the asking text must not be said by whom it asks about: marks in brackets, whole lines that end in a colon.
    pub(crate) fn literals(&self, chat_template: &str) -> Vec<String> {
        let text = self.template.as_deref().unwrap_or(chat_template);
        // A chat template is code: its marks stand in quotes.
        let words = text.split(|c: char| c.is_whitespace() || matches!(c, '\'' | '"' | '{' | '}' | '(' | ')'));
        let mut found: Vec<String> = words.flat_map(marks).map(str::to_string).collect();
        if self.template.is_some() {
            let line =
                |line: &str| (line.len() > 3 && line.ends_with(':') && !line.contains('{')).then(|| line.to_string());
            found.extend(text.lines().filter_map(line));
            // `<END CONVERSATION>` holds a blank.
            found.extend(text.lines().filter(|line| line.starts_with('<') && line.ends_with('>')).map(str::to_string));
        }
        found.sort();
        found.dedup();
        found
    }
}

/// What stands in angle or square brackets in a word, brackets included: `<|end|>`, `[/INST]`, `<<SYS>>`.
fn marks(word: &str) -> Vec<&str> {
    let (mut found, mut rest) = (Vec::new(), word);
    while let Some(open) = rest.find(['<', '[']) {
        let inside = &rest[open..];
        let Some(close) = inside.find(['>', ']']) else { break };
        let end = close + inside[close..].chars().take_while(|c| matches!(c, '>' | ']')).count();
        if inside[..end].chars().any(char::is_alphabetic) {
            found.push(&inside[..end]);
        }
        rest = &inside[end..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;

    #[test]
    fn what_is_built_in_is_found_by_name() {
        for (folder, name) in [
            ("Llama-Guard-3-8B", "llama-guard"),
            ("LlamaGuard-7b", "llama-guard"),
            ("allenai_wildguard", "wildguard"),
            ("HarmBench-Llama-2-13b-cls", "harmbench-llama-2"),
            ("HarmBench-Mistral-7b-val-cls", "harmbench-mistral"),
            ("Qwen3Guard-Gen-0.6B", "qwen3guard"),
            ("MD-Judge-v0.1", "md-judge-v0.1"),
        ] {
            let (_, text) = Form::find(&Path::new("/models").join(folder), None).unwrap();
            assert_eq!(BUILT_IN.iter().find(|(_, own)| *own == text).unwrap().0, name, "{folder}");
        }
        refused(Form::find(Path::new("/models/Qwen2.5-7B"), None), "guard:DIR,FORM");
    }

    #[test]
    fn forms_that_say_too_little_are_refused() {
        let verdicts = "[[verdict]]\nharmful = 1.0\ntexts = [\"a\"]\n[[verdict]]\nharmful = 0.0\ntexts = [\"b\"]\n";
        let parse = |text: &str| Form::parse(text, Path::new("form.toml"));
        assert!(parse(verdicts).is_ok());
        for (text, expected) in [
            ("", "missing field `verdict`"),
            (&*format!("contxt = 5\n{verdicts}"), "contxt"),
            (&*format!("template = 'x'\n{verdicts}"), "{prompt} does not stand once"),
            (&*format!("template = '{{prompt}}'\n{verdicts}"), "{response} does not stand once"),
            (&*format!("uncovered = 2.0\n{verdicts}"), "uncovered = 2"),
            (&verdicts.replace("0.0", "nan"), "verdict 2"),
            (&verdicts.replace("[\"b\"]", "[]"), "verdict 2"),
            (verdicts.split_at(verdicts.rfind("[[").unwrap()).0, "1 verdicts"),
        ] {
            refused(parse(text), expected);
        }
    }

    #[test]
    fn marks_of_the_asking_text_are_known() {
        let form = |name: &str| {
            Form::parse(BUILT_IN.iter().find(|(own, _)| *own == name).unwrap().1, Path::new(name)).unwrap()
        };
        let bracketed = "<</SYS>>,<<SYS>>,Rules:,[/INST],[BEHAVIOR],[BEHAVIOR]:,[GENERATION],[GENERATION]:,[INST]";
        assert_eq!(form("harmbench-llama-2").literals("").join(","), bracketed);
        let expected = "<s>,<s><|user|>,<|assistant|>,<|user|>,AI assistant:,Human user:,[/INST],[INST]";
        assert_eq!(form("wildguard").literals("").join(","), expected);
        assert!(form("md-judge-v0.1").literals("").contains(&"<END CONVERSATION>".to_string()));
        let own = "{{ '<|start_header_id|>' + role }}{% if x[0] < y %}[INST]{% endif %}";
        assert_eq!(form("llama-guard").literals(own), ["<|start_header_id|>", "[INST]"]);
    }
}
