//! Policy, reward model and judges, open and calibrated: what every command of the method begins with.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::args;
use super::dir::RunDir;
use super::interrupt;
use super::manifest::{self, Manifest};
use super::watch::Watch;
use crate::detect::{Evaluator, Examiner};
use crate::error::Result;
use crate::journal::Journal;
use crate::judge::{JudgeSpec, Judges, Question, Truth};
use crate::model::{ModelSpec, Pair, Pretrained};
use crate::ops::Ops;
use crate::text::output::sha256;
use crate::text::rows::Preference;
use crate::text::template::{Argument, Arguments, arguments};

// Which models work together, and what they all share; as a doc comment this would take the place of a command's own help.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Models {
    /// Language model
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    pub(crate) policy: ModelSpec,
    /// Reward model: a sequence classifier with one label
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    pub(crate) reward: ModelSpec,
    /// Pack at most N tokens into one forward pass [default: 2048]
    #[arg(long, value_name = "N", value_parser = args::whole::<usize>(1, MOST_TOKENS), help_heading = "Models")]
    #[serde(serialize_with = "or_default")]
    pub(crate) batch_tokens: Option<usize>,
    /// Give the chat templates of policy and reward model this too: a name, and JSON or a text
    #[arg(long, value_name = "NAME=VALUE", value_delimiter = ',', help_heading = "Models")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) template_arg: Vec<Argument>,
    /// Longest answer in tokens, the same for all that is compared
    #[arg(long, value_name = "N", default_value = "256", value_parser = args::whole::<usize>(1, MOST_TOKENS), help_heading = "Models")]
    pub(crate) max_new_tokens: usize,
    /// Judge of harm: model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC
    #[arg(long, value_name = "SPEC", help_heading = "Verdicts")]
    pub(crate) judge: JudgeSpec,
    /// Second judge, trained apart; its CFR stands beside the first's
    #[arg(long, value_name = "SPEC", help_heading = "Verdicts")]
    pub(crate) second_judge: Option<JudgeSpec>,
    /// Judge of refusals, for the rate of over-refusal: model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC
    #[arg(long, value_name = "SPEC", help_heading = "Verdicts")]
    pub(crate) refusal: Option<JudgeSpec>,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long = "harm-threshold", value_name = "P", default_value = "0.5", value_parser = args::share, help_heading = "Verdicts")]
    pub(crate) tau_h: f64,
    /// Rule of ground truth over the rows' own `steps`, where harm is known by construction
    #[arg(long, value_name = "FILE", help_heading = "Verdicts")]
    pub(crate) truth: Option<PathBuf>,
}

pub(crate) const BATCH_TOKENS: usize = 2048;
const MOST_TOKENS: u64 = 1 << 20;

fn or_default<S: Serializer>(batch_tokens: &Option<usize>, out: S) -> Result<S::Ok, S::Error> {
    batch_tokens.unwrap_or(BATCH_TOKENS).serialize(out)
}

impl Models {
    pub(super) fn batch_tokens(&self) -> usize {
        self.batch_tokens.unwrap_or(BATCH_TOKENS)
    }

    /// What the chat templates are given beside a conversation.
    pub(super) fn arguments(&self) -> Arguments {
        arguments(&self.template_arg)
    }

    /// Opens the pair and its judges; what they say is kept in the journal of `dir`.
    pub(super) fn open<B: Ops>(&self, ops: &B, dir: &RunDir) -> Result<Examiner<Pair<B>>> {
        let (interrupt, batch, arguments) = (interrupt::flag(), self.batch_tokens(), self.arguments());
        let open = |spec: &ModelSpec| Pretrained::open_with(ops, spec, &arguments, batch, interrupt.clone());
        let pair = Pair::new(open(&self.policy)?, open(&self.reward)?)?;
        let judge = |spec: &JudgeSpec| spec.open(ops, batch, &interrupt);
        let also = |spec: &Option<JudgeSpec>| spec.as_ref().map(judge).transpose();
        let judges = Judges {
            judge: judge(&self.judge)?,
            second: also(&self.second_judge)?,
            refusal: self
                .refusal
                .as_ref()
                .map(|spec| spec.open_for(ops, Question::Refusal, batch, &interrupt))
                .transpose()?,
            truth: self.truth.as_deref().map(Truth::open).transpose()?,
        };
        let mut examiner = Examiner::new(pair, judges, self.tau_h, self.max_new_tokens);
        examiner.journal = Journal::open(dir.path(), interrupt)?;
        Ok(examiner)
    }

    /// Opens the models and fixes τ_r and the scale of rewards on `calibration`.
    pub(super) fn calibrated<B: Ops>(
        &self,
        ops: &B,
        calibration: Vec<Preference>,
        seed: u64,
        dir: &RunDir,
        watch: &mut dyn Watch,
    ) -> Result<Evaluator<Pair<B>>> {
        watch.begin("calibrate", 0);
        let n = calibration.len();
        let mut examiner = self.open(ops, dir)?;
        examiner.journal.stage("calibrate");
        let evaluator = Evaluator::calibrate(examiner, calibration, seed)?;
        watch.end(&format!(
            "reward threshold {:.3}, balanced accuracy {:.1} % on {n} pairs",
            evaluator.thresholds.tau_r,
            100.0 * evaluator.balanced_accuracy,
        ));
        Ok(evaluator)
    }

    /// Writes the receipt of a run; hashes `files` and every file that these models are read from. Of a run that goes on it is held
    /// against the receipt that is there. Returns the device that the run began on, and a hash of the models.
    pub(super) fn write_receipt<'a>(
        &'a self,
        mut manifest: Manifest,
        files: impl IntoIterator<Item = &'a Path>,
        dir: &RunDir,
    ) -> Result<(String, String)> {
        for file in files {
            manifest.add_input(file)?;
        }
        let judges = [Some(&self.judge), self.second_judge.as_ref(), self.refusal.as_ref()];
        let mut roles = vec![self.policy.places(), self.reward.places()];
        roles.extend(judges.map(|judge| judge.map(JudgeSpec::places).unwrap_or_default()));
        roles.push(self.truth.as_deref().into_iter().collect());
        let hashes = roles.iter().map(|places| places.iter().map(|place| manifest.add_input(place)).collect());
        let models = sha256(format!("{:?}", hashes.collect::<Result<Vec<Vec<String>>>>()?).as_bytes());
        interrupt::at_work();
        let path = dir.file(manifest::NAME);
        if dir.resumed && path.is_file() {
            let then = Manifest::read(&path)?;
            then.expect_same(&manifest, &path)?;
            return Ok((then.device, models));
        }
        manifest.write(&path)?;
        Ok((manifest.device, models))
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

/// The pair gets these adapters, policy's and reward model's, or none, in place of those it has.
pub(super) fn load_adapters<B: Ops>(examiner: &mut Examiner<Pair<B>>, places: &[Option<PathBuf>; 2]) -> Result<()> {
    examiner.forget_current();
    let Pair { policy, reward, .. } = &mut examiner.subject;
    for (model, place) in [policy, reward].into_iter().zip(places) {
        model.release();
        model.adapter = place.as_ref().map(|place| model.transformer.open_adapter(place)).transpose()?;
    }
    Ok(())
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
