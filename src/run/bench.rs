//! Policy, reward model and judges, open and calibrated: what every command of the method begins with.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::interrupt;
use super::manifest::Manifest;
use super::watch::Watch;
use crate::detect::evaluate::{Evaluator, Settings};
use crate::detect::rows::PairRow;
use crate::error::Result;
use crate::judge::{JudgeSpec, Judges};
use crate::model::{ModelSpec, Pair, Pretrained};
use crate::ops::Ops;
use crate::text::rows::read;

/// Which models work together, and what they all share.
#[derive(Debug, Clone)]
pub struct Models {
    pub policy: ModelSpec,
    pub reward: ModelSpec,
    pub judge: JudgeSpec,
    pub second_judge: Option<JudgeSpec>,
    pub refusal: Option<JudgeSpec>,
    pub truth: Option<JudgeSpec>,
    /// Harmful means `p_harm >= tau_h`.
    pub tau_h: f64,
    pub max_new_tokens: usize,
    /// Packed rows of one forward at most.
    pub batch_tokens: usize,
}

/// The same as run.toml keeps it.
#[derive(Serialize)]
pub(super) struct Receipt {
    policy: String,
    reward: String,
    judge: String,
    second_judge: Option<String>,
    refusal: Option<String>,
    truth: Option<String>,
    tau_h: f64,
    max_new_tokens: usize,
    batch_tokens: usize,
}

impl Models {
    pub(super) fn receipt(&self) -> Receipt {
        let model = |spec: &ModelSpec| match &spec.adapter {
            None => spec.dir.display().to_string(),
            Some(adapter) => format!("{}+{}", spec.dir.display(), adapter.display()),
        };
        let judge = |spec: &JudgeSpec| match spec {
            JudgeSpec::Model(dir) => format!("model:{}", dir.display()),
            JudgeSpec::Lexicon(file) => format!("lexicon:{}", file.display()),
        };
        Receipt {
            policy: model(&self.policy),
            reward: model(&self.reward),
            judge: judge(&self.judge),
            second_judge: self.second_judge.as_ref().map(judge),
            refusal: self.refusal.as_ref().map(judge),
            truth: self.truth.as_ref().map(judge),
            tau_h: self.tau_h,
            max_new_tokens: self.max_new_tokens,
            batch_tokens: self.batch_tokens,
        }
    }

    /// Hashes every file that these models are read from.
    pub(super) fn add_inputs(&self, manifest: &mut Manifest) -> Result<()> {
        let mut places: Vec<&PathBuf> = Vec::new();
        for spec in [&self.policy, &self.reward] {
            places.push(&spec.dir);
            places.extend(&spec.adapter);
        }
        let others = [&self.second_judge, &self.refusal, &self.truth].into_iter().flatten();
        places.extend([&self.judge].into_iter().chain(others).map(|spec| match spec {
            JudgeSpec::Model(place) | JudgeSpec::Lexicon(place) => place,
        }));
        places.into_iter().try_for_each(|place| manifest.add_model(place))
    }
}

/// Everything open, thresholds fixed.
pub(super) struct Bench<B: Ops> {
    pub pair: Pair<B>,
    pub judges: Judges,
    pub evaluator: Evaluator,
}

impl<B: Ops> Bench<B> {
    /// Opens the models and fixes τ_r and the scale of rewards on `calibration`.
    pub fn open(
        ops: &B,
        models: &Models,
        calibration: Vec<PairRow>,
        seed: u64,
        watch: &mut dyn Watch,
    ) -> Result<Bench<B>> {
        watch.begin("calibrate", 0);
        let interrupt = interrupt::flag();
        let open = |spec: &ModelSpec| Pretrained::open(ops, spec, models.batch_tokens, interrupt.clone());
        let mut pair = Pair::new(open(&models.policy)?, open(&models.reward)?)?;
        let judge = |spec: &JudgeSpec| spec.open(ops, models.batch_tokens, &interrupt);
        let also = |spec: &Option<JudgeSpec>| spec.as_ref().map(judge).transpose();
        let mut judges = Judges {
            judge: judge(&models.judge)?,
            second: also(&models.second_judge)?,
            refusal: also(&models.refusal)?,
            truth: also(&models.truth)?,
        };
        let settings = Settings { tau_h: models.tau_h, ..Settings::new(models.max_new_tokens, seed) };
        let n = calibration.len();
        let evaluator = Evaluator::calibrate(&mut pair, &mut judges, calibration, settings)?;
        watch.end(&format!(
            "reward threshold {:.3}, balanced accuracy {:.1} % on {n} pairs",
            evaluator.thresholds().tau_r,
            100.0 * evaluator.calibration().balanced_accuracy,
        ));
        Ok(Bench { pair, judges, evaluator })
    }
}

/// Validated pairs, read strictly: a broken row would move the threshold.
pub(super) fn pairs(path: &Path) -> Result<Vec<PairRow>> {
    read(Some(path), true)?.iter().map(|row| PairRow::from_object(&row.object, &row.place())).collect()
}
