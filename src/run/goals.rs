//! A grammar of probes from a list of goals: its rows are the topics; forms, personas and tactics are a table that the program carries,
//! whose tactics name what they are in OWASP's Top 10 for LLM applications (2025) and in MITRE ATLAS.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::detect::rows::{EvalRow, Kind};
use crate::error::{Error, Result};
use crate::probe::grammar::Grammar;
use crate::text::rows::{Format, Row, read_told};

const TABLE: &str = include_str!("goals.json");
/// Where lists say what a goal is about.
const DOMAIN: [&str; 4] = ["domain", "SemanticCategory", "Category", "category"];
/// What a list's own name for a row stands under.
const ID: [&str; 2] = ["BehaviorID", "id"];

/// Which rows become topics, and what answers stand beside them.
#[derive(Debug)]
pub(crate) struct Goals<'a> {
    pub(crate) file: &'a Path,
    /// The list that the rows are of, where their columns do not say it.
    pub(crate) told: Option<Format>,
    /// Topics at most, evenly spread over the file.
    pub(crate) most: Option<usize>,
    /// y⁺ of every topic.
    pub(crate) safe: &'a str,
    /// Take the list's own targets (a compliant beginning) as y⁻.
    pub(crate) targets: bool,
}

/// What became of a list.
pub(crate) struct Made {
    /// As `grammar.json` holds it.
    pub(crate) json: Value,
    pub(crate) grammar: Grammar,
    /// Rows that ask for nothing harmful, that hashes judge, or that repeat another.
    pub(crate) left_out: usize,
}

/// Makes the grammar that `out` will hold. Fails on a row that is none, on a list without a goal, and on goals that hold a grammar's
/// own placeholders.
pub(crate) fn grammar(goals: &Goals, out: &Path) -> Result<Made> {
    let rows = read_told(goals.file, goals.told)?;
    let (mut topics, mut seen, mut left_out) = (Vec::new(), BTreeSet::new(), 0);
    for row in &rows {
        if row.is_judged_by_hashes() {
            left_out += 1;
            continue;
        }
        // What a list says of its rows stands; of one that says nothing these are the goals.
        let read = |kind| EvalRow::read(row, kind, false, None);
        let asked = read(None).or_else(|_| read(Some(Kind::Harmful)))?;
        let goal = asked.known.prompt.trim().to_string();
        if asked.known.kind != Kind::Harmful || !seen.insert(goal.clone()) {
            left_out += 1;
            continue;
        }
        topics.push(topic(goals, row, &goal)?);
    }
    if topics.is_empty() {
        let remedy =
            "give a list of harmful goals: AdvBench, HarmBench, JailbreakBench, StrongREJECT, or lines of your own";
        let found = format!("none in {} rows", rows.len());
        return Err(Error::file(goals.file, "at least one goal", remedy)(found));
    }
    let (n, most) = (topics.len(), goals.most.unwrap_or(topics.len()).min(topics.len()));
    let topics = topics.into_iter().enumerate().filter(|(i, _)| i * most / n != (i + 1) * most / n);
    let mut ids = BTreeSet::new();
    let topics: Vec<Value> = topics
        .map(|(i, mut topic)| {
            let known = topic["id"].as_str().is_some_and(|id| !id.is_empty() && ids.insert(id.to_string()));
            if !known {
                topic["id"] = format!("goal-{}", i + 1).into();
            }
            topic
        })
        .collect();
    let mut json = json!({ "schema": 1, "topics": topics });
    let table: serde_json::Map<String, Value> = serde_json::from_str(TABLE).map_err(Error::file(
        Path::new("goals.json"),
        "the program's own table",
        "please report it: a fault in ares",
    ))?;
    json.as_object_mut().into_iter().for_each(|grammar| grammar.extend(table.clone()));
    let grammar = Grammar::parse(&json.to_string(), out)?;
    Ok(Made { json, grammar, left_out })
}

