//! Rows of the evaluation splits, and those that `ares detect` is given.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::detect::outcome::Outcome;
use crate::error::Result;
use crate::judge::Steps;
use crate::text::rows::Format;
use crate::text::{Prompt, Rendering, Row};

/// What a prompt asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Should be refused.
    #[default]
    Harmful,
    /// Sounds harmful and is not: should be answered.
    Borderline,
    Benign,
}

/// How far a tactic lies from those that the search may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    Seen,
    /// New words for a tactic that it may use.
    Near,
    /// A frame of its own.
    Semantic,
    /// An encoding that it lacks.
    Far,
}

/// A prompt with its references.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EvalRow {
    pub(crate) prompt: Prompt,
    /// Reference y⁺.
    pub(crate) safe: Option<String>,
    /// Reference y⁻.
    pub(crate) harmful: Option<String>,
    /// Reference answer to a benign or borderline prompt.
    pub(crate) reference: Option<String>,
    /// Of a benign or borderline prompt, a good answer and a worse one: `chosen` and `rejected`.
    pub(crate) pair: Option<[String; 2]>,
    /// What was asked for, for ground truth.
    pub(crate) steps: Steps,
    /// Where the row belongs, and what was answered, judged or scored elsewhere: that is kept, and not computed.
    pub(crate) known: Outcome,
}

impl EvalRow {
    /// What `row` says; `kind` is that of a row where neither it nor its list says one, and must be given then. Fields that are absent, null or empty are
    /// not known; fields of the wrong type are an error. With `rendering`, see [`Row::prompt_for`].
    pub(crate) fn read(row: &Row, kind: Option<Kind>, raw: bool, rendering: Option<&Rendering>) -> Result<EvalRow> {
        let text = |key: &str| Ok(row.opt_text(key)?.filter(|text| !text.trim().is_empty()).map(str::to_string));
        let (prompt, answer) = row.asked(raw, rendering)?;
        let (p_harm, reward) = (row.number("p_harm")?, row.number("reward")?);
        // The label of a bare prompt, and any of XSTest's, says nothing of an answer.
        let of_prompt = matches!(row.format(), Some(Format::XsTest | Format::WildJailbreak));
        let of_quality = row.format() == Some(Format::TrlUnpaired);
        let of_answer = (answer.is_some() || p_harm.is_some() || reward.is_some()) && !of_prompt && !of_quality;
        let label = row.get("label")?.filter(|value| value.as_str() != Some(""));
        let bare = label.filter(|_| !of_answer && !of_prompt && !of_quality).and_then(by_label);
        let said = choice(row, "kind", "harmful, borderline or benign")?.or(said_by_list(row)).or(bare);
        let unknown = || {
            let expected = "a kind of prompt: `kind` in the row, --kind harmful, borderline or benign, or --as the list that it is of";
            row.wrong(expected, "none")
        };
        if row.is_judged_by_hashes() {
            return Err(
                row.wrong("a behaviour that a judge can tell", "one of copyright, which HarmBench tells by hashes")
            );
        }
        let id = match row.get("id")? {
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => row.opt_text("id")?.map(str::to_string),
        };
        let known = Outcome {
            id: id.unwrap_or_else(|| row.place()),
            prompt: prompt.text().to_string(),
            kind: said.or(kind).or(guessed(row)).ok_or_else(unknown)?,
            domain: text("domain")?,
            topic: text("topic")?,
            tactic: text("tactic")?,
            distance: choice(row, "distance", "seen, near, semantic or far")?,
            planted: text("planted")?,
            response: answer,
            p_harm,
            label: label.filter(|_| of_answer).map(|value| person(row, "label", value)).transpose()?,
            reward,
            reward_safe: row.number("reward_safe")?,
            reward_harmful: row.number("reward_harmful")?,
            ..Outcome::default()
        };
        let pair = match known.kind {
            Kind::Harmful => None,
            _ => text("chosen")?.zip(text("rejected")?).map(|(chosen, rejected)| [chosen, rejected]),
        };
        let steps = choice(row, "steps", "a list of lists of texts")?.unwrap_or_default();
        Ok(EvalRow { prompt, safe: text("safe")?, harmful: text("harmful")?, reference: None, pair, steps, known })
    }

    /// A row of a split: its answer is the reference to a benign prompt, and what was measured elsewhere does not count.
    pub(crate) fn of_split(row: &Row, kind: Option<Kind>) -> Result<EvalRow> {
        let reference = row.reference()?;
        let mut row = EvalRow::read(row, kind, false, None)?;
        row.reference = row.known.response.take().or(reference);
        row.known = row.known.unmeasured();
        Ok(row)
    }
}

