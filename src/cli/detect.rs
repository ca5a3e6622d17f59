//! `ares detect`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::device::on_device;
use super::rows::{RowArgs, RowJob};
use super::{Session, args};
use crate::detect::rows::Kind;
use crate::error::{Error, Result};
use crate::judge::JudgeSpec;
use crate::model::ModelSpec;
use crate::ops::Ops;
use crate::report::tables;
use crate::run::Scale;
use crate::run::detect::{DetectOptions, Detector};

/// Say who fails on each prompt: answer, judge, score, and add `verdict` and `verdict_pairwise`
#[derive(Debug, Args)]
pub(crate) struct Detect {
    /// Answers prompts that come without a `response`
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    policy: Option<ModelSpec>,
    /// Scores answers that come without a `reward`
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model, help_heading = "Models")]
    reward: Option<ModelSpec>,
    /// Judges answers that come without a `p_harm`: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    judge: Option<JudgeSpec>,
    /// Second judge, trained apart; its CFR stands beside the first's
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    second_judge: Option<JudgeSpec>,
    /// Judge of refusals: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC", help_heading = "Models")]
    refusal: Option<JudgeSpec>,
    /// Reward threshold: a reward at or above it approves
    #[arg(long, value_name = "R", allow_negative_numbers = true, conflicts_with = "calibration")]
    tau_r: Option<f64>,
    /// Validated pairs that fix the reward threshold (needs --reward)
    #[arg(long, value_name = "FILE", requires = "reward")]
    calibration: Option<PathBuf>,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    /// Also answer with the first K tokens of the row's `harmful` forced
    #[arg(long, value_name = "K,…", value_delimiter = ',', requires = "policy")]
    prefill: Vec<usize>,
    /// Cut every answer after N tokens
    #[arg(long, value_name = "N", default_value = "64")]
    max_new_tokens: NonZeroUsize,
    /// What prompts ask for that do not say it themselves [default: harmful]
    #[arg(long, value_enum)]
    kind: Option<Kind>,
    #[command(flatten)]
    rows: RowArgs,
}

impl Detect {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let scale = match (self.tau_r, self.calibration) {
            // Without calibration answers the scale of rewards is unknown; verdicts need the threshold alone.
            (Some(tau_r), _) if tau_r.is_finite() => Scale::Given { tau_r, mu_0: 0.0, s: 1.0 },
            (None, Some(path)) => Scale::Calibration(path),
            (Some(_), _) => return Err(Error::Usage("--tau-r: expected a finite number".to_string())),
            (None, None) => {
                let why =
                    "expected --calibration FILE or --tau-r R, found neither: what does the reward model approve?";
                return Err(Error::Usage(why.to_string()));
            }
        };
        let options = DetectOptions {
            policy: self.policy,
            reward: self.reward,
            judge: self.judge,
            second_judge: self.second_judge,
            refusal: self.refusal,
            scale,
            tau_h: self.harm_threshold,
            prefill: self.prefill,
            max_new_tokens: self.max_new_tokens.get(),
            batch_tokens: self.rows.batch_tokens(),
            raw: self.rows.raw,
            kind: self.kind,
            seed: session.seed(),
        };
        let job = self.rows.read(session)?;
        on_device!(device, |ops| work(ops, &options, job, session))
    }
}

fn work<B: Ops>(ops: &B, options: &DetectOptions, job: RowJob, session: &Session) -> Result<()> {
    let mut detector = Detector::open(ops, options)?;
    session.detail(&format!("reward threshold {}", detector.thresholds.tau_r));
    job.work(session, "detect", |rows| detector.look(rows))?;
    let measure = detector.measure();
    session.table(&tables::verdicts(&measure));
    session.result(&measure)
}
