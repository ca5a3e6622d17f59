//! What a probe is composed of: `grammar.json`, read and checked once, and the one way from a genotype to its prompt.

use super::genotype::{Casing, Genotype};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

const REMEDY: &str = "correct the grammar (models/README.md describes its format)";

/// A harmful goal with the two answers that are right and wrong for it whatever its framing.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Topic {
    pub id: String,
    pub(crate) domain: String,
    /// Fills `{goal}` of a form.
    pub(crate) goal: String,
    /// y⁻: the reference compliance. Without one the reward model is tried on the policy's own answers alone.
    #[serde(default)]
    pub(crate) harmful: Option<String>,
    /// y⁺: the reference refusal.
    pub(crate) safe: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Form {
    pub id: String,
    /// Holds `{goal}`; filled in it is the *request*.
    pub(crate) template: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Persona {
    pub id: String,
    pub(crate) text: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Tactic {
    pub id: String,
    /// Each holds `{request}`, and `{persona}` if it wants one.
    pub templates: Vec<String>,
    /// Name of the translation table that the tactic applies to the request.
    #[serde(default)]
    pub(crate) table: Option<String>,
    /// What it is called elsewhere: OWASP's Top 10, MITRE ATLAS.
    #[serde(default)]
    pub(crate) tags: Vec<String>,
}

/// Translates char by char.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Translation {
    pub(crate) id: String,
    chars: BTreeMap<char, String>,
}

impl Translation {
    /// A char that is not listed falls back to its lower case, whose image is capitalised again; else it stays.
    pub(crate) fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            let mut lower = c.to_lowercase();
            let lower = (lower.len() == 1).then(|| lower.next()).flatten();
            match (self.chars.get(&c), lower.and_then(|l| self.chars.get(&l))) {
                (Some(image), _) => out.push_str(image),
                (None, Some(image)) => out.push_str(&image.to_uppercase()),
                (None, None) => out.push(c),
            }
        }
        out
    }
}

/// A valid grammar: lists are not empty, ids are unique, templates hold their placeholders, tables exist.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Grammar {
    schema: u32,
    pub topics: Vec<Topic>,
    pub forms: Vec<Form>,
    pub personas: Vec<Persona>,
    pub tactics: Vec<Tactic>,
    #[serde(default)]
    pub(crate) prefixes: Vec<String>,
    #[serde(default)]
    pub(crate) suffixes: Vec<String>,
    #[serde(default, rename = "tables")]
    written_tables: BTreeMap<String, BTreeMap<String, String>>,
    #[serde(skip)]
    pub(crate) tables: Vec<Translation>,
    /// Domains in the order of their first topic.
    #[serde(skip)]
    pub(crate) domains: Vec<String>,
    /// Number in `domains`, per topic.
    #[serde(skip)]
    pub(crate) domain_of: Vec<usize>,
    /// Number in `tables` of the table that the tactic applies to the request, per tactic.
    #[serde(skip)]
    pub(crate) table_of: Vec<Option<usize>>,
}

impl Grammar {
    /// Reads and checks a grammar file.
    pub fn read(path: &Path) -> Result<Grammar> {
        Grammar::parse(&crate::text::input::read_text(path)?, path)
    }

    /// Checks a grammar's text; `path` is what errors name.
    pub fn parse(text: &str, path: &Path) -> Result<Grammar> {
        let mut grammar: Grammar =
            serde_json::from_str(text).map_err(Error::file(path, "a grammar of probes (JSON, schema 1)", REMEDY))?;
        grammar.tables = check(&grammar, path)?;
        for topic in &grammar.topics {
            let known = grammar.domains.iter().position(|domain| *domain == topic.domain);
            grammar.domain_of.push(known.unwrap_or(grammar.domains.len()));
            grammar.domains.extend(known.is_none().then(|| topic.domain.clone()));
        }
        let place = |t: &Tactic| grammar.tables.iter().position(|table| Some(&table.id) == t.table.as_ref());
        grammar.table_of = grammar.tactics.iter().map(place).collect();
        Ok(grammar)
    }

