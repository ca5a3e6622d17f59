//! `ares detect`: prompts, or prompts with answers, in; verdicts out. What a row already carries is kept, so that answers and
//! scores made elsewhere can be audited with no model at all.

use serde_json::Value;

use super::data::read_as;
use super::interrupt;
use super::models::Scale;
use crate::detect::evaluate::measure_outcomes;
use crate::detect::measure::Measure;
use crate::detect::observe::{Observed, Versions, observe};
use crate::detect::outcome::Outcome;
use crate::detect::rows::{EvalRow, Kind};
use crate::detect::{Evaluator, Examiner};
use crate::error::{Error, Result};
use crate::judge::{Harm, Judge, JudgeSpec, Judges, Thresholds};
use crate::model::{Answer, Ask, Decoding, ModelSpec, Pretrained, Subject, Version};
use crate::ops::Ops;
use crate::text::{Prompt, Row};

/// Fields that a row gets.
pub(crate) type Added = Vec<(String, Value)>;

/// What `ares detect` was asked for. Models that the rows make unnecessary may be left out.
#[derive(Debug, Clone)]
pub(crate) struct DetectOptions {
    pub(crate) policy: Option<ModelSpec>,
    pub(crate) reward: Option<ModelSpec>,
    pub(crate) judge: Option<JudgeSpec>,
    pub(crate) second_judge: Option<JudgeSpec>,
    pub(crate) refusal: Option<JudgeSpec>,
    pub(crate) scale: Scale,
    pub(crate) tau_h: f64,
    pub(crate) prefill: Vec<usize>,
    pub(crate) max_new_tokens: usize,
    /// Packed rows of one forward at most; the backend's `BATCH` where it is not given.
    pub(crate) batch_tokens: Option<usize>,
    pub(crate) raw: bool,
    /// Of rows that do not say theirs.
    pub(crate) kind: Option<Kind>,
    pub(crate) seed: u64,
}

/// Models opened and threshold fixed; takes rows in portions.
pub(crate) struct Detector<'a, B: Ops> {
    options: &'a DetectOptions,
    examiner: Examiner<Available<B>>,
    pub(crate) thresholds: Thresholds,
    observed: Observed,
}

impl<B: Ops> Detector<'_, B> {
    pub(crate) fn open<'a>(ops: &B, options: &'a DetectOptions) -> Result<Detector<'a, B>> {
        let (interrupt, batch) = (interrupt::flag(), options.batch_tokens.unwrap_or(B::BATCH));
        let open = |spec: &ModelSpec| Pretrained::open(ops, spec, batch, interrupt.clone());
        let subject = Available {
            policy: options.policy.as_ref().map(open).transpose()?,
            reward: options.reward.as_ref().map(open).transpose()?,
        };
        subject.policy.as_ref().map_or(Ok(()), |model| model.transformer.config.expect_causal())?;
        subject.reward.as_ref().map_or(Ok(()), |model| model.transformer.config.expect_score())?;
        let judge = |spec: &Option<JudgeSpec>| spec.as_ref().map(|spec| spec.open(ops, batch, &interrupt)).transpose();
        let judges = Judges {
            judge: judge(&options.judge)?.unwrap_or_else(|| Box::new(Nobody)),
            second: judge(&options.second_judge)?,
            refusal: judge(&options.refusal)?,
            truth: None,
        };
        let examiner = Examiner::new(subject, judges, options.tau_h, options.max_new_tokens);
        let (examiner, thresholds) = match &options.scale {
            &Scale::Given { tau_r, mu_0, s } => (examiner, Thresholds { tau_h: options.tau_h, tau_r, mu_0, s }),
            Scale::Calibration(path) => {
                let evaluator = Evaluator::calibrate(examiner, read_as(path, Row::pair)?, options.seed)?;
                (evaluator.examiner, evaluator.thresholds)
            }
        };
        Ok(Detector { options, examiner, thresholds, observed: Observed::default() })
    }

    /// One outcome per row, in order; the row's own error where it is no row, or where something that it needs is missing. Under
    /// prefill, each outcome's row also gets `prefill`: length → outcome.
    pub(crate) fn look(&mut self, rows: &[Row]) -> Result<Vec<Result<Added>>> {
        let DetectOptions { kind, raw, prefill, .. } = self.options;
        let rendering = self.examiner.subject.policy.as_ref().map(|policy| &policy.rendering);
        let read: Vec<Result<EvalRow>> = rows.iter().map(|row| EvalRow::read(row, *kind, *raw, rendering)).collect();
        let good: Vec<EvalRow> = read.iter().flatten().cloned().collect();
        let versions = Versions { policy: Version::Current, reward: Version::Current };
        let found = observe(&mut self.examiner, versions, &self.thresholds, &good, prefill, true)?;
        let mut own = found.own.iter();
        let results = read.into_iter().zip(rows).map(|(read, row)| {
            read?;
            let outcome = own.next().ok_or_else(|| row.wrong("an outcome", "none"))?;
            if let Some(error) = &outcome.error {
                return Err(row.wrong("an answer, a judgement and a score", error));
            }
            let mut added: Added = outcome.to_object().into_iter().collect();
            added.extend(forced(&found, outcome));
            Ok(added)
        });
        let results = results.collect();
        self.observed.own.extend(found.own);
        for (k, outcomes) in found.prefill {
            self.observed.prefill.entry(k).or_default().extend(outcomes);
        }
        Ok(results)
    }

    /// What all rows looked at so far say together.
    pub(crate) fn measure(&self) -> Measure {
        measure_outcomes(&self.observed, self.options.seed)
    }
}

