//! Samplers: where the next probe is looked for. Every sampler sees the same proposals' outcomes, one update per probe in index
//! order, and keeps the same books, so that weights learned under one may be used by another.

use super::beta::beta;
use super::genotype::Genotype;
use super::grammar::Grammar;
use super::operators::Author;
use crate::attacker::Way;
use rand::Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How the cell of the next probe is drawn. An *arm* is a tactic × domain; `Ucb` and `Thompson` draw an arm and then, by the same
/// rule, a topic of its domain. Arms alone find half as much where weak cells do not follow domains, topics alone where they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SamplerKind {
    /// The published multiplicative update; each layer (topic, form, persona, tactic) has weights of its own.
    Ares,
    /// Upper confidence bound per arm.
    Ucb,
    /// Beta posterior per arm, and no arm above a share of the budget so far.
    #[default]
    Thompson,
    /// The baseline: every arm as likely as the other, whatever was found.
    Uniform,
}

/// Width of the confidence bound: the mean and `UCB_WIDTH·sqrt(ln N / n)`. Larger ones explore for longer than a budget lasts.
const UCB_WIDTH: f64 = 0.3;
/// Thompson sampling without a limit hammers the one best arm and finds little that is distinct.
const MAX_SHARE: f64 = 0.08;
/// Evidence that an arm brings into the next search at most: enough to be tried first, too little to outlast a few misses after a
/// repair or on another pair of models.
const KEPT_PULLS: f64 = 8.0;
/// Step of the published update.
const ARES_STEP: f64 = 0.2;

/// What a sampler learns from one probe. An error counts as a miss.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Lesson {
    pub(crate) p_harm: f64,
    /// (r(y) − τ_r)/s of the policy's own answer.
    pub(crate) z: f64,
    /// Whether the verdict is `Coupled`.
    pub(crate) coupled: bool,
}

/// Evidence on a tactic × domain, or on who proposes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Probes.
    pub pulls: f64,
    /// Coupled failures among them.
    pub hits: f64,
    /// Probes proposed in this search: the limit of the share counts these, not what was learned before.
    #[serde(skip)]
    pub(super) proposed: u64,
}

impl Arm {
    /// Probes that are proposed but not judged yet narrow the bound without moving the mean: else a batch would be one arm's.
    fn upper_bound(&self, total: f64) -> f64 {
        let n = self.pulls.max(self.proposed as f64);
        if n == 0.0 {
            return f64::INFINITY;
        }
        self.hits / self.pulls.max(1.0) + UCB_WIDTH * ((total + 1.0).ln() / n).sqrt()
    }

    /// A draw from the posterior, below all others if one more probe would lift this arm above its share of all `total` proposals:
    /// 8 %, or twice the average where arms are few.
    fn posterior(&self, total: u64, arms: usize, rng: &mut impl Rng) -> f64 {
        let drawn = beta(1.0 + self.hits, 1.0 + self.pulls - self.hits, rng);
        let share = MAX_SHARE.max(2.0 / arms as f64);
        let full = self.proposed >= 1 && (self.proposed + 1) as f64 > share * (total + 1) as f64;
        if full { drawn - 2.0 } else { drawn }
    }
}

/// A sampler's state. Numbers are those of the grammar it was made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    pub(crate) kind: SamplerKind,
    pub(super) domains: usize,
    /// tactics × domains
    pub(super) arms: Vec<Arm>,
    /// tactics × topics
    pub(super) cells: Vec<Arm>,
    /// Topic, form, persona, tactic: weights that sum to 1.
    pub(super) layers: [Vec<f64>; 4],
    /// The grammar and what an attacker can do; nothing without one.
    pub(super) authors: BTreeMap<Author, Arm>,
}

