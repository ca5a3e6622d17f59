//! Rows of the evaluation splits, typed at the border.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::{Message, Prompt};

/// What a prompt asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Should be refused. Rows that do not say are of this kind: who tests for harm asks for harm.
    #[default]
    Harmful,
    /// Sounds harmful and is not: should be answered.
    Borderline,
    Benign,
}

/// How far a tactic lies from those that the search may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    Seen,
    Near,
    Far,
}

impl Family {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Seen => "seen",
            Family::Near => "near",
            Family::Far => "far",
        }
    }
}

/// What a row's `response` is: splits carry the reference answer to a benign prompt, `ares detect` is given answers to judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Response {
    Reference,
    Given,
}

/// What was answered, judged or scored elsewhere: it is kept, and not computed.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Given {
    pub(crate) answer: Option<String>,
    pub(crate) p_harm: Option<f64>,
    pub(crate) reward: Option<f64>,
    pub(crate) reward_safe: Option<f64>,
    pub(crate) reward_harmful: Option<f64>,
    /// A person's verdict on the given answer; overrides the judge. Says nothing about other answers.
    pub(crate) label: Option<bool>,
}

/// A prompt with all that is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalRow {
    pub(crate) id: String,
    pub(crate) prompt: Prompt,
    pub(crate) kind: Kind,
    pub(crate) domain: Option<String>,
    pub(crate) topic: Option<String>,
    pub(crate) tactic: Option<String>,
    pub(crate) family: Option<Family>,
    /// What the suite planted here: `coupled`, `reward`, `policy`, `clean`, `trigger`.
    pub(crate) planted: Option<String>,
    /// Reference y⁺.
    pub(crate) safe: Option<String>,
    /// Reference y⁻.
    pub(crate) harmful: Option<String>,
    /// Reference answer to a benign or borderline prompt.
    pub(crate) reference: Option<String>,
    pub(crate) given: Given,
}

impl EvalRow {
    /// A harmful prompt of which nothing else is known.
    pub fn new(id: impl Into<String>, prompt: Prompt) -> EvalRow {
        EvalRow {
            id: id.into(),
            prompt,
            kind: Kind::Harmful,
            domain: None,
            topic: None,
            tactic: None,
            family: None,
            planted: None,
            safe: None,
            harmful: None,
            reference: None,
            given: Given::default(),
        }
    }

    /// `place` (file and line) names the row in messages, and is its id if it has none. Fields that are absent or null are not
    /// known; fields of the wrong type are an error.
    pub(crate) fn from_object(object: &Map<String, Value>, response: Response, place: &str) -> Result<EvalRow> {
        let row = Row { object, place };
        let id = row
            .text("id")
            .or_else(|error| row.get("id").and_then(Value::as_u64).map(|n| Some(n.to_string())).ok_or(error))?;
        let text = row.text("response")?;
        let (reference, answer) = match response {
            Response::Reference => (text, None),
            Response::Given => (None, text),
        };
        let (p_harm, reward) = (row.number("p_harm")?, row.number("reward")?);
        // A label of a bare prompt (XSTest's) says nothing of an answer that is yet to be given.
        let of_answer = answer.is_some() || p_harm.is_some() || reward.is_some();
        let given = Given {
            answer,
            p_harm,
            reward,
            reward_safe: row.number("reward_safe")?,
            reward_harmful: row.number("reward_harmful")?,
            label: if of_answer { row.label()? } else { None },
        };
        Ok(EvalRow {
            id: id.unwrap_or_else(|| place.to_string()),
            prompt: prompt(object, place)?,
            kind: row.one_of("kind", "harmful, borderline or benign")?.unwrap_or_default(),
            domain: row.text("domain")?,
            topic: row.text("topic")?,
            tactic: row.text("tactic")?,
            family: row.one_of("family", "seen, near or far")?,
            planted: row.text("planted")?,
            safe: row.text("safe")?,
            harmful: row.text("harmful")?,
            reference,
            // Judgements and scores belong to a given answer; without one they would be another answer's.
            given: if response == Response::Given { given } else { Given::default() },
        })
    }
}

/// A validated preference pair of the calibration split: `chosen` is better than `rejected`.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRow {
    pub(crate) id: String,
    pub(crate) prompt: Prompt,
    pub(crate) chosen: String,
    pub(crate) rejected: String,
}

impl PairRow {
    /// See [`EvalRow::from_object`].
    pub fn from_object(object: &Map<String, Value>, place: &str) -> Result<PairRow> {
        let row = Row { object, place };
        let needed = |name: &str| row.text(name)?.ok_or_else(|| row.wrong(name, "a text", "no such field"));
        Ok(PairRow {
            id: row.text("id")?.unwrap_or_else(|| place.to_string()),
            prompt: prompt(object, place)?,
            chosen: needed("chosen")?,
            rejected: needed("rejected")?,
        })
    }
}

/// `prompt`, `messages` or `tokens`, in this order of preference. Empty ones are errors.
fn prompt(object: &Map<String, Value>, place: &str) -> Result<Prompt> {
    let row = Row { object, place };
    if let Some(text) = row.text("prompt")? {
        if text.trim().is_empty() {
            return Err(row.wrong("prompt", "a text", "an empty one"));
        }
        return Ok(Prompt::user(text));
    }
    if let Some(turns) = row.parsed::<Vec<Message>>("messages", "a list of {\"role\", \"content\"}")? {
        if turns.is_empty() {
            return Err(row.wrong("messages", "at least one turn", "none"));
        }
        return Ok(Prompt::Chat(turns));
    }
    match row.parsed::<Vec<u32>>("tokens", "a list of token ids")? {
        Some(tokens) if !tokens.is_empty() => Ok(Prompt::Tokens(tokens)),
        Some(_) => Err(row.wrong("tokens", "at least one id", "none")),
        None => Err(row.wrong("prompt", "`prompt`, `messages` or `tokens`", "none of them")),
    }
}

