//! All measures of a policy and its reward model on one split.
//!
//! [`Evaluator::calibrate`] fixes τ_r and the scale on r_0; [`Evaluator::before`] measures the originals;
//! [`Evaluator::after`] measures what a repair made of them. What was found out about the originals is kept and shared by
//! every method that is compared.

mod compare;
mod failures;
mod helpful;
mod pairs;
mod sampled;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::detect::examiner::Examiner;
use crate::detect::measure::{Measure, ratio};
use crate::detect::observe::{Observed, Versions, observe};
use crate::detect::outcome::Outcome;
use crate::detect::rows::EvalRow;
use crate::error::{Error, Result};
use crate::judge::Thresholds;
use crate::model::subject::{Decoding, Subject};
use crate::text::rows::Preference;

pub(crate) use compare::{cfr_difference, paired_difference, relate};
pub(crate) use failures::measure_outcomes;
use pairs::Pairs;
pub(crate) use sampled::Sampled;

/// Above this share of error rows: a warning.
const ERRORS_WARN: f64 = 0.01;
/// Above this share of error rows: a failure.
const ERRORS_FAIL: f64 = 0.05;

/// How many rows the measures rest on that are not counted in the measure itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) benign: u64,
    pub(crate) refusal: u64,
    pub(crate) judge_truth: u64,
    pub(crate) degenerate: u64,
    pub(crate) benign_nll: u64,
    pub(crate) second_judge: u64,
    pub(crate) pairs: u64,
    /// Validated answers of the fixed drift.
    pub(crate) drift: u64,
    /// Rows and pairs looked at, and those of them with an error.
    pub(crate) rows: u64,
    pub(crate) errors: u64,
}

/// The measures and what they were computed from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Evaluation {
    pub(crate) measure: Measure,
    pub(crate) counts: Counts,
    /// One per row, in order.
    pub(crate) outcomes: Vec<Outcome>,
    /// Under prefill: one per harmful row with a reference y⁻.
    pub(crate) prefill: BTreeMap<usize, Vec<Outcome>>,
    pub(crate) warnings: Vec<String>,
    /// The 1st percentile of ℓ_0 over the originals' answers to benign and borderline prompts: below it an answer to such a prompt
    /// counts as degenerate.
    pub(crate) least_logprob: Option<f64>,
}

impl Evaluation {
    /// Share of rows with an error.
    pub(crate) fn error_rate(&self) -> Option<f64> {
        ratio(self.counts.errors, self.counts.rows)
    }

    /// More than 5 % of the rows are error rows: the measures say nothing.
    pub(crate) fn failed(&self) -> bool {
        // Written so that "not known" fails.
        !self.error_rate().is_some_and(|rate| rate <= ERRORS_FAIL)
    }

    /// The first error, and how many there are among how many rows.
    fn errors(&self) -> (&str, String) {
        let first = self.outcomes.iter().find_map(|outcome| outcome.error.as_deref());
        (first.unwrap_or("a pair could not be scored"), format!("{} of {}", self.counts.errors, self.counts.rows))
    }

    fn failure(&self) -> Error {
        let (first, share) = self.errors();
        Error::Data {
            what: "evaluation".into(),
            expected: "at most 5 % of the rows with an error".into(),
            found: format!("{share}; the first: {first}"),
            remedy: "see the `error` fields of the outcomes".into(),
        }
    }

    fn warn(&mut self) {
        let mut warnings = Vec::new();
        if self.error_rate().is_some_and(|rate| rate > ERRORS_WARN) {
            let (first, share) = self.errors();
            warnings.push(format!("{share} rows could not be measured and are left out; the first: {first}"));
        }
        if self.measure.n_untested > 0 {
            let n = self.measure.n_untested;
            warnings.push(format!(
                "{n} safe answers without a reference y⁻ count as sound: nothing tested the reward model"
            ));
        }
        if self.measure.tau_r_recalibrated.is_none() {
            let what = "the reward model's scores no longer separate the calibration pairs: no recalibrated CFR";
            warnings.push(what.into());
        }
        self.warnings = warnings;
    }
}

/// Measures one comparison: models and judges, calibration pairs, and everything already found out.
pub struct Evaluator<S> {
    pub examiner: Examiner<S>,
    pub thresholds: Thresholds,
    /// Of τ_r on the calibration pairs.
    pub(crate) balanced_accuracy: f64,
    pairs: Pairs,
    /// Seeds the bootstraps.
    seed: u64,
}

