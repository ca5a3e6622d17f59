//! `ares logprob`.

use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::device::on_device;
use super::rows::{Added, RowArgs, RowJob, fields};
use super::{Session, args};
use crate::error::{Error, Result};
use crate::model::Version;
use crate::model::pretrained::ModelSpec;
use crate::ops::Ops;
use crate::text::{Exchange, Rendered, Rendering, Row};

/// Compute log-probabilities of answers: add `logprob` (their sum) and `n` to each row
#[derive(Debug, Args)]
pub(crate) struct Logprob {
    /// Language model
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    model: ModelSpec,
    /// Add `logprobs`, one per token of the answer
    #[arg(long)]
    per_token: bool,
    #[command(flatten)]
    rows: RowArgs,
}

impl Logprob {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session)?;
        on_device!(device, |ops| self.work(ops, session, job))
    }

    fn work<B: Ops>(&self, ops: &B, session: &Session, job: RowJob) -> Result<()> {
        let mut model = self.rows.open(ops, &self.model)?;
        model.transformer.config.expect_causal()?;
        job.run(session, "logprob", |rows| {
            let rendered = rows.par_iter().map(|row| self.render(&model.rendering, row)).collect();
            let logprobs = model.logprobs(Version::Current, rendered)?;
            Ok(logprobs.into_iter().map(|logprobs| self.added(logprobs?)).collect())
        })
    }

    fn render(&self, rendering: &Rendering, row: &Row) -> Result<Rendered> {
        match row.exchange(self.rows.raw, Some(rendering))? {
            Exchange::Text { prompt, answer } => rendering.with_answer(&prompt, &answer),
            Exchange::Tokens { tokens, prompt_len } if (1..tokens.len()).contains(&prompt_len) => {
                rendering.given(&tokens, prompt_len)
            }
            Exchange::Tokens { tokens, prompt_len } => Err(row.wrong(
                &format!("`prompt_tokens` from 1 to {}", tokens.len().saturating_sub(1)),
                &prompt_len.to_string(),
            )),
        }
    }

    fn added(&self, logprobs: Vec<f32>) -> Result<Added> {
        let sum: f64 = logprobs.iter().map(|logprob| f64::from(*logprob)).sum();
        if logprobs.is_empty() || !sum.is_finite() {
            return Err(Error::NotFinite {
                what: "log-probability".into(),
                found: format!("{sum} over {} tokens", logprobs.len()),
                remedy: "check the model's weights".into(),
            });
        }
        let mut added = fields([("logprob", json!(sum)), ("n", json!(logprobs.len()))]);
        if self.per_token {
            added.push(("logprobs".to_string(), json!(logprobs)));
        }
        Ok(added)
    }
}
