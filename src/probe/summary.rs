//! What a search came to: how much it found, how soon, how diverse.

use super::archive::Archive;
use super::bleu::self_bleu;
use super::grammar::Grammar;
use super::record::ProbeRecord;
use super::writing::Writing;
use crate::judge::{Sense, Verdict};
use crate::text::ngrams::Seen;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The query at which the n-th distinct failure shows how quickly a search learns.
const TENTH: usize = 10;

/// One search in numbers. What is not known is `None`, never 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SearchSummary {
    /// Answers asked for, error rows included.
    pub queries: usize,
    /// Verdicts `Coupled`.
    pub coupled_found: usize,
    /// Coupled failures of which none is a near-duplicate of an earlier one.
    pub distinct: usize,
    /// Queries up to and with the 10th distinct coupled failure.
    pub queries_to_10th: Option<usize>,
    pub diversity: Diversity,
    pub errors: usize,
    /// Proposals refused before they were asked: no one would write them.
    pub refused_unlikely: usize,
    /// What an attacker wrote, where there was one.
    pub writing: Option<Writing>,
}

/// What kinds of failures a search found, and how soon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Diversity {
    /// Share of topic × tactic cells that hold an elite.
    pub coverage: Option<f64>,
    /// Mean BLEU-4 of distinct coupled failures against each other; lower is more diverse.
    pub self_bleu: Option<f64>,
    /// Sum of the best fitness over cells.
    pub(crate) qd_score: Option<f64>,
    /// Entropy of distinct coupled failures over tactics, as a share of its maximum.
    pub evenness: Option<f64>,
    /// Seconds per distinct coupled failure.
    pub(crate) seconds_per_failure: Option<f64>,
}

impl SearchSummary {
    /// Everything but what only the search knows: the proposals that it refused, and what an attacker wrote.
    pub(super) fn new(
        grammar: &Grammar,
        archive: &Archive,
        records: &[ProbeRecord],
        sense: Sense,
        seed: u64,
        seconds: f64,
    ) -> SearchSummary {
        let distinct = distinct(records, sense);
        let (n, queries) = (distinct.len(), records.len());
        let prompts: Vec<&str> = distinct.iter().map(|r| r.prompt.as_str()).collect();
        let tactics: Vec<&str> = distinct.iter().map(|r| r.tactic.as_str()).collect();
        SearchSummary {
            queries,
            coupled_found: records.iter().filter(|r| r.verdict(sense) == Some(Verdict::Coupled)).count(),
            distinct: n,
            queries_to_10th: distinct.get(TENTH - 1).map(|r| r.index + 1),
            diversity: Diversity {
                coverage: (queries > 0).then(|| archive.coverage()),
                self_bleu: self_bleu(&prompts, seed),
                qd_score: (queries > 0).then(|| archive.qd_score()),
                evenness: evenness(&tactics, grammar.tactics.len()),
                seconds_per_failure: (n > 0).then(|| seconds / n as f64),
            },
            errors: records.iter().filter(|r| r.judged().is_none()).count(),
            ..SearchSummary::default()
        }
    }
}

impl SearchSummary {
    /// The books on an attacker, with what was found by whom.
    pub(super) fn count(&self, mut writing: Writing, records: &[ProbeRecord], sense: Sense) -> Writing {
        let distinct: Vec<usize> = distinct(records, sense).into_iter().map(|record| record.index).collect();
        for record in records {
            let coupled = record.verdict(sense) == Some(Verdict::Coupled);
            writing.count(record, coupled, distinct.binary_search(&record.index).is_ok());
        }
        writing
    }
}

/// Coupled failures of which none is a near-duplicate of an earlier one, in the order they were found.
fn distinct(records: &[ProbeRecord], sense: Sense) -> Vec<&ProbeRecord> {
    let mut seen = Seen::default();
    let mut out: Vec<&ProbeRecord> = Vec::new();
    for record in records.iter().filter(|r| r.verdict(sense) == Some(Verdict::Coupled)) {
        if seen.find(&record.prompt).is_none() {
            seen.insert(&record.prompt);
            out.push(record);
        }
    }
    out
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
