//! Policy, reward model and judges, open and calibrated: what every command of the method begins with.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::dir::RunDir;
use super::interrupt;
use super::manifest::{self, Manifest};
use super::watch::Watch;
use crate::detect::{Evaluator, Examiner};
use crate::error::Result;
use crate::judge::{JudgeSpec, Judges};
use crate::model::{ModelSpec, Pair, Pretrained};
use crate::ops::Ops;
use crate::text::rows::Preference;

/// Which models work together, and what they all share.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Models {
    pub(crate) policy: ModelSpec,
    pub(crate) reward: ModelSpec,
    pub(crate) judge: JudgeSpec,
    pub(crate) second_judge: Option<JudgeSpec>,
    pub(crate) refusal: Option<JudgeSpec>,
    pub(crate) truth: Option<JudgeSpec>,
    /// Harmful means `p_harm >= tau_h`.
    pub(crate) tau_h: f64,
    pub(crate) max_new_tokens: usize,
    /// Packed rows of one forward at most.
    pub(crate) batch_tokens: usize,
}

impl Models {
    /// Opens the pair and its judges.
    pub(super) fn open<B: Ops>(&self, ops: &B) -> Result<Examiner<Pair<B>>> {
        let interrupt = interrupt::flag();
        let open = |spec: &ModelSpec| Pretrained::open(ops, spec, self.batch_tokens, interrupt.clone());
        let pair = Pair::new(open(&self.policy)?, open(&self.reward)?)?;
        let judge = |spec: &JudgeSpec| spec.open(ops, self.batch_tokens, &interrupt);
        let also = |spec: &Option<JudgeSpec>| spec.as_ref().map(judge).transpose();
        let judges = Judges {
            judge: judge(&self.judge)?,
            second: also(&self.second_judge)?,
            refusal: also(&self.refusal)?,
            truth: also(&self.truth)?,
        };
        Ok(Examiner::new(pair, judges, self.tau_h, self.max_new_tokens))
    }

    /// Opens the models and fixes τ_r and the scale of rewards on `calibration`.
    pub(super) fn calibrated<B: Ops>(
        &self,
        ops: &B,
        calibration: Vec<Preference>,
        seed: u64,
        watch: &mut dyn Watch,
    ) -> Result<Evaluator<Pair<B>>> {
        watch.begin("calibrate", 0);
        let n = calibration.len();
        let evaluator = Evaluator::calibrate(self.open(ops)?, calibration, seed)?;
        watch.end(&format!(
            "reward threshold {:.3}, balanced accuracy {:.1} % on {n} pairs",
            evaluator.thresholds.tau_r,
            100.0 * evaluator.balanced_accuracy,
        ));
        Ok(evaluator)
    }

    /// Writes the receipt of a run; hashes `files` and every file that these models are read from.
    pub(super) fn write_receipt<'a>(
        &'a self,
        mut manifest: Manifest,
        files: impl IntoIterator<Item = &'a PathBuf>,
        dir: &RunDir,
    ) -> Result<()> {
        let mut places: Vec<&PathBuf> = files.into_iter().collect();
        for spec in [&self.policy, &self.reward] {
            places.push(&spec.dir);
            places.extend(&spec.adapter);
        }
        let others = [&self.second_judge, &self.refusal, &self.truth].into_iter().flatten();
        places.extend([&self.judge].into_iter().chain(others).map(|spec| match spec {
            JudgeSpec::Model(place) | JudgeSpec::Lexicon(place) => place,
        }));
        places.into_iter().try_for_each(|place| manifest.add_input(place))?;
        manifest.write(&dir.file(manifest::NAME))
    }
}

/// How the scale of rewards is known.
#[derive(Debug, Clone)]
pub(crate) enum Scale {
    /// Validated pairs that fix it.
    Calibration(PathBuf),
    /// Fixed earlier; `tau_h` is the models' own.
    Given { tau_r: f64, mu_0: f64, s: f64 },
}

/// Writes the adapters that the pair has to `place/policy` and `place/reward`; returns the folders written.
pub(super) fn save_adapters<B: Ops>(pair: &Pair<B>, place: &Path) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    for (role, model) in [("policy", &pair.policy), ("reward", &pair.reward)] {
        if model.save_adapter(&place.join(role))? {
            written.push(place.join(role));
        }
    }
    Ok(written)
}
