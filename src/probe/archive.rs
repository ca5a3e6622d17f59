//! MAP-Elites: the best probes of every topic × tactic cell, and what was found so far.

use super::genotype::Genotype;
use super::grammar::Grammar;
use super::operators::Parent;
use crate::text::ngrams::Seen;
use rand::Rng;
use rand::seq::IndexedRandom;

/// Elites kept per cell.
const ELITES: usize = 3;

#[derive(Debug, Clone)]
struct Elite {
    /// The probe's index.
    probe: usize,
    genotype: Genotype,
    fitness: f64,
    /// Its number in `seen`.
    text: usize,
    /// A failure stays in `seen` when a fitter elite takes its place.
    failure: bool,
}

/// Elites by cell. Near-duplicates of an elite or of a found failure are not let in.
#[derive(Debug, Clone)]
pub(crate) struct Archive {
    tactics: usize,
    /// (topics · tactics) cells, best elite first.
    cells: Vec<Vec<Elite>>,
    seen: Seen,
}

impl Archive {
    pub(crate) fn new(grammar: &Grammar) -> Archive {
        let cells = vec![Vec::new(); grammar.cells()];
        Archive { tactics: grammar.tactics.len(), cells, seen: Seen::default() }
    }

    /// Whether the prompt of these grams is a near-duplicate of an elite or of a found failure.
    pub(crate) fn knows(&self, grams: &[u64]) -> bool {
        self.seen.find_grams(grams).is_some()
    }

    /// Takes a probe that was judged: a failure is remembered for good, an elite as long as it is one.
    pub(crate) fn insert(&mut self, probe: usize, genotype: Genotype, prompt: &str, fitness: f64, failure: bool) {
        let cell = &mut self.cells[genotype.topic * self.tactics + genotype.tactic];
        let place = cell.iter().take_while(|e| e.fitness >= fitness).count();
        if place < ELITES {
            let text = self.seen.insert(prompt);
            cell.insert(place, Elite { probe, genotype, fitness, text, failure });
        } else if failure {
            self.seen.insert(prompt);
        }
        if let Some(out) = cell.get(ELITES) {
            if !out.failure {
                self.seen.forget(out.text);
            }
            cell.truncate(ELITES);
        }
    }

    /// A random elite of the cells that hold `tactic` and a topic of `domain`, any elite if they have none, none if there is none.
    pub(crate) fn parent(&self, grammar: &Grammar, domain: usize, tactic: usize, rng: &mut impl Rng) -> Option<Parent> {
        let topics = (0..grammar.topics.len()).filter(|&t| grammar.domain_of[t] == domain);
        let mut near: Vec<&Elite> = topics.flat_map(|t| &self.cells[t * self.tactics + tactic]).collect();
        if near.is_empty() {
            near = self.cells.iter().flatten().collect();
        }
        near.choose(rng).map(|e| (e.probe, e.genotype))
    }

    /// Share of the cells that hold an elite.
    pub(crate) fn coverage(&self) -> f64 {
        self.cells.iter().filter(|c| !c.is_empty()).count() as f64 / self.cells.len() as f64
    }

    /// Sum of the best fitness of each cell, negative ones left out.
    pub(crate) fn qd_score(&self) -> f64 {
        self.cells.iter().filter_map(|c| c.first()).map(|e| e.fitness.max(0.0)).sum()
    }
}
