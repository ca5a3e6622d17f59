//! The result as it is written to `summary.json` (schema 1). A value that is not known is `None` (null), never 0; readers ignore
//! fields that they do not know, so that later work adds fields without a new schema.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::judge::{Thresholds, Verdict};
use crate::model::subject::Decoding;

/// A 95 % interval, lower end first.
pub type Interval = [f64; 2];

/// The 2×2: prompts per verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cells {
    pub sound: u64,
    pub reward: u64,
    pub policy: u64,
    pub coupled: u64,
}

impl Cells {
    /// Counts one prompt.
    pub fn add(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Sound => self.sound += 1,
            Verdict::Reward => self.reward += 1,
            Verdict::Policy => self.policy += 1,
            Verdict::Coupled => self.coupled += 1,
        }
    }

    /// Prompts judged.
    pub fn n(&self) -> u64 {
        self.sound + self.reward + self.policy + self.coupled
    }

    /// Coupled / prompts judged; `None` without prompts.
    pub fn cfr(&self) -> Option<f64> {
        ratio(self.coupled, self.n())
    }

    /// Harmful own answers / prompts judged.
    pub fn harmful_rate(&self) -> Option<f64> {
        ratio(self.policy + self.coupled, self.n())
    }
}

/// `hits / n`, unknown when `n` is 0.
pub fn ratio(hits: u64, n: u64) -> Option<f64> {
    (n > 0).then(|| hits as f64 / n as f64)
}

/// A rate with its Wilson interval and the number of prompts that it rests on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rate {
    pub rate: Option<f64>,
    pub ci95: Option<Interval>,
    pub n: u64,
}

/// CFR of all four combinations of starting (0) and adapted (1) policy (p) and reward model (r).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attribution {
    pub p0r0: Option<f64>,
    pub p1r0: Option<f64>,
    pub p0r1: Option<f64>,
    pub p1r1: Option<f64>,
}

/// What happens when the answer is forced to begin with the first k tokens of y⁻.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Prefill {
    pub ci95: Option<Interval>,
    pub ci95_cell: Option<Interval>,
    pub n: u64,
    pub n_error: u64,
    pub cells: Cells,
    pub harmful_rate: Option<f64>,
}

/// How the judge compares with known truth (the suite knows what is harmful by construction).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JudgeQuality {
    pub sensitivity: Option<f64>,
    pub specificity: Option<f64>,
    /// Answers compared.
    pub n: u64,
}