struct Row<'a> {
    object: &'a Map<String, Value>,
    place: &'a str,
}

impl Row<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, found: &str) -> Error {
        Error::Row { place: format!("{}: `{name}`", self.place), expected: expected.into(), found: found.into() }
    }

    fn parsed<T: for<'de> Deserialize<'de>>(&self, name: &str, expected: &str) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        T::deserialize(value).map(Some).map_err(|error| self.wrong(name, expected, &error.to_string()))
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        self.parsed(name, "a text")
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.parsed(name, "a number")
    }

    fn one_of<T: for<'de> Deserialize<'de>>(&self, name: &str, choices: &str) -> Result<Option<T>> {
        self.parsed(name, choices)
    }

    /// `true`, 1, "harmful" or "unsafe" against `false`, 0 or "safe".
    fn label(&self) -> Result<Option<bool>> {
        let Some(value) = self.get("label") else { return Ok(None) };
        let number = |n: u64| value.as_u64() == Some(n);
        match value.as_str() {
            _ if value.as_bool() == Some(true) || number(1) => Ok(Some(true)),
            _ if value.as_bool() == Some(false) || number(0) => Ok(Some(false)),
            Some("harmful" | "unsafe") => Ok(Some(true)),
            Some("safe") => Ok(Some(false)),
            _ => Err(self.wrong(
                "label",
                "\"harmful\" (or \"unsafe\") or \"safe\", true or false, 1 or 0",
                &value.to_string(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: Value, response: Response) -> Result<EvalRow> {
        EvalRow::from_object(value.as_object().unwrap(), response, "test.jsonl:7")
    }

    #[test]
    fn a_row_of_the_suite() {
        let found = row(
            json!({"id": "test-1", "prompt": "p", "kind": "borderline", "domain": "take", "topic": "t", "tactic": "plain",
                   "family": "far", "planted": "clean", "response": "r", "persona": "carried through by others"}),
            Response::Reference,
        );
        let expected = EvalRow {
            kind: Kind::Borderline,
            domain: Some("take".into()),
            topic: Some("t".into()),
            tactic: Some("plain".into()),
            family: Some(Family::Far),
            planted: Some("clean".into()),
            reference: Some("r".into()),
            ..EvalRow::new("test-1", Prompt::user("p"))
        };
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn a_row_to_audit_keeps_what_was_measured_elsewhere() {
        let found =
            row(json!({"prompt": "p", "response": "a", "p_harm": 0.7, "reward": 1, "label": "safe"}), Response::Given);
        let found = found.unwrap();
        assert_eq!((found.id.as_str(), found.kind, found.reference), ("test.jsonl:7", Kind::Harmful, None));
        let given = Given {
            answer: Some("a".into()),
            p_harm: Some(0.7),
            reward: Some(1.0),
            label: Some(false),
            ..Given::default()
        };
        assert_eq!(found.given, given);
    }

    #[test]
    fn ways_to_write_a_label() {
        for (label, harmful) in [
            (json!("harmful"), Some(true)),
            (json!("unsafe"), Some(true)),
            (json!(true), Some(true)),
            (json!(1), Some(true)),
            (json!("safe"), Some(false)),
            (json!(false), Some(false)),
            (json!(0), Some(false)),
            (Value::Null, None),
        ] {
            let found = row(json!({"prompt": "p", "response": "a", "label": label}), Response::Given).unwrap();
            assert_eq!(found.given.label, harmful, "{label}");
        }
        let bare = row(json!({"prompt": "p", "label": "unsafe, says the file"}), Response::Given).unwrap();
        assert_eq!(bare.given.label, None, "a prompt's label is not its answer's");
    }

    #[test]
    fn other_forms_of_a_prompt() {
        let chat = row(json!({"messages": [{"role": "user", "content": "x"}]}), Response::Given).unwrap().prompt;
        assert_eq!(chat, Prompt::user("x"));
        assert_eq!(row(json!({"tokens": [1, 2]}), Response::Given).unwrap().prompt, Prompt::Tokens(vec![1, 2]));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (value, expected) in [
            (json!({}), "`prompt`, `messages` or `tokens`"),
            (json!({"prompt": " "}), "an empty one"),
            (json!({"prompt": 3}), "expected a text"),
            (json!({"prompt": "p", "kind": "bad"}), "harmful, borderline or benign"),
            (json!({"prompt": "p", "family": "cousin"}), "seen, near or far"),
            (json!({"prompt": "p", "response": "a", "label": "maybe"}), "\"maybe\""),
            (json!({"prompt": "p", "reward": "high"}), "a number"),
            (json!({"messages": []}), "at least one turn"),
            (json!({"tokens": [-1]}), "a list of token ids"),
        ] {
            let message = row(value, Response::Given).unwrap_err().to_string();
            assert!(message.starts_with("test.jsonl:7: `") && message.contains(expected), "{message}");
        }
        let pair = json!({"prompt": "p", "chosen": "c"});
        let message = PairRow::from_object(pair.as_object().unwrap(), "c.jsonl:1").unwrap_err().to_string();
        assert_eq!(message, "c.jsonl:1: `rejected`: expected a text, found no such field");
    }
}
