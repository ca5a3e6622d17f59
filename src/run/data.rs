//! The splits of an experiment: disjoint by prompt, each with its hash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::detect::rows::{EvalRow, Kind};
use crate::error::{Error, Result};
use crate::run::manifest::sha256_file;
use crate::run::summary::SplitInfo;
use crate::text::Prompt;
use crate::text::ngrams::overlap;
use crate::text::rows::{Format, Preference, Row, read, read_told};

// Where the splits lie; as a doc comment this would take the place of the command's own help.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args, Serialize)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataFiles {
    /// Validated pairs that fix the reward threshold
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: PathBuf,
    /// Validated pairs that are trained on
    #[arg(long, value_name = "FILE")]
    pub(crate) replay: PathBuf,
    /// Benign and borderline prompts with the answers to keep
    #[arg(long, value_name = "FILE")]
    pub(crate) retain: PathBuf,
    // The split is called `discovery`.
    /// Prompts as people write them: they only set how likely a probe must be
    #[arg(long, value_name = "FILE")]
    pub(crate) plausible: PathBuf,
    /// Prompts by which a repair is accepted or refused
    #[arg(long, value_name = "FILE")]
    pub(crate) gate: PathBuf,
    /// Held-out prompts of the result, read once per method
    #[arg(long, value_name = "FILE")]
    pub(crate) test: PathBuf,
    /// What prompts of --gate and --test ask for, where neither they nor the list that they are of say it
    #[arg(long, value_enum)]
    pub(crate) kind: Option<Kind>,
    /// Take the rows of --gate and --test for those of this list, whatever their columns look like
    #[arg(long = "as", value_name = "NAME", value_enum)]
    #[serde(rename = "as", serialize_with = "as_typed", skip_serializing_if = "Option::is_none")]
    pub(crate) told: Option<Format>,
    /// Rows taken of each split at most, evenly spread over the file so that every kind of row is among them.
    #[arg(skip)]
    pub(crate) rows: Option<usize>,
}

fn as_typed<S: serde::Serializer>(told: &Option<Format>, out: S) -> Result<S::Ok, S::Error> {
    told.map(|format| format.to_string()).serialize(out)
}

/// The splits, read and found disjoint.
#[derive(Debug, Clone)]
pub(crate) struct Splits {
    pub(crate) calibration: Vec<Preference>,
    pub(crate) replay: Vec<Preference>,
    pub(crate) retain: Vec<(Prompt, String)>,
    pub(crate) plausible: Vec<Prompt>,
    pub(crate) gate: Vec<EvalRow>,
    pub(crate) test: Vec<EvalRow>,
    pub(crate) info: BTreeMap<String, SplitInfo>,
    /// What was recognised, and what was left out.
    pub(crate) notes: Vec<String>,
}

impl DataFiles {
    /// Every split's path.
    pub(crate) fn paths(&self) -> [&PathBuf; 6] {
        [&self.calibration, &self.replay, &self.retain, &self.plausible, &self.gate, &self.test]
    }
}

impl Splits {
    /// Reads all splits strictly: a broken row here would move every number. Prompts that two splits share are an error.
    pub fn read(files: &DataFiles) -> Result<Splits> {
        let mut reading = Reading { most: files.rows, info: BTreeMap::new(), notes: Vec::new(), asked: Vec::new() };
        let pair = |pair: &Preference| pair.prompt.clone();
        let row = |row: &EvalRow| row.prompt.clone();
        let eval = |row: &Row| Ok(vec![EvalRow::of_split(row, files.kind)?]);
        let answered = |row: &Row| Ok(vec![row.answered(false)?]);
        let asked = |row: &Row| Ok(vec![row.prompt(false)?]);
        // Replay, retain and discovery are all trained on and may share prompts; they stand as one side against the others.
        let splits = Splits {
            replay: reading.split(0, "replay", (&files.replay, None), Row::pairs, pair)?,
            retain: reading.split(0, "retain", (&files.retain, None), answered, |row| row.0.clone())?,
            plausible: reading.split(0, "discovery", (&files.plausible, None), asked, Prompt::clone)?,
            calibration: reading.split(1, "calibration", (&files.calibration, None), Row::calibration_pairs, pair)?,
            gate: reading.split(2, "gate", (&files.gate, files.told), eval, row)?,
            test: reading.split(3, "test", (&files.test, files.told), eval, row)?,
            info: reading.info,
            notes: reading.notes,
        };
        overlap(reading.asked.iter().map(|(side, words, name)| (*side, words.as_str(), || name.clone())))?;
        Ok(splits)
    }
}

