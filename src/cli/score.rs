//! `ares score`.

use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::device::OnDevice;
use super::rows::{RowArgs, RowJob, fields};
use super::{Session, args};
use crate::error::{Error, Result};
use crate::model::Version;
use crate::model::pretrained::{ModelSpec, Pretrained};
use crate::ops::Ops;
use crate::run::interrupt;
use crate::text::{Exchange, Rendered};

/// Score answers with a reward model: adds `reward` to each row
#[derive(Debug, Args)]
pub(crate) struct Score {
    /// Reward model: a sequence classifier with one label
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    reward: ModelSpec,
    #[command(flatten)]
    rows: RowArgs,
}

impl Score {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session)?;
        device.run(Work { command: &self, session, job })
    }
}

struct Work<'a> {
    command: &'a Score,
    session: &'a Session,
    job: RowJob<'a>,
}

impl OnDevice for Work<'_> {
    type Output = ();

    fn run<B: Ops>(self, ops: &B) -> Result<()> {
        let Work { command, session, job } = self;
        let mut model =
            Pretrained::open(ops, &command.reward, command.rows.batch_tokens().unwrap_or(B::BATCH), interrupt::flag())?;
        model.transformer.config.expect_score()?;
        job.run(session, "score", |rows| {
            let rendered: Vec<Result<Rendered>> = rows
                .par_iter()
                .map(|row| match row.exchange(command.rows.raw)? {
                    Exchange::Text { prompt, answer } => model.rendering.full(&prompt, &answer),
                    Exchange::Tokens { tokens, prompt_len } => model.rendering.given(&tokens, prompt_len),
                })
                .collect();
            let scores = model.scores(Version::Current, rendered)?;
            Ok(scores.into_iter().map(|scores| Ok(fields([("reward", json!(finite(&scores?)?))]))).collect())
        })
    }
}

fn finite(scores: &[f32]) -> Result<f32> {
    match scores {
        [score] if score.is_finite() => Ok(*score),
        other => Err(Error::NotFinite {
            what: "reward".into(),
            found: format!("{other:?}"),
            remedy: "check the reward model's weights".into(),
        }),
    }
}