/// What the list that a row is of says of its prompts.
fn said_by_list(row: &Row) -> Option<Kind> {
    let field = |key: &str| row.object.get(key).and_then(Value::as_str).unwrap_or_default();
    match row.format()? {
        Format::AdvBench | Format::HarmBench | Format::StrongReject => Some(Kind::Harmful),
        Format::OrBench => Some(Kind::Borderline),
        Format::XsTest if field("type").starts_with("contrast_") => Some(Kind::Harmful),
        Format::XsTest => Some(Kind::Borderline),
        // Of training there is `data_type`, of evaluation a label.
        Format::WildJailbreak => match (field("data_type"), row.number("label").ok().flatten()) {
            ("vanilla_harmful" | "adversarial_harmful", _) | ("", Some(1.0)) => Some(Kind::Harmful),
            ("vanilla_benign", _) => Some(Kind::Benign),
            ("adversarial_benign", _) | ("", Some(0.0)) => Some(Kind::Borderline),
            _ => None,
        },
        _ => None,
    }
}

/// JailbreakBench's two lists have the same columns: only the file's name says which is the benign one.
fn guessed(row: &Row) -> Option<Kind> {
    let benign = row.file_name().contains("benign");
    let guess = if benign { Kind::Borderline } else { Kind::Harmful };
    (row.format() == Some(Format::JailbreakBench)).then_some(guess)
}

/// What the label of a bare prompt says of it.
fn by_label(label: &Value) -> Option<Kind> {
    match label.as_str()? {
        "safe" => Some(Kind::Borderline),
        "unsafe" | "harmful" => Some(Kind::Harmful),
        _ => None,
    }
}

/// Whether a person found the answer harmful, where the field `key` says it.
pub(crate) fn labelled(row: &Row, key: &str) -> Result<Option<bool>> {
    row.get(key)?.filter(|value| value.as_str() != Some("")).map(|value| person(row, key, value)).transpose()
}

/// Whether a person found the answer harmful.
fn person(row: &Row, key: &str, label: &Value) -> Result<bool> {
    match label.as_str().map_or_else(|| label.to_string(), str::to_string).as_str() {
        "true" | "1" | "harmful" | "unsafe" => Ok(true),
        "false" | "0" | "safe" => Ok(false),
        _ => Err(row.type_error(key, "harmful (unsafe, true, 1) or safe (false, 0)", label)),
    }
}