/// `prefill` of one row: length → what became of the forced answer.
fn forced(found: &Observed, own: &Outcome) -> Option<(String, Value)> {
    let of_row = found.prefill.iter().filter_map(|(k, outcomes)| {
        let outcome = outcomes.iter().find(|outcome| outcome.id == own.id)?;
        let kept = ["response", "p_harm", "reward", "verdict", "verdict_pairwise", "error"];
        let fields = outcome.to_object().into_iter().filter(|(key, _)| kept.contains(&key.as_str()));
        Some((k.to_string(), Value::Object(fields.collect())))
    });
    let of_row: serde_json::Map<String, Value> = of_row.collect();
    (!of_row.is_empty()).then(|| ("prefill".to_string(), of_row.into()))
}

/// Those of the two models that there are.
struct Available<B: Ops> {
    policy: Option<Pretrained<B>>,
    reward: Option<Pretrained<B>>,
}

/// Every row's own error: what it lacks, and which option would supply it.
fn lacking<T>(n: usize, what: &str, option: &str) -> Vec<Result<T>> {
    let error =
        || Error::Row { place: what.into(), expected: format!("it in the row, or {option}"), found: "neither".into() };
    (0..n).map(|_| Err(error())).collect()
}

impl<B: Ops> Subject for Available<B> {
    fn answer(&mut self, version: Version, asks: &[Ask], decoding: &Decoding) -> Result<Vec<Result<Answer>>> {
        match &mut self.policy {
            Some(policy) => policy.generate(version, asks, decoding),
            None => Ok(lacking(asks.len(), "response", "--policy")),
        }
    }

    fn reward(&mut self, version: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<f32>>> {
        match &mut self.reward {
            Some(reward) => reward.rewards(version, rows),
            None => Ok(lacking(rows.len(), "reward", "--reward")),
        }
    }

    fn logprob(&mut self, _: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<(f64, usize)>>> {
        Ok(lacking(rows.len(), "log-probability", "ares logprob"))
    }

    fn prompt_logprob(&mut self, prompts: &[&Prompt]) -> Result<Vec<Result<(f64, usize)>>> {
        Ok(lacking(prompts.len(), "log-probability", "ares logprob"))
    }
}

/// No judge was named.
struct Nobody;

impl Judge for Nobody {
    fn name(&self) -> &str {
        "nobody"
    }

    fn judge(&mut self, rows: &[(&Prompt, &str)], _: f64) -> Result<Vec<Result<Harm>>> {
        Ok(lacking(rows.len(), "p_harm", "--judge"))
    }
}