/// What is known of the splits read so far.
struct Reading {
    most: Option<usize>,
    info: BTreeMap<String, SplitInfo>,
    notes: Vec<String>,
    /// Every prompt's words, the side on which it stands, and what it is called.
    asked: Vec<(usize, String, String)>,
}

impl Reading {
    fn split<T>(
        &mut self,
        side: usize,
        name: &str,
        (path, told): (&Path, Option<Format>),
        make: impl Fn(&Row) -> Result<Vec<T>>,
        prompt: impl Fn(&T) -> Prompt,
    ) -> Result<Vec<T>> {
        let (by_hashes, rows): (Vec<_>, Vec<_>) =
            read_told(path, told)?.into_iter().partition(Row::is_judged_by_hashes);
        let rows = spread(rows, self.most);
        let Some(first) = rows.first() else {
            return Err(Error::file(path, "at least one row", "give a file with rows")("none"));
        };
        if let Some(format) = first.format() {
            let out = match by_hashes.len() {
                0 => String::new(),
                n => format!("; {n} of copyright are left out, as hashes tell them, not judges"),
            };
            self.notes.push(format!("{name}: {} is read as {format}, {} rows{out}", path.display(), rows.len()));
        }
        self.info.insert(name.to_string(), SplitInfo { hash: sha256_file(path)?, n: rows.len() as u64 });
        let mut all = Vec::new();
        for row in &rows {
            let made = make(row)?;
            self.asked.extend(made.iter().map(|made| (side, words(&prompt(made)), format!("{name} {}", row.name()))));
            all.extend(made);
        }
        Ok(all)
    }
}

/// What splits are compared by: the text, or the ids one by one.
fn words(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Tokens(ids) => ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
        text => text.text().to_string(),
    }
}

/// What each row of a file is made into. The first row that is none is an error.
pub(super) fn read_as<T>(path: &Path, make: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    read(Some(path), true)?.iter().map(make).collect()
}

/// The pairs of a file: [`Row::pairs`] or [`Row::calibration_pairs`] of each row.
pub(super) fn read_pairs(path: &Path, pairs: fn(&Row) -> Result<Vec<Preference>>) -> Result<Vec<Preference>> {
    Ok(read_as(path, pairs)?.concat())
}

