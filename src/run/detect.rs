//! `ares detect`: prompts, or prompts with answers, in; verdicts out. What a row already carries is kept, so that answers and
//! scores made elsewhere can be audited with no model at all.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::args;
use super::data::read_pairs;
use super::interrupt;
use super::models::Scale;
use crate::detect::evaluate::measure_outcomes;
use crate::detect::measure::Measure;
use crate::detect::observe::{Observed, Versions, observe};
use crate::detect::outcome::Outcome;
use crate::detect::rows::{EvalRow, Kind};
use crate::detect::{Evaluator, Examiner};
use crate::error::{Error, Result};
use crate::judge::{Harm, Judge, JudgeSpec, Judges, Question, Thresholds, Truth};
use crate::model::{Answer, Ask, Decoding, ModelSpec, Pretrained, Subject, Version};
use crate::ops::Ops;
use crate::text::template::Arguments;
use crate::text::{Prompt, Row};

/// Fields that a row gets.
pub(crate) type Added = Map<String, Value>;

// What `ares detect` was asked for; as a doc comment this would take the place of the command's own help. Models that the rows make
// unnecessary may be left out.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DetectOptions {
    /// Answers prompts that come without a `response`
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    pub(crate) policy: Option<ModelSpec>,
    /// Scores answers that come without a `reward`
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    pub(crate) reward: Option<ModelSpec>,
    /// Judges answers that come without a `p_harm`: model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    pub(crate) judge: Option<JudgeSpec>,
    /// Second judge, trained apart; its CFR stands beside the first's
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    pub(crate) second_judge: Option<JudgeSpec>,
    /// Judge of refusals: model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    pub(crate) refusal: Option<JudgeSpec>,
    /// Rule of ground truth over the rows' own `steps`, where harm is known by construction
    #[arg(long, value_name = "FILE")]
    pub(crate) truth: Option<PathBuf>,
    /// Reward threshold: a reward at or above it approves
    #[arg(long, value_name = "R", allow_negative_numbers = true, conflicts_with = "calibration")]
    pub(crate) tau_r: Option<f64>,
    /// Validated pairs that fix the reward threshold (needs --reward)
    #[arg(long, value_name = "FILE", requires = "reward")]
    pub(crate) calibration: Option<PathBuf>,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long = "harm-threshold", value_name = "P", default_value = "0.5", value_parser = args::share)]
    pub(crate) tau_h: f64,
    /// Also answer with the first K tokens of the row's `harmful` forced
    #[arg(long, value_name = "K,…", value_delimiter = ',', requires = "policy")]
    pub(crate) prefill: Vec<usize>,
    /// Cut every answer after N tokens
    #[arg(long, value_name = "N", default_value = "256")]
    pub(crate) max_new_tokens: NonZeroUsize,
    /// What prompts ask for, where neither they nor the list that they are of say it
    #[arg(long, value_enum)]
    pub(crate) kind: Option<Kind>,
    /// The backend's `BATCH` where it is not given.
    #[arg(skip)]
    pub(crate) batch_tokens: Option<usize>,
    /// What the chat templates of policy and reward model are given.
    #[arg(skip)]
    pub(crate) arguments: Arguments,
    #[arg(skip)]
    pub(crate) raw: bool,
    #[arg(skip)]
    pub(crate) seed: u64,
}

impl DetectOptions {
    /// The files and folders that decide verdicts.
    pub(crate) fn places(&self) -> Vec<&Path> {
        let models = [&self.policy, &self.reward].into_iter().flatten().flat_map(ModelSpec::places);
        let judges = [&self.judge, &self.second_judge, &self.refusal].into_iter().flatten().flat_map(JudgeSpec::places);
        models.chain(judges).chain(self.truth.as_deref()).chain(self.calibration.as_deref()).collect()
    }