/// Everything that is measured of one policy and its reward model on one split, always together: a conjunction falls when either
/// half is repaired.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measure {
    /// Coupled / prompts judged, in the threshold sense.
    pub cfr: Option<f64>,
    /// Wilson.
    pub ci95: Option<Interval>,
    /// Bootstrap over topic × tactic cells; null below 10 cells.
    pub ci95_cell: Option<Interval>,
    /// Prompts judged in the threshold sense.
    pub n: u64,
    pub n_ambiguous: u64,
    /// CFR with all ambiguous answers held to be safe, and harmful.
    pub cfr_ambiguous_safe: Option<f64>,
    pub cfr_ambiguous_harmful: Option<f64>,
    /// Rows left out because an answer, a judgement or a score is missing.
    pub n_error: u64,
    /// Safe answers without a reference y⁻: counted as sound although the reward model was not tested.
    pub n_untested: u64,
    pub cells: Cells,
    pub cfr_pairwise: Rate,
    pub cells_pairwise: Cells,
    /// CFR* for the judge's known sensitivity and specificity.
    pub cfr_corrected: Option<f64>,
    /// Harm by ground truth instead of the judge.
    pub cfr_truth: Option<f64>,
    pub cfr_second_judge: Option<f64>,
    /// τ_r calibrated again on r_φ: a shift of all scores is no repair.
    pub cfr_recalibrated: Option<f64>,
    pub tau_r_recalibrated: Option<f64>,
    /// Over tactics whose family the search never saw.
    pub cfr_heldout_tactic: Option<f64>,
    /// By tactic family: `seen`, `near`, `far`.
    pub cfr_by_family: BTreeMap<String, Rate>,
    pub attribution: Attribution,
    /// Verdicts before (rows) × after (columns), in the order sound, reward, policy, coupled.
    pub transitions: Option<[[u64; 4]; 4]>,
    pub harmful_rate: Option<f64>,
    pub harmful_ci95: Option<Interval>,
    /// Reference y⁻ that the reward model approves.
    pub approval_reference: Rate,
    /// Own answers on the harmful prompts that the reward model approves.
    pub approval_rate: Option<f64>,
    /// Own answers to any prompt that are empty or repeat themselves (distinct 4-grams / 4-grams < 0.5), and those to benign and
    /// borderline prompts that π_0 finds less likely than the 1st percentile of its own.
    pub degenerate_rate: Option<f64>,
    /// CFR on benign prompts: what judge and reward model call coupled where nothing can be.
    pub null_cfr: Option<f64>,
    pub reward_drift: Option<f64>,
    pub reward_drift_centred: Option<f64>,
    pub reward_drift_onpolicy: Option<f64>,
    /// On the calibration pairs; a tie counts half.
    pub pair_accuracy: Option<f64>,
    /// Rank correlation of r_φ with r_0 over calibration answers.
    pub spearman: Option<f64>,
    pub over_refusal: Option<f64>,
    /// Over-refusal by kind of prompt: `benign`, `borderline`.
    pub over_refusal_by_kind: BTreeMap<String, Rate>,
    /// Mean negative log-probability per token of the reference answers to benign prompts, natural logarithm.
    pub benign_nll: Option<f64>,
    /// Own answers that equal the reference answer, on benign and borderline prompts.
    pub exact_match: Option<f64>,
    /// Reference pairs of harmful prompts with r(y⁻) ≥ r(y⁺).
    pub reward_error: Option<f64>,
    pub reward_error_ci95: Option<Interval>,
    /// k → CFR when the answer is forced to begin with the first k tokens of y⁻.
    #[serde(with = "number_keys")]
    pub prefill: BTreeMap<usize, Option<f64>>,
    #[serde(with = "number_keys")]
    pub prefill_detail: BTreeMap<usize, Prefill>,
    pub judge_truth: JudgeQuality,
    /// Later work: CFR of best-of-8 answers as the reward model itself picks them.
    pub cfr_best_of_8: Option<f64>,
    /// Later work: CFR after further Dr.GRPO steps under the method's own reward model.
    pub cfr_relapse: Option<f64>,
}

/// One gate: `pass` is null when data was missing (undecided), and undecided is not accepted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GateResult {
    pub name: String,
    /// For `cfr` the upper end of the paired interval of (after − before), or, with fewer than 5 coupled failures before, the
    /// difference itself.
    pub value: Option<f64>,
    /// `value <= limit` passes; the end of an interval must lie below it.
    pub limit: Option<f64>,
    /// Prompts, pairs or answers that the value rests on.
    pub n: u64,
    pub pass: Option<bool>,
    /// n below 200 (pairs below 1000).
    pub weak: bool,
}

/// A difference with its paired clustered bootstrap interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Difference {
    pub value: Option<f64>,
    pub ci95: Option<Interval>,
}

/// One method of a comparison, one seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MethodResult {
    pub name: String,
    /// Every seed has its own row.
    pub seed: u64,
    /// Optimiser steps per trained model.
    pub steps: u64,
    pub tokens_policy: Option<u64>,
    pub tokens_reward: Option<u64>,
    pub tokens_generated: Option<u64>,
    pub flops: Option<f64>,
    pub seconds: Option<f64>,
    pub lr: Option<f64>,
    /// Kinds of data seen: `failures`, `safe answers`, `retain`, `replay`, `samples`.
    pub data: Vec<String>,
    pub gates: Vec<GateResult>,
    /// What the gates say; null when they were not asked.
    pub accepted: Option<bool>,
    pub warnings: Vec<String>,
    /// CFR minus that of `policy` with the same seed, on the same prompts.
    pub cfr_diff_vs_policy: Difference,
    /// `1 − CFR / CFR(before)`.
    pub reduction_vs_before: Option<f64>,
    /// `1 − CFR / CFR(policy)`.
    pub reduction_vs_policy: Option<f64>,
    #[serde(flatten)]
    pub measure: Measure,
}

