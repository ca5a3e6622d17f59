//! `ares score`.

use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::device::on_device;
use super::rows::{RowArgs, RowJob, fields};
use super::{Session, args};
use crate::error::{Error, Result};
use crate::model::Version;
use crate::model::pretrained::ModelSpec;
use crate::ops::Ops;
use crate::text::{Exchange, Rendered};

/// Score answers with a reward model: add `reward` to each row
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
        on_device!(device, |ops| self.work(ops, session, job))
    }

    fn work<B: Ops>(&self, ops: &B, session: &Session, job: RowJob) -> Result<()> {
        let mut model = self.rows.open(ops, &self.reward)?;
        model.transformer.config.expect_score()?;
        job.run(session, "score", |rows| {
            let rendered: Vec<Result<Rendered>> = rows
                .par_iter()
                .map(|row| match row.exchange(self.rows.raw, Some(&model.rendering))? {
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
