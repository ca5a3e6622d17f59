//! `ares generate`.

use std::num::NonZeroUsize;

use clap::Args;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::device::on_device;
use super::rows::{Added, RowArgs, RowJob, fields, good};
use super::{Session, args};
use crate::error::Result;
use crate::model::pretrained::ModelSpec;
use crate::model::{Answer, Ask, Decoding, Version};
use crate::ops::Ops;
use crate::text::{Rendering, Row};

/// Answer prompts: add `response`, `tokens_out` and `finish` to each row
#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// Language model
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    model: ModelSpec,
    #[command(flatten)]
    decoding: DecodingArgs,
    #[command(flatten)]
    rows: RowArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Decoding")]
struct DecodingArgs {
    /// Take the likeliest token each time
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    greedy: bool,
    /// Divide the logits by T; 0 is greedy
    #[arg(long, value_name = "T", default_value = "1", value_parser = args::positive_or_zero)]
    temperature: f32,
    /// Sample among the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Sample among the likeliest tokens that reach P together
    #[arg(long, value_name = "P", default_value = "1", value_parser = args::share)]
    top_p: f64,
    /// Cut every answer after N tokens
    #[arg(long, value_name = "N", default_value = "128")]
    max_new_tokens: NonZeroUsize,
    /// Go on after the end of the turn
    #[arg(long)]
    ignore_eos: bool,
}

impl DecodingArgs {
    fn decoding(&self, seed: u64) -> Decoding {
        Decoding {
            max_new_tokens: self.max_new_tokens.get(),
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p as f32,
            seed,
            ignore_eos: self.ignore_eos,
        }
    }
}

impl Generate {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session)?;
        on_device!(device, |ops| self.work(ops, session, job))
    }

    fn work<B: Ops>(&self, ops: &B, session: &Session, job: RowJob) -> Result<()> {
        let mut model = self.rows.open(ops, &self.model)?;
        model.transformer.config.expect_causal()?;
        let decoding = self.decoding.decoding(session.seed());
        job.run(session, "generate", |rows| {
            let asks = rows.iter().map(|row| self.ask(row, &model.rendering)).collect();
            good(asks, |asks| {
                let answers = model.generate(Version::Current, asks, &decoding)?;
                Ok(answers.into_iter().map(|answer| Ok(added(answer?))).collect())
            })
        })
    }

    fn ask(&self, row: &Row, rendering: &Rendering) -> Result<Ask> {
        Ok(Ask::new(row.prompt_for(self.rows.raw, Some(rendering))?, key(row)))
    }
}

/// What keys a row's random numbers: its `id`, else its line. So neither order nor company changes an answer.
fn key(row: &Row) -> u64 {
    let Some(id) = row.object.get("id") else { return row.line as u64 };
    let hash = Sha256::digest(id.to_string());
    hash.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

fn added(answer: Answer) -> Added {
    fields([("response", json!(answer.text)), ("tokens_out", json!(answer.tokens)), ("finish", json!(answer.finish))])
}