impl<S: Subject + 'static> Evaluator<S> {
    /// Scores the calibration pairs by r_0, fixes τ_r, μ_0 and s, and marks the answers that r_0 has wrong. More than 5 % of pairs
    /// with an error are a failure.
    pub fn calibrate(mut examiner: Examiner<S>, rows: Vec<Preference>, seed: u64) -> Result<Evaluator<S>> {
        let (pairs, thresholds, balanced_accuracy) = Pairs::calibrate(&mut examiner, rows)?;
        Ok(Evaluator { examiner, thresholds, balanced_accuracy, pairs, seed })
    }

    /// Measures π_0 and r_0 on a split; `prefill` are the lengths to force (none on `gate`, 5 at least on `test`). More than 5 % of
    /// error rows are a failure.
    pub(crate) fn before(&mut self, rows: &[EvalRow], prefill: &[usize]) -> Result<Evaluation> {
        let evaluation = self.measure(Versions::START, rows, prefill, None)?;
        if evaluation.failed() { Err(evaluation.failure()) } else { Ok(evaluation) }
    }

    /// Measures the adapted models, of which `versions` says which were trained: the other one is its original and is not asked
    /// again. The rows are those of `before`. With more than 5 % of error rows the evaluation is returned nevertheless,
    /// [`Evaluation::failed`] and with a warning: a repair that ruined its models is rolled back, not fatal.
    pub(crate) fn after(
        &mut self,
        versions: Versions,
        rows: &[EvalRow],
        prefill: &[usize],
        before: &Evaluation,
    ) -> Result<Evaluation> {
        if !rows.iter().map(|row| &row.known.id).eq(before.outcomes.iter().map(|old| &old.id)) {
            return Err(Error::Shape {
                op: "evaluation",
                expected: format!("the {} rows that were measured before", before.outcomes.len()),
                found: format!("{} other rows", rows.len()),
            });
        }
        self.measure(versions, rows, prefill, Some(before))
    }

    fn measure(
        &mut self,
        versions: Versions,
        rows: &[EvalRow],
        prefill: &[usize],
        before: Option<&Evaluation>,
    ) -> Result<Evaluation> {
        let thresholds = self.thresholds;
        let examiner: &mut Examiner = &mut self.examiner;
        let mut observed = observe(examiner, versions, &thresholds, rows, prefill, false)?;
        let floor = before.and_then(|before| before.least_logprob);
        let least_logprob = helpful::mark_degenerate(examiner, rows, &mut observed.own, floor)?;

        let measure = measure_outcomes(&observed, self.seed);
        let Observed { own: outcomes, prefill } = observed;
        let (counts, warnings) = (Counts::default(), Vec::new());
        let mut found = Evaluation { measure, counts, outcomes, prefill, warnings, least_logprob };
        helpful::measure(&mut found);
        helpful::benign_nll(examiner, versions.policy, rows, &mut found)?;
        self.pairs.measure(examiner, versions.reward, thresholds.s, &mut found)?;
        helpful::preferences(examiner, versions.reward, rows, &mut found)?;
        failures::recalibrated(&mut found);
        match before {
            None => found.measure.attribution.p0r0 = found.measure.cfr,
            Some(before) => {
                failures::attribution(examiner, versions, rows, &before.outcomes, &mut found)?;
                failures::transitions(&before.outcomes, &mut found);
            }
        }
        let start = before.map_or(&found.outcomes, |before| &before.outcomes);
        found.measure.reward_drift_onpolicy = helpful::drift_on_policy(start, &found.outcomes, thresholds.s);
        let seen = || found.outcomes.iter().chain(found.prefill.values().flatten());
        found.counts.rows += seen().count() as u64;
        found.counts.errors += seen().filter(|outcome| outcome.error.is_some()).count() as u64;
        found.warn();
        Ok(found)
    }
}

/// What makes results comparable: a hash of the test prompts, of the models and judges (`models` is one of all their files), τ_h,
/// the rule for τ_r and the decoding.
pub(crate) fn benchmark_id(test: &[EvalRow], models: &str, tau_h: f64, decoding: &Decoding) -> String {
    const TAU_R_RULE: &str = "midpoint of the widest plateau of best balanced accuracy, lowest on a tie";
    let mut hash = Sha256::new();
    let mut part = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    test.iter().for_each(|row| part(&format!("{:?}", row.prompt)));
    [models, &tau_h.to_string(), TAU_R_RULE, &format!("{decoding:?}")].into_iter().for_each(&mut part);
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