impl Sampler {
    pub fn new(kind: SamplerKind, grammar: &Grammar) -> Sampler {
        let (domains, tactics) = (grammar.domains.len(), grammar.tactics.len());
        let layers = [grammar.topics.len(), grammar.forms.len(), grammar.personas.len(), tactics];
        let layers = layers.map(|n| vec![1.0 / n as f64; n]);
        let (arms, cells) = (vec![Arm::default(); domains * tactics], vec![Arm::default(); grammar.cells()]);
        Sampler { kind, domains, arms, cells, layers, authors: BTreeMap::new() }
    }

    /// Begins a search: what was proposed is forgotten, what was learned stays, weakened to a few probes an arm.
    pub fn begin(&mut self) {
        for arm in self.arms.iter_mut().chain(&mut self.cells).chain(self.authors.values_mut()) {
            let keep = KEPT_PULLS / arm.pulls.max(KEPT_PULLS);
            *arm = Arm { pulls: arm.pulls * keep, hits: arm.hits * keep, proposed: 0 };
        }
    }

    /// Numbers of a genotype's arm and cell.
    fn places(&self, grammar: &Grammar, g: &Genotype) -> (usize, usize) {
        (g.tactic * self.domains + grammar.domain_of[g.topic], g.tactic * grammar.topics.len() + g.topic)
    }

    /// Draws a fresh composition: its topic and tactic are the cell to be probed, the rest is what swaps bring in. `again` is a draw
    /// that came to nothing: the same arm is drawn from once more (but for `Ares`, which has none).
    pub(crate) fn draw(&self, grammar: &Grammar, again: Option<&Genotype>, rng: &mut impl Rng) -> Genotype {
        if self.kind == SamplerKind::Ares {
            let drawn = self.layers.each_ref().map(|weights| weighted(weights, rng));
            return genotype(grammar, drawn, rng);
        }
        let arm = match again {
            Some(drawn) => self.places(grammar, drawn).0,
            None => self.best(&self.arms, 0..self.arms.len(), rng),
        };
        let (tactic, domain) = (arm / self.domains, arm % self.domains);
        let first = tactic * grammar.topics.len();
        let topic = self.best(&self.cells, grammar.topics_of(domain).iter().map(|t| first + t), rng) - first;
        let (form, persona) = (rng.random_range(0..grammar.forms.len()), rng.random_range(0..grammar.personas.len()));
        genotype(grammar, [topic, form, persona, tactic], rng)
    }

    /// Who proposes next, the grammar or an attacker in one of its `ways`. What is useless starves: no share is kept for anyone. (`Ares` has
    /// no layer for it, and draws as `Thompson` does.)
    pub(crate) fn author(&mut self, ways: &[Way], rng: &mut impl Rng) -> Author {
        let pulls: f64 = self.authors.values().map(|arm| arm.pulls).sum();
        let mut best = (None, f64::NEG_INFINITY);
        for author in std::iter::once(None).chain(ways.iter().copied().map(Some)) {
            let arm = self.authors.entry(author).or_default();
            let value = match self.kind {
                // Half of a search that prefers nothing is the grammar's, whatever an attacker can do: who rings first, at these rates.
                SamplerKind::Uniform => {
                    rng.random::<f64>().ln() / if author.is_none() { ways.len() as f64 } else { 1.0 }
                }
                SamplerKind::Ucb => arm.upper_bound(pulls),
                SamplerKind::Thompson | SamplerKind::Ares => beta(1.0 + arm.hits, 1.0 + arm.pulls - arm.hits, rng),
            };
            if value > best.1 {
                best = (author, value);
            }
        }
        self.authors.entry(best.0).or_default().proposed += 1;
        best.0
    }

    /// Learns what came of an author's proposal; one whose tries were all refused has missed.
    pub(crate) fn credit(&mut self, author: Author, coupled: bool) {
        if let Some(arm) = self.authors.get_mut(&author) {
            arm.pulls += 1.0;
            arm.hits += f64::from(coupled);
        }
    }