fn choice<T: for<'de> Deserialize<'de>>(row: &Row, key: &str, choices: &str) -> Result<Option<T>> {
    let value = row.get(key)?.filter(|value| value.as_str() != Some(""));
    value.map(|value| T::deserialize(value).map_err(|_| row.type_error(key, choices, value))).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;
    use crate::text::rows::parse;
    use serde_json::json;

    fn rows(name: &str, text: &str) -> Vec<Row> {
        parse(name, text.as_bytes(), false).unwrap()
    }

    fn read(value: Value) -> Result<EvalRow> {
        EvalRow::read(&rows("test.jsonl", &value.to_string())[0], Some(Kind::Harmful), false, None)
    }

    #[test]
    fn a_row_of_the_suite() {
        let row = json!({"id": "test-1", "prompt": "p", "kind": "borderline", "domain": "take", "topic": "t",
            "tactic": "plain", "distance": "far", "planted": "clean", "response": "r", "p_harm": 1, "persona": "other",
            "chosen": "c", "rejected": "d", "steps": [["s"]]});
        let known = Outcome {
            id: "test-1".into(),
            prompt: "p".into(),
            kind: Kind::Borderline,
            domain: Some("take".into()),
            topic: Some("t".into()),
            tactic: Some("plain".into()),
            distance: Some(Distance::Far),
            planted: Some("clean".into()),
            ..Outcome::default()
        };
        let (prompt, reference) = (Prompt::user("p"), Some("r".into()));
        let pair = Some(["c".to_string(), "d".to_string()]);
        let steps = vec![vec!["s".to_string()]];
        let expected = EvalRow { prompt, safe: None, harmful: None, reference, pair, steps, known };
        assert_eq!(EvalRow::of_split(&rows("test.jsonl", &row.to_string())[0], None).unwrap(), expected);
    }

    #[test]
    fn a_row_to_audit_keeps_what_was_measured_elsewhere() {
        for place in ["response", "output", "completion", "target_response"] {
            let found =
                read(json!({"prompt": "p", place: "a", "p_harm": 0.7, "reward": "1", "label": "safe"})).unwrap();
            let known = Outcome { id: "test.jsonl, line 1".into(), prompt: "p".into(), ..Outcome::default() };
            let known = Outcome { p_harm: Some(0.7), reward: Some(1.0), label: Some(false), ..known };
            assert_eq!(found.known, Outcome { response: Some("a".into()), ..known }, "{place}");
            assert_eq!((found.known.kind, found.reference), (Kind::Harmful, None));
        }
        let turns = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]);
        let found = read(json!({ "messages": turns })).unwrap();
        assert_eq!((found.prompt, found.known.response.as_deref()), (Prompt::user("x"), Some("y")));
    }

    #[test]
    fn ways_to_write_a_label() {
        let harmful = [json!("harmful"), json!("unsafe"), json!(true), json!(1)].map(|label| (label, Some(true)));
        let safe = [json!("safe"), json!("0"), json!(false)].map(|label| (label, Some(false)));
        for (label, expected) in harmful.into_iter().chain(safe).chain([(Value::Null, None)]) {
            let found = read(json!({"prompt": "p", "response": "a", "label": label})).unwrap();
            assert_eq!(found.known.label, expected, "{label}");
        }
        let bare = read(json!({"prompt": "p", "label": "unsafe, says the file"})).unwrap();
        assert_eq!(bare.known.label, None, "a prompt's label is not its answer's");
    }

    #[test]
    fn what_a_list_calls_safe_is_not_harmful() {
        use Kind::*;
        let kinds = |name: &str, text: &str, given: Option<Kind>| -> Vec<Kind> {
            rows(name, text).iter().map(|row| EvalRow::read(row, given, false, None).unwrap().known.kind).collect()
        };
        let xstest = "id,prompt,type,label,completion\n1,a,homonyms,safe,b\n26,a,contrast_homonyms,unsafe,b\n";
        assert_eq!(kinds("xstest.csv", xstest, Some(Benign)), [Borderline, Harmful], "the file says it");
        let row = &rows("xstest.csv", xstest)[0];
        assert_eq!(EvalRow::read(row, None, false, None).unwrap().known.label, None, "its label is the prompt's");
        let jailbreakbench = "Index,Goal,Target,Behavior,Category,Source\n0,a,b,c,d,e\n";
        assert_eq!(kinds("jbb/benign-behaviors.csv", jailbreakbench, None), [Borderline]);
        assert_eq!(kinds("jbb/benign-behaviors.csv", jailbreakbench, Some(Benign)), [Benign], "a name is a guess");
        assert_eq!(kinds("benign/harmful-behaviors.csv", jailbreakbench, None), [Harmful]);
        assert_eq!(kinds("a.csv", "goal,label\na,safe\na,unsafe\na,\n", Some(Benign)), [Borderline, Harmful, Benign]);
        assert_eq!(kinds("a.csv", "goal,kind\na,\na,benign\n", Some(Borderline)), [Borderline, Benign]);
        assert_eq!(kinds("a.csv", "goal,target\na,b\n", None), [Harmful]);
        let wild = "vanilla\tadversarial\tcompletion\tdata_type\na\t\tc\tvanilla_harmful\na\tb\tc\tadversarial_benign\na\t\tc\tvanilla_benign\n";
        assert_eq!(kinds("wild.tsv", wild, None), [Harmful, Borderline, Benign]);
        assert_eq!(kinds("eval.tsv", "adversarial\tlabel\na\t1\na\t0\n", None), [Harmful, Borderline]);
    }

    #[test]
    fn what_nobody_calls_harmful_is_not_taken_for_it() {
        let kind = |value: Value| {
            EvalRow::read(&rows("test.jsonl", &value.to_string())[0], None, false, None).map(|row| row.known.kind)
        };
        refused(kind(json!({"prompt": "p"})), "expected a kind of prompt: `kind` in the row, --kind harmful");
        refused(kind(json!({"prompt": "p", "category": "c"})), "or --as the list that it is of");
        let copyright = json!({"Behavior": "a", "BehaviorID": "i", "Tags": "hash_check"});
        refused(kind(copyright), "which HarmBench tells by hashes");
        // In TRL's unpaired preferences `label` says good, not harmful.
        let unpaired = read(json!({"prompt": "p", "completion": "a", "label": true})).unwrap();
        assert_eq!((unpaired.known.label, unpaired.known.response.as_deref()), (None, Some("a")));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (value, expected) in [
            (json!({"prompt": "p", "kind": "bad"}), "`kind` to be harmful, borderline or benign, found \"bad\""),
            (json!({"prompt": "p", "distance": "cousin"}), "seen, near, semantic or far"),
            (json!({"prompt": "p", "response": "a", "label": "maybe"}), "\"maybe\""),
            (json!({"prompt": "p", "reward": "high"}), "a number"),
            (json!({"prompt": "p", "safe": 3}), "`safe` to be a text"),
            (json!({"prompt": "p", "steps": ["a"]}), "`steps` to be a list of lists of texts"),
            (json!({"prompt": "p", "tokens": [1, 2]}), "a prompt either as text or as `tokens`, found both"),
        ] {
            let message = read(value).unwrap_err().to_string();
            assert!(message.starts_with("test.jsonl, line 1: expected ") && message.contains(expected), "{message}");
        }
    }
}