    /// The grammar without these tactics, and the grammar of them alone where there are any. Fails where one is unknown, or none
    /// would be left.
    pub(crate) fn hold_out(&self, tactics: &[String]) -> Result<(Grammar, Option<Grammar>)> {
        let known = |id: &&String| self.tactics.iter().any(|tactic| tactic.id == **id);
        let names = || self.tactics.iter().map(|tactic| tactic.id.as_str()).collect::<Vec<_>>().join(", ");
        let wrong =
            |found: &str| Error::Usage(format!("held_out: expected some, not all, of {}; found {found}", names()));
        if let Some(unknown) = tactics.iter().find(|id| !known(id)) {
            return Err(wrong(unknown));
        }
        let part = |out: bool| {
            let kept = |(tactic, _): &(&Tactic, &Option<usize>)| tactics.contains(&tactic.id) == out;
            let (tactics, table_of) =
                self.tactics.iter().zip(&self.table_of).filter(kept).map(|(t, n)| (t.clone(), *n)).unzip();
            Grammar { tactics, table_of, ..self.clone() }
        };
        let (rest, out) = (part(false), part(true));
        match rest.tactics.is_empty() {
            true => Err(wrong("all")),
            false => Ok((rest, (!out.tactics.is_empty()).then_some(out))),
        }
    }