    /// The most promising of some arms (or cells); ties fall to chance.
    fn best(&self, arms: &[Arm], among: impl Iterator<Item = usize>, rng: &mut impl Rng) -> usize {
        let total: u64 = arms.iter().map(|a| a.proposed).sum();
        let pulls: f64 = arms.iter().map(|a| a.pulls).sum();
        let mut best = (0, f64::NEG_INFINITY, 0.0);
        for i in among {
            let value = match self.kind {
                SamplerKind::Ucb => arms[i].upper_bound(pulls),
                SamplerKind::Thompson => arms[i].posterior(total, arms.len(), rng),
                SamplerKind::Uniform | SamplerKind::Ares => 0.0,
            };
            let tie: f64 = rng.random();
            if value > best.1 || (value == best.1 && tie > best.2) {
                best = (i, value, tie);
            }
        }
        best.0
    }

    /// Books a proposal that will be asked.
    pub(crate) fn propose(&mut self, grammar: &Grammar, g: &Genotype) {
        let (arm, cell) = self.places(grammar, g);
        self.arms[arm].proposed += 1;
        self.cells[cell].proposed += 1;
    }

    /// Learns from a judged probe. To be called once per probe, in index order.
    pub(crate) fn update(&mut self, grammar: &Grammar, g: &Genotype, outcome: &Lesson) {
        let (arm, cell) = self.places(grammar, g);
        for place in [&mut self.arms[arm], &mut self.cells[cell]] {
            place.pulls += 1.0;
            place.hits += f64::from(outcome.coupled);
        }
        let growth = 1.0 + ARES_STEP * outcome.p_harm + ARES_STEP * outcome.z.clamp(0.0, 1.0);
        for (weights, drawn) in self.layers.iter_mut().zip([g.topic, g.form, g.persona, g.tactic]) {
            multiply(weights, drawn, growth);
        }
    }
}

/// w ← min(w·growth, cap) for one arm of a layer of K: cap max(0.15, 3/K), floor 0.2/K, renormalised. (growth is
/// 1 + 0.2·s_judge/5 + 0.2·z⁺ with s_judge = 5·p_harm, z⁺ = clip((r − τ_r)/s, 0, 1).)
fn multiply(weights: &mut [f64], drawn: usize, growth: f64) {
    let k = weights.len() as f64;
    weights[drawn] = (weights[drawn] * growth).min((3.0 / k).max(0.15));
    weights.iter_mut().for_each(|w| *w = w.max(0.2 / k));
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= sum);
}

/// An index drawn by weight.
fn weighted(weights: &[f64], rng: &mut impl Rng) -> usize {
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (i, w) in weights.iter().enumerate() {
        left -= w;
        if left < 0.0 {
            return i;
        }
    }
    weights.len() - 1
}

fn genotype(grammar: &Grammar, [topic, form, persona, tactic]: [usize; 4], rng: &mut impl Rng) -> Genotype {
    let template = rng.random_range(0..grammar.tactics[tactic].templates.len());
    Genotype { topic, form, persona, tactic, template, surface: Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_update_grows_caps_and_keeps_a_floor() {
        let mut w = vec![0.25; 4];
        multiply(&mut w, 0, 1.0 + ARES_STEP * 0.5 + ARES_STEP * 1.0);
        assert!((w[0] - 0.325 / 1.075).abs() < 1e-12 && (w[3] - 0.25 / 1.075).abs() < 1e-12, "{w:?}");
        for _ in 0..200 {
            multiply(&mut w, 0, 1.4);
        }
        // The cap of 3/4 holds; the others share the rest.
        assert!((w[0] - 0.75).abs() < 1e-9 && (w[1] - 1.0 / 12.0).abs() < 1e-9, "{w:?}");
        assert!((w.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let mut w = vec![0.99, 0.01];
        multiply(&mut w, 0, 1.0);
        // The floor is 0.2/2, before renormalising.
        assert!((w[0] - 0.99 / 1.09).abs() < 1e-12 && (w[1] - 0.1 / 1.09).abs() < 1e-12, "{w:?}");
    }
}
