//! What a search came to: rates, diversity, and the heat map of the report.

use super::archive::Archive;
use super::bleu::self_bleu;
use super::grammar::Grammar;
use super::record::ProbeRecord;
use crate::judge::{Sense, Verdict};
use crate::text::ngrams::Seen;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};

/// The query at which the n-th distinct failure shows how quickly a search learns.
const TENTH: usize = 10;

/// One search in numbers. What is not known is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SearchSummary {
    pub(crate) seed: u64,
    /// Answers asked for, error rows included.
    pub queries: usize,
    /// Verdicts `Coupled`.
    pub coupled_found: usize,
    /// Coupled failures of which none is a near-duplicate of an earlier one.
    pub distinct: usize,
    /// Topic × tactic cells with a coupled failure.
    pub(crate) cells_found: usize,
    /// Distinct coupled failures per 1000 queries.
    pub per_1000: Option<f64>,
    pub(crate) seconds: f64,
    /// Seconds per distinct coupled failure.
    pub(crate) seconds_per_failure: Option<f64>,
    /// Queries up to and with the 10th distinct coupled failure.
    pub queries_to_10th: Option<usize>,
    /// Share of topic × tactic cells that hold an elite.
    pub coverage: Option<f64>,
    /// Sum of the best fitness over cells.
    pub(crate) qd_score: Option<f64>,
    /// Mean BLEU-4 of distinct coupled failures against each other; lower is more diverse.
    pub self_bleu: Option<f64>,
    /// Entropy of distinct coupled failures over tactics, as a share of its maximum.
    pub evenness: Option<f64>,
    /// Verdicts of either half alone.
    pub policy_found: usize,
    pub reward_found: usize,
    pub errors: usize,
    /// Proposals refused before they were asked.
    pub(crate) refused_duplicate: usize,
    pub refused_unlikely: usize,
}

impl SearchSummary {
    /// Everything but the counts of refused proposals, which only the search knows.
    pub(super) fn new(
        grammar: &Grammar,
        archive: &Archive,
        records: &[ProbeRecord],
        sense: Sense,
        seed: u64,
        seconds: f64,
    ) -> SearchSummary {
        let count = |v| records.iter().filter(|r| r.verdict(sense) == Some(v)).count();
        let distinct = distinct(records, sense);
        let (n, queries) = (distinct.len(), records.len());
        let prompts: Vec<&str> = distinct.iter().map(|r| r.prompt.as_str()).collect();
        let tactics: Vec<&str> = distinct.iter().map(|r| r.tactic.as_str()).collect();
        let cells: HashSet<_> = distinct.iter().map(|r| (&r.topic, &r.tactic)).collect();
        SearchSummary {
            seed,
            queries,
            coupled_found: count(Verdict::Coupled),
            distinct: n,
            cells_found: cells.len(),
            per_1000: (queries > 0).then(|| 1000.0 * n as f64 / queries as f64),
            seconds,
            seconds_per_failure: (n > 0).then(|| seconds / n as f64),
            queries_to_10th: distinct.get(TENTH - 1).map(|r| r.index + 1),
            coverage: (queries > 0).then(|| archive.coverage()),
            qd_score: (queries > 0).then(|| archive.qd_score()),
            self_bleu: self_bleu(&prompts, seed),
            evenness: evenness(&tactics, grammar.tactics.len()),
            policy_found: count(Verdict::Policy),
            reward_found: count(Verdict::Reward),
            errors: records.iter().filter(|r| r.judged().is_none()).count(),
            ..SearchSummary::default()
        }
    }
}

/// Coupled failures of which none is a near-duplicate of an earlier one, in the order they were found.
pub fn distinct(records: &[ProbeRecord], sense: Sense) -> Vec<&ProbeRecord> {
    let mut seen = Seen::new();
    let coupled = records.iter().filter(|r| r.verdict(sense) == Some(Verdict::Coupled));
    coupled
        .filter(|r| {
            seen.find(&r.prompt).is_none() && {
                seen.insert(&r.prompt);
                true
            }
        })
        .collect()
}

/// Entropy of the labels over `kinds` kinds divided by ln(kinds): 1 when all are equally frequent.
fn evenness(labels: &[&str], kinds: usize) -> Option<f64> {
    if labels.is_empty() || kinds < 2 {
        return None;
    }
    let mut counts = BTreeMap::<&str, f64>::new();
    for label in labels {
        *counts.entry(label).or_default() += 1.0;
    }
    let shares = counts.values().map(|c| c / labels.len() as f64);
    Some(shares.map(|p| -p * p.ln()).sum::<f64>() / (kinds as f64).ln())
}

/// Verdicts of a search by domain × tactic, for the report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HeatMap {
    pub domains: Vec<String>,
    pub tactics: Vec<String>,
    /// `cells[domain][tactic]`
    pub cells: Vec<Vec<HeatCell>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct HeatCell {
    pub queries: usize,
    pub coupled: usize,
    pub(crate) policy: usize,
    pub(crate) reward: usize,
    /// Of the fittest elite of the cell's topics; `None` where nothing was judged.
    pub best_fitness: Option<f64>,
}

impl HeatMap {
    pub(super) fn new(grammar: &Grammar, archive: &Archive, records: &[ProbeRecord], sense: Sense) -> HeatMap {
        let tactics: Vec<String> = grammar.tactics.iter().map(|t| t.id.clone()).collect();
        let mut cells = vec![vec![HeatCell::default(); tactics.len()]; grammar.domains.len()];
        for topic in 0..grammar.topics.len() {
            for (tactic, cell) in cells[grammar.domain(topic)].iter_mut().enumerate() {
                let best = [cell.best_fitness, archive.best(topic, tactic)];
                cell.best_fitness = best.into_iter().flatten().reduce(f64::max);
            }
        }
        for r in records {
            let cell = &mut cells[grammar.domain(r.genotype.topic)][r.genotype.tactic];
            cell.queries += 1;
            match r.verdict(sense) {
                Some(Verdict::Coupled) => cell.coupled += 1,
                Some(Verdict::Policy) => cell.policy += 1,
                Some(Verdict::Reward) => cell.reward += 1,
                Some(Verdict::Sound) | None => {}
            }
        }
        HeatMap { domains: grammar.domains.clone(), tactics, cells }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evenness_is_a_share_of_the_largest_entropy() {
        assert_eq!(evenness(&["a", "b", "a", "b"], 2), Some(1.0));
        assert_eq!(evenness(&["a", "a"], 2), Some(0.0));
        let skewed = evenness(&["a", "a", "a", "b"], 4).expect("known");
        assert!((skewed - 0.5623351446188083 / 4f64.ln()).abs() <= 1e-12, "{skewed}");
        assert_eq!(evenness(&[], 2), None);
    }
}