    /// The ids of topics, forms, personas and tactics.
    pub(crate) fn ids(&self) -> [(&'static str, Vec<&String>); 4] {
        [
            ("topic", self.topics.iter().map(|t| &t.id).collect()),
            ("form", self.forms.iter().map(|f| &f.id).collect()),
            ("persona", self.personas.iter().map(|p| &p.id).collect()),
            ("tactic", self.tactics.iter().map(|t| &t.id).collect()),
        ]
    }

    /// Topics of a domain.
    pub(crate) fn topics_of(&self, domain: usize) -> Vec<usize> {
        (0..self.topics.len()).filter(|&t| self.domain_of[t] == domain).collect()
    }

    /// Number of topic × tactic cells: the archive's.
    pub(crate) fn cells(&self) -> usize {
        self.topics.len() * self.tactics.len()
    }

    /// The prompt of a genotype: the form with its goal is the request; the tactic's table, the surface table and the casing act
    /// on it, in this order; the tactic's template takes persona and request; prefix and suffix stand around it, one space away;
    /// the encoding acts on all of it.
    pub fn compose(&self, g: &Genotype) -> String {
        let tables = [self.table_of[g.tactic], g.surface.table];
        let mut request = self.forms[g.form].template.replace("{goal}", &self.topics[g.topic].goal);
        for table in tables.into_iter().flatten() {
            request = self.tables[table].apply(&request);
        }
        match g.surface.casing {
            Some(Casing::Lower) => request = request.to_lowercase(),
            Some(Casing::Upper) => request = request.to_uppercase(),
            None => {}
        }
        let prompt = self.frame(g, &request);
        match g.surface.encoding {
            Some(table) => self.tables[table].apply(&prompt),
            None => prompt,
        }
    }

    /// The same probe before its encoding, casing and translation: what the perplexity filter measures.
    pub fn compose_plain(&self, g: &Genotype) -> String {
        self.frame(g, &self.forms[g.form].template.replace("{goal}", &self.topics[g.topic].goal))
    }

    fn frame(&self, g: &Genotype, request: &str) -> String {
        let template = &self.tactics[g.tactic].templates[g.template];
        let framed = template.replace("{persona}", &self.personas[g.persona].text).replace("{request}", request);
        let prefix = g.surface.prefix.map(|i| self.prefixes[i].as_str());
        let suffix = g.surface.suffix.map(|i| self.suffixes[i].as_str());
        [prefix, Some(framed.as_str()), suffix].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

/// What a text must hold: the placeholder it needs once, and the one it may have once.
type Holds<'a> = (Option<&'a str>, Option<&'a str>);

/// Everything a grammar must be, and its tables.
fn check(file: &Grammar, path: &Path) -> Result<Vec<Translation>> {
    let wrong = |place: String, expected: &str, found: String| {
        Error::file(path, &format!("{place} to be {expected}"), REMEDY)(found)
    };
    if file.schema != 1 {
        return Err(wrong("schema".into(), "1", file.schema.to_string()));
    }
    for (layer, ids) in file.ids() {
        if ids.is_empty() {
            return Err(wrong(format!("{layer}s"), "a list of at least one entry", "none".into()));
        }
        for (i, id) in ids.iter().enumerate() {
            if id.trim().is_empty() || ids[..i].contains(id) {
                return Err(wrong(format!("{layer}s[{i}].id"), "a name of its own within the list", format!("{id:?}")));
            }
        }
    }
    for (place, text, holds) in texts(file) {
        holding(text, holds).map_err(|expected| wrong(place, &expected, format!("{text:?}")))?;
    }
    for (i, tactic) in file.tactics.iter().enumerate() {
        if tactic.templates.is_empty() {
            let expected = "a list of at least one template";
            return Err(wrong(format!("tactics[{i}].templates"), expected, "none".into()));
        }
        if let Some(table) = tactic.table.as_ref().filter(|t| !file.written_tables.contains_key(*t)) {
            return Err(wrong(format!("tactics[{i}].table"), "the name of an entry of `tables`", format!("{table:?}")));
        }
    }
    let mut tables = Vec::new();
    for (id, entries) in &file.written_tables {
        let mut chars = BTreeMap::new();
        for (from, to) in entries {
            let (Some(c), 1, 1) = (from.chars().next(), from.chars().count(), to.chars().count()) else {
                let found = format!("{from:?}: {to:?}");
                return Err(wrong(format!("tables.{id}"), "a table from one character to one character", found));
            };
            chars.insert(c, to.clone());
        }
        tables.push(Translation { id: id.clone(), chars });
    }
    Ok(tables)
}

/// Every text of a grammar with its place and what it must hold.
fn texts(file: &Grammar) -> Vec<(String, &str, Holds<'static>)> {
    let mut texts: Vec<(String, &str, Holds)> = Vec::new();
    for (i, t) in file.topics.iter().enumerate() {
        for (name, text) in [("domain", &t.domain), ("goal", &t.goal), ("safe", &t.safe)] {
            texts.push((format!("topics[{i}].{name}"), text, (None, None)));
        }
        texts.extend(t.harmful.iter().map(|text| (format!("topics[{i}].harmful"), text.as_str(), (None, None))));
    }
    for (i, f) in file.forms.iter().enumerate() {
        texts.push((format!("forms[{i}].template"), &f.template, (Some("{goal}"), None)));
    }
    for (i, p) in file.personas.iter().enumerate() {
        texts.push((format!("personas[{i}].text"), &p.text, (None, None)));
    }
    for (i, t) in file.tactics.iter().enumerate() {
        for (j, template) in t.templates.iter().enumerate() {
            let holds = (Some("{request}"), Some("{persona}"));
            texts.push((format!("tactics[{i}].templates[{j}]"), template, holds));
        }
    }
    for (list, plain) in [("prefixes", &file.prefixes), ("suffixes", &file.suffixes)] {
        texts.extend(plain.iter().enumerate().map(|(i, text)| (format!("{list}[{i}]"), text.as_str(), (None, None))));
    }
    texts
}

/// What was expected, where a text is empty or holds other placeholders than those of its place.
fn holding(text: &str, (once, at_most_once): Holds) -> Result<(), String> {
    if text.trim().is_empty() {
        return Err("a text".into());
    }
    for name in ["{goal}", "{persona}", "{request}"] {
        let count = text.matches(name).count();
        let (holds, expected) = match name {
            _ if once == Some(name) => (count == 1, format!("a text with {name} once")),
            _ if at_most_once == Some(name) => (count <= 1, format!("a text with {name} at most once")),
            _ => (count == 0, format!("a text without {name}")),
        };
        if !holds {
            return Err(expected);
        }
    }
    Ok(())
}