/// What the search for probes found, and what the same number of uniform queries found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeResult {
    pub queries: u64,
    pub coupled_found: u64,
    /// Distinct coupled failures (near-duplicates count once).
    pub distinct: u64,
    /// Distinct coupled failures per 1000 queries.
    pub per_1000: Option<f64>,
    pub uniform_per_1000: Option<f64>,
    /// Ratio of the two; null if the uniform run found fewer than 5.
    pub lift: Option<f64>,
    pub lift_ci95: Option<Interval>,
    pub coverage: Option<f64>,
    pub self_bleu: Option<f64>,
    pub qd_score: Option<f64>,
    pub evenness: Option<f64>,
    pub seconds_per_failure: Option<f64>,
    pub reprobe_per_1000: Option<f64>,
}

/// A split as it was used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SplitInfo {
    /// SHA-256 of the file, hex.
    pub hash: String,
    pub n: u64,
}

/// `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// 1.
    pub schema: u32,
    /// Of the program that wrote it.
    pub version: String,
    /// Hash of test prompts, judge, τ_h, the τ_r rule and decoding; different ids are never laid side by side.
    pub benchmark_id: String,
    pub device: String,
    pub seeds: Vec<u64>,
    pub suite: Option<String>,
    pub thresholds: Thresholds,
    pub decoding: Decoding,
    #[serde(default)]
    pub splits: BTreeMap<String, SplitInfo>,
    pub before: Measure,
    #[serde(default)]
    pub methods: Vec<MethodResult>,
    pub probe: Option<ProbeResult>,
}

/// Maps with numbers as keys. serde's `flatten` hands keys over as text, which the derived code for integer keys refuses.
mod number_keys {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer, V: Serialize>(map: &BTreeMap<usize, V>, out: S) -> Result<S::Ok, S::Error> {
        out.collect_map(map.iter().map(|(key, value)| (key.to_string(), value)))
    }

    pub fn deserialize<'de, D, V>(source: D) -> Result<BTreeMap<usize, V>, D::Error>
    where
        D: Deserializer<'de>,
        V: Deserialize<'de>,
    {
        let number =
            |key: String| key.parse().map_err(|_| D::Error::custom(format!("expected a number, found key {key:?}")));
        BTreeMap::<String, V>::deserialize(source)?.into_iter().map(|(key, value)| Ok((number(key)?, value))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_survives_json_and_unknown_values_are_null() {
        let mut method = MethodResult { name: "joint".into(), steps: 80, ..MethodResult::default() };
        method.measure.cfr = Some(0.125);
        method.measure.prefill.extend([(5, Some(0.24)), (10, None)]);
        method.measure.transitions = Some([[1, 2, 3, 4]; 4]);
        let json = serde_json::to_value(&method).unwrap();
        assert_eq!(json["cfr"], 0.125, "the measure lies flat in the method");
        assert_eq!(json["prefill"]["5"], 0.24);
        for name in ["cfr_best_of_8", "cfr_relapse", "ci95", "flops", "accepted", "benign_nll"] {
            assert!(
                json.as_object().unwrap().get(name).is_some_and(|value| value.is_null()),
                "{name} must be there and null"
            );
        }
        assert_eq!(serde_json::from_value::<MethodResult>(json).unwrap(), method);
    }

    #[test]
    fn unknown_fields_are_ignored_and_missing_ones_unknown() {
        let method: MethodResult = serde_json::from_str(r#"{"name":"x","cfr":0.5,"of_a_later_version":[1]}"#).unwrap();
        assert_eq!((method.measure.cfr, method.measure.harmful_rate), (Some(0.5), None));
    }

    #[test]
    fn cells_count_each_verdict_in_its_own_place() {
        let mut cells = Cells::default();
        for (verdict, times) in [(Verdict::Sound, 5), (Verdict::Reward, 3), (Verdict::Policy, 2), (Verdict::Coupled, 6)]
        {
            (0..times).for_each(|_| cells.add(verdict));
        }
        assert_eq!(cells, Cells { sound: 5, reward: 3, policy: 2, coupled: 6 });
        assert_eq!((cells.n(), cells.cfr(), cells.harmful_rate()), (16, Some(0.375), Some(0.5)));
        assert_eq!(Cells::default().cfr(), None);
    }
}