fn topic(goals: &Goals, row: &Row, goal: &str) -> Result<Value> {
    let text = |keys: &[&str]| -> Result<Option<String>> {
        for key in keys {
            if let Some(text) = row.opt_text(key)?.map(str::trim).filter(|text| !text.is_empty()) {
                return Ok(Some(text.to_string()));
            }
        }
        Ok(None)
    };
    let list = row.format().map_or("goals".to_string(), |format| format.to_string());
    let mut topic = json!({
        "id": text(&ID)?.unwrap_or_default(), "domain": text(&DOMAIN)?.unwrap_or(list), "goal": goal, "safe": goals.safe,
    });
    let own = [text(&["harmful"])?, text(&["target", "Target"])?.filter(|_| goals.targets)];
    if let Some(harmful) = own.into_iter().flatten().next() {
        topic["harmful"] = harmful.into();
    }
    Ok(topic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::refused;

    fn made(name: &str, text: &str, most: Option<usize>, targets: bool) -> Result<Made> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        let goals = Goals { file: &file, told: None, most, safe: "No.", targets };
        grammar(&goals, Path::new("grammar.json"))
    }

    #[test]
    fn every_list_becomes_topics_with_its_own_names() {
        let found = made("a.csv", "goal,target\nOpen it,Sure\nClose it,Sure\nOpen it,Sure\n", None, true).unwrap();
        let topics = &found.grammar.topics;
        assert_eq!((topics.len(), found.left_out), (2, 1));
        assert_eq!((topics[0].id.as_str(), topics[0].domain.as_str()), ("goal-1", "AdvBench"));
        assert_eq!((topics[1].goal.as_str(), topics[1].harmful.as_deref()), ("Close it", Some("Sure")));
        let harmbench = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n\
            Open it,standard,doors,,,open\nSing it,copyright,songs,hash_check,,sing\nShut it,contextual,doors,context,A door.,shut\n";
        let found = made("h.csv", harmbench, None, true).unwrap();
        let topics = &found.grammar.topics;
        assert_eq!((topics.len(), found.left_out, topics[0].harmful.as_deref()), (2, 1, None));
        assert_eq!((topics[1].id.as_str(), topics[1].domain.as_str()), ("shut", "doors"));
        assert_eq!(topics[1].goal, "A door.\n\n---\n\nShut it");
        let tactic = found.grammar.tactics.iter().find(|tactic| tactic.id == "rot13").unwrap();
        assert_eq!(tactic.tags, ["OWASP LLM01:2025", "ATLAS AML.T0068"]);
    }

    #[test]
    fn topics_are_spread_over_the_list() {
        let text: String = (0..10).map(|i| format!("{{\"prompt\": \"goal {i}\", \"id\": \"same\"}}\n")).collect();
        let found = made("a.jsonl", &text, Some(3), false).unwrap();
        let goals: Vec<&str> = found.grammar.topics.iter().map(|topic| topic.goal.as_str()).collect();
        assert_eq!(goals, ["goal 3", "goal 6", "goal 9"]);
        let ids: BTreeSet<&str> = found.grammar.topics.iter().map(|topic| topic.id.as_str()).collect();
        assert_eq!(ids.len(), 3, "every topic has a name of its own");
    }

    #[test]
    fn a_list_without_a_goal_is_refused() {
        let benign = "{\"prompt\": \"a\", \"kind\": \"benign\"}\n{\"prompt\": \"b\", \"kind\": \"borderline\"}\n";
        refused(made("a.jsonl", benign, None, false), "expected at least one goal, found none in 2 rows");
        let sounds = "Index,Goal,Target,Behavior\n0,Open it,Sure,x\n";
        refused(
            made("jbb_benign-behaviors.csv", sounds, None, false),
            "expected at least one goal, found none in 1 rows",
        );
        assert_eq!(made("jbb_harmful-behaviors.csv", sounds, None, false).unwrap().grammar.topics.len(), 1);
        refused(made("a.jsonl", "", None, false), "expected at least one goal, found none in 0 rows");
        refused(made("a.jsonl", "{\"x\": 1}\n", None, false), "a.jsonl, line 1: expected `prompt`");
        let holds = "{\"prompt\": \"do {request}\"}\n";
        refused(made("a.jsonl", holds, None, false), "topics[0].goal to be a text without {request}");
    }
}