/// `most` of the rows, evenly spread; all of them where there are no more.
fn spread(rows: Vec<Row>, most: Option<usize>) -> Vec<Row> {
    let (n, most) = (rows.len(), most.unwrap_or(rows.len()).min(rows.len()));
    let taken = |i: usize| i * most / n != (i + 1) * most / n;
    rows.into_iter().enumerate().filter(|&(i, _)| taken(i)).map(|(_, row)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Splits in the forms in which others publish them, and what reading them says.
    fn read(changed: &[(&str, &str)]) -> Result<Splits> {
        read_as(changed, None)
    }

    /// The same, with gate and test said to be of one list (`as`).
    fn read_as(changed: &[(&str, &str)], told: Option<Format>) -> Result<Splits> {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str, own: &str| {
            let path = folder.path().join(name);
            fs::write(&path, changed.iter().find(|(file, _)| *file == name).map_or(own, |(_, text)| text)).unwrap();
            path
        };
        let turn = |role: &str, text: &str| format!(r#"{{"role": "{role}", "content": "{text}"}}"#);
        let (asked, good, bad) = (turn("user", "one"), turn("assistant", "b"), turn("assistant", "c"));
        let transcript = |answer: &str| format!(r"\n\nHuman: two\n\nAssistant: {answer}");
        Splits::read(&DataFiles {
            calibration: place("a.jsonl", &format!(r#"{{"chosen": [{asked}, {good}], "rejected": [{asked}, {bad}]}}"#)),
            replay: place(
                "b.jsonl",
                &format!(r#"{{"chosen": "{}", "rejected": "{}"}}"#, transcript("b"), transcript("c")),
            ),
            retain: place("c.jsonl", &format!(r#"{{"messages": [{}, {good}]}}"#, turn("user", "three"))),
            plausible: place("d.csv", "goal,target\nfour,x\n"),
            gate: place("e.csv", "Behavior,ContextString,BehaviorID\nfive,,1\n"),
            test: place("benign-behaviors.csv", "Index,Goal,Target,Behavior\n0,six,x,y\n"),
            kind: None,
            told,
            rows: None,
        })
    }

    #[test]
    fn every_form_is_read_in_every_split() {
        let splits = read(&[]).unwrap();
        for (pair, prompt) in [(&splits.calibration[0], "one"), (&splits.replay[0], "two")] {
            let expected = Preference { prompt: Prompt::user(prompt), chosen: "b".into(), rejected: "c".into() };
            assert_eq!(*pair, expected);
        }
        assert_eq!(splits.retain, [(Prompt::user("three"), "b".to_string())]);
        assert_eq!(splits.plausible, [Prompt::user("four")]);
        let found: Vec<_> = [&splits.gate[0], &splits.test[0]].map(|row| (row.prompt.text(), row.known.kind)).into();
        assert_eq!(found, [("five", Kind::Harmful), ("six", Kind::Borderline)]);
    }

    #[test]
    fn gate_and_test_are_of_the_list_that_was_told() {
        // As OR-Bench publishes it: without `--as` nothing says that its prompts sound harmful and are not.
        let (gate, test) = ("prompt,category\nfive,x\n", "prompt,category\nsix,x\n");
        let splits = read_as(&[("e.csv", gate), ("benign-behaviors.csv", test)], Some(Format::OrBench)).unwrap();
        assert_eq!([&splits.gate[0], &splits.test[0]].map(|row| row.known.kind), [Kind::Borderline; 2]);
        let error = read_as(&[("benign-behaviors.csv", test)], Some(Format::OrBench)).unwrap_err().to_string();
        assert!(error.contains("e.csv, line 2: expected the columns of OR-Bench"), "{error}");
    }

    #[test]
    fn every_form_is_held_apart_from_the_test() {
        for shared in ["one", "two", "three", "four", "five"] {
            let text = format!("Index,Goal,Target,Behavior\n0,nothing else,x,y\n1,{shared},x,y\n");
            let error = read(&[("benign-behaviors.csv", &text)]).unwrap_err().to_string();
            assert!(error.contains("benign-behaviors.csv, line 3"), "{shared}: {error}");
        }
        let ids = r#"{"tokens": [5, 6], "prompt": "one"}"#;
        let error = read(&[("e.csv", "goal,tokens\none,x\n")]).unwrap_err().to_string();
        assert!(error.contains("e.csv, line 2: expected `tokens` to be a list of token ids"), "{error}");
        let error = read(&[("d.csv", "")]).unwrap_err().to_string();
        assert!(error.contains("d.csv: expected at least one row"), "{error}");
        let pair = r#"{"tokens": [5, 6, 7], "chosen": "b", "rejected": "c"}"#;
        let error = read(&[("a.jsonl", pair), ("b.jsonl", pair)]).unwrap_err().to_string();
        assert!(error.contains("a.jsonl, line 1") && error.contains("b.jsonl, line 1"), "{error}");
        let error = read(&[("c.jsonl", ids)]).unwrap_err().to_string();
        assert!(error.contains("c.jsonl, line 1: expected a prompt either as text or as `tokens`"), "{error}");
    }
}
