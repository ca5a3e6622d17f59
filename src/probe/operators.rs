//! Operators: how a probe becomes another one. Each records its name in the child's lineage.

use super::genotype::{Casing, Genotype, Surface};
use super::grammar::Grammar;
use crate::attacker::{Draft, Way};
use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

/// What was done to a parent; [`Operator::Compose`] has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// A fresh composition from the grammar.
    Compose,
    /// Another template of the same tactic.
    TemplateRephrase,
    PersonaSwap,
    TacticSwap,
    TopicSwap,
    FormSwap,
    /// Form, persona and surface each from one of two parents.
    Crossover,
    Prefix,
    Suffix,
    /// A translation table on the request.
    Translate,
    /// Another casing of the request.
    Casing,
    /// A translation table on the whole prompt.
    Encode,
    /// An attacker's words.
    #[serde(untagged)]
    Written(Way),
}

/// Operators that stay within a topic × tactic, with their weights: changes of wording come four times as often as changes of surface,
/// which leave the words as they are or make them hard to read.
const WITHIN_CELL: [(Operator, f64); 9] = [
    (Operator::TemplateRephrase, 4.0),
    (Operator::PersonaSwap, 4.0),
    (Operator::FormSwap, 4.0),
    (Operator::Crossover, 4.0),
    (Operator::Prefix, 1.0),
    (Operator::Suffix, 1.0),
    (Operator::Translate, 1.0),
    (Operator::Casing, 1.0),
    (Operator::Encode, 1.0),
];
/// One operator alone is often a near-duplicate of its parent, so up to this many are chained.
const MAX_CHAIN: usize = 3;

/// A genotype and how it came to be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Child {
    pub(crate) genotype: Genotype,
    /// What an attacker wrote for the genotype's cell; without that the grammar composes it.
    pub(crate) written: Option<Draft>,
    /// Indices of the parents' probes.
    pub(crate) parents: Vec<usize>,
    pub(crate) operators: Vec<Operator>,
}

impl Child {
    pub(crate) fn prompt(&self, grammar: &Grammar) -> String {
        self.written.as_ref().map_or_else(|| grammar.compose(&self.genotype), |draft| draft.prompt.clone())
    }

    /// What the perplexity filter measures.
    pub(crate) fn plain(&self, grammar: &Grammar) -> String {
        self.written.as_ref().map_or_else(|| grammar.compose_plain(&self.genotype), |draft| draft.prompt.clone())
    }

    /// y⁺ and y⁻: the attacker's, else the topic's.
    pub(crate) fn references<'a>(&'a self, grammar: &'a Grammar) -> (&'a str, Option<&'a str>) {
        let (topic, own) = (&grammar.topics[self.genotype.topic], self.written.as_ref());
        let safe = own.and_then(|draft| draft.safe.as_deref()).unwrap_or(&topic.safe);
        (safe, own.and_then(|draft| draft.harmful.as_deref()).or(topic.harmful.as_deref()))
    }

    pub(crate) fn author(&self) -> Author {
        author(&self.operators)
    }
}

/// Who made a probe: the grammar (`None`), or an attacker by what it did.
pub(crate) type Author = Option<Way>;

pub(crate) fn author(operators: &[Operator]) -> Author {
    operators.iter().find_map(|operator| match operator {
        Operator::Written(way) => Some(*way),
        _ => None,
    })
}

/// As files and tables call it.
pub(crate) fn name(author: Author) -> &'static str {
    author.map_or("grammar", Way::name)
}

/// A probe to breed from: its index and genotype.
pub(crate) type Parent = (usize, Genotype);

/// A fresh composition.
pub(crate) fn compose(genotype: Genotype) -> Child {
    Child { genotype, written: None, parents: Vec::new(), operators: vec![Operator::Compose] }
}

/// Mutates a parent into the topic × tactic of `target`, which the sampler drew: both are swapped for the target's where the parent
/// is of another cell, and operators within the cell follow, one to three changes in all. What a swap brings in is the target's.
pub(crate) fn mutate(grammar: &Grammar, parent: Parent, mate: Parent, target: &Genotype, rng: &mut impl Rng) -> Child {
    let mut child = Child { genotype: parent.1, written: None, parents: vec![parent.0], operators: Vec::new() };
    for swap in [Operator::TacticSwap, Operator::TopicSwap] {
        apply(grammar, swap, &mut child, mate, target, rng);
    }
    for _ in child.operators.len()..rng.random_range(1..=MAX_CHAIN) {
        if let Ok(&(operator, _)) = WITHIN_CELL.choose_weighted(rng, |o| o.1) {
            apply(grammar, operator, &mut child, mate, target, rng);
        }
    }
    match child.operators.is_empty() {
        true => compose(*target), // nothing applied: as good as no parent
        false => child,
    }
}

/// Applies one operator; one that changes nothing (a grammar without tables, a swap for the same) is not recorded.
fn apply(g: &Grammar, operator: Operator, child: &mut Child, mate: Parent, target: &Genotype, rng: &mut impl Rng) {
    let before = child.genotype;
    let c = &mut child.genotype;
    match operator {
        Operator::Compose => *c = *target,
        Operator::TemplateRephrase => c.template = rng.random_range(0..g.tactics[c.tactic].templates.len()),
        Operator::PersonaSwap => c.persona = target.persona,
        Operator::FormSwap => c.form = target.form,
        Operator::TopicSwap => c.topic = target.topic,
        Operator::TacticSwap if c.tactic == target.tactic => {}
        Operator::TacticSwap => {
            (c.tactic, c.template) = (target.tactic, target.template);
            c.surface.table = c.surface.table.filter(|_| g.table_of[c.tactic].is_none());
        }
        Operator::Crossover => cross(g, c, &mate.1, rng),
        Operator::Prefix => c.surface.prefix = pick(g.prefixes.len(), rng),
        Operator::Suffix => c.surface.suffix = pick(g.suffixes.len(), rng),
        // A tactic that has a table of its own is already translated.
        Operator::Translate if g.table_of[c.tactic].is_none() => c.surface.table = pick(g.tables.len(), rng),
        Operator::Translate => {}
        Operator::Casing => {
            c.surface.casing = [None, Some(Casing::Lower), Some(Casing::Upper)].choose(rng).copied().flatten()
        }
        Operator::Encode => c.surface.encoding = pick(g.tables.len(), rng),
        Operator::Written(_) => {}
    }
    if child.genotype != before {
        child.operators.push(operator);
        if operator == Operator::Crossover && !child.parents.contains(&mate.0) {
            child.parents.push(mate.0);
        }
    }
}

/// Uniform crossover of all that lies outside the cell.
fn cross(grammar: &Grammar, child: &mut Genotype, mate: &Genotype, rng: &mut impl Rng) {
    if rng.random() {
        child.form = mate.form;
    }
    if rng.random() {
        child.persona = mate.persona;
    }
    if rng.random() {
        let table = mate.surface.table.filter(|_| grammar.table_of[child.tactic].is_none());
        child.surface = Surface { table, ..mate.surface };
    }
}

/// None, or one of `n`, each as likely as the other.
fn pick(n: usize, rng: &mut impl Rng) -> Option<usize> {
    rng.random_range(0..=n).checked_sub(1)
}