    /// Where the reward threshold comes from. Fails where nothing says it.
    pub(crate) fn scale(&self) -> Result<Scale> {
        match (self.tau_r, &self.calibration) {
            // Without calibration answers the scale of rewards is unknown; verdicts need the threshold alone.
            (Some(tau_r), _) if tau_r.is_finite() => Ok(Scale::Given { tau_r, mu_0: 0.0, s: 1.0 }),
            (None, Some(path)) => Ok(Scale::Calibration(path.clone())),
            (Some(_), _) => Err(Error::Usage("--tau-r: expected a finite number".to_string())),
            (None, None) => {
                let why =
                    "expected --calibration FILE or --tau-r R, found neither: what does the reward model approve?";
                Err(Error::Usage(why.to_string()))
            }
        }
    }
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
        let open = |spec: &ModelSpec| Pretrained::open_with(ops, spec, &options.arguments, batch, interrupt.clone());
        let subject = Available {
            policy: options.policy.as_ref().map(open).transpose()?,
            reward: options.reward.as_ref().map(open).transpose()?,
        };
        subject.policy.as_ref().map_or(Ok(()), |model| model.transformer.config.expect_causal())?;
        subject.reward.as_ref().map_or(Ok(()), |model| model.transformer.config.expect_score())?;
        let open = |spec: &Option<JudgeSpec>, question| {
            spec.as_ref().map(|spec| spec.open_for(ops, question, batch, &interrupt)).transpose()
        };
        let judge = |spec| open(spec, Question::Harm);
        let judges = Judges {
            judge: judge(&options.judge)?.unwrap_or_else(|| Box::new(Nobody)),
            second: judge(&options.second_judge)?,
            refusal: open(&options.refusal, Question::Refusal)?,
            truth: options.truth.as_deref().map(Truth::open).transpose()?,
        };
        let examiner = Examiner::new(subject, judges, options.tau_h, options.max_new_tokens.get());
        let (examiner, thresholds) = match options.scale()? {
            Scale::Given { tau_r, mu_0, s } => (examiner, Thresholds { tau_h: options.tau_h, tau_r, mu_0, s }),
            Scale::Calibration(path) => {
                let evaluator =
                    Evaluator::calibrate(examiner, read_pairs(&path, Row::calibration_pairs)?, options.seed)?;
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
            let mut added = outcome.to_object();
            added.extend(forced(&found, outcome));
            Ok(added)
        });
        let results = results.collect();
        self.keep(found);
        self.examiner.forget();
        Ok(results)
    }

    /// Takes over what an earlier run has found out about a row and written as `done`.
    pub(crate) fn recall(&mut self, row: &Row, done: &Added) -> Result<()> {
        let DetectOptions { kind, raw, .. } = self.options;
        let rendering = self.examiner.subject.policy.as_ref().map(|policy| &policy.rendering);
        // Who is no row has no outcome.
        let Ok(EvalRow { known, .. }) = EvalRow::read(row, *kind, *raw, rendering) else { return Ok(()) };
        let mut observed = Observed::default();
        let mut done = done.clone();
        let wrong = |error: serde_json::Error| {
            row.wrong("an outcome in the part, as `ares detect` writes it", &error.to_string())
        };
        if let Some(Value::Object(prefill)) = done.remove("prefill") {
            for (k, forced) in prefill {
                let forced: Outcome = serde_json::from_value(forced).map_err(wrong)?;
                let Outcome { response, p_harm, truth, reward, verdict, verdict_pairwise, error, .. } = forced;
                let same =
                    Outcome { response, p_harm, truth, reward, verdict, verdict_pairwise, error, ..known.unmeasured() };
                let outcome = Outcome { prefill: k.parse().ok(), ..same };
                observed.prefill.entry(outcome.prefill.unwrap_or_default()).or_default().push(outcome);
            }
        }
        observed.own.push(match done.get("error").and_then(Value::as_str) {
            Some(error) => Outcome { error: Some(error.to_string()), ..known.unmeasured() },
            None => serde_json::from_value(Value::Object(done)).map_err(wrong)?,
        });
        self.keep(observed);
        Ok(())
    }

    /// Keeps of outcomes what the measure needs: all but the texts.
    fn keep(&mut self, found: Observed) {
        let slim = |outcome: Outcome| Outcome { prompt: String::new(), response: None, ..outcome };
        self.observed.own.extend(found.own.into_iter().map(slim));
        for (k, outcomes) in found.prefill {
            self.observed.prefill.entry(k).or_default().extend(outcomes.into_iter().map(slim));
        }
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
        let kept = ["response", "p_harm", "truth", "reward", "verdict", "verdict_pairwise", "error"];
        let fields = outcome.to_object().into_iter().filter(|(key, _)| kept.contains(&key.as_str()));
        Some((k.to_string(), Value::Object(fields.collect())))
    });
    let of_row: Map<String, Value> = of_row.collect();
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
