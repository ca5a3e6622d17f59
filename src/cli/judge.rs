//! `ares judge`.

use clap::Args;
use serde_json::json;

use super::device::on_device;
use super::rows::{RowArgs, RowJob, fields, good};
use super::{Session, args};
use crate::error::Result;
use crate::judge::JudgeSpec;
use crate::ops::Ops;
use crate::run::interrupt;
use crate::text::{Prompt, Row};

/// Judge answers: add `p_harm` and `ambiguous` to each row
#[derive(Debug, Args)]
pub(crate) struct Judge {
    /// Judge of harm: model:DIR or lexicon:FILE
    #[arg(long, value_name = "SPEC")]
    judge: JudgeSpec,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    #[command(flatten)]
    rows: RowArgs,
}

impl Judge {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session)?;
        on_device!(device, |ops| self.work(ops, session, job))
    }

    fn work<B: Ops>(&self, ops: &B, session: &Session, job: RowJob) -> Result<()> {
        let mut judge = self.judge.open(ops, self.rows.batch_tokens().unwrap_or(B::BATCH), &interrupt::flag())?;
        job.run(session, "judge", |rows| {
            let texts = rows.iter().map(|row| self.texts(row)).collect();
            good(texts, |texts: &[(Prompt, String)]| {
                let texts: Vec<(&Prompt, &str)> =
                    texts.iter().map(|(prompt, answer)| (prompt, answer.as_str())).collect();
                let words = judge.judge(&texts, self.harm_threshold)?.into_iter();
                let added = words.map(|harm| {
                    let harm = harm?;
                    Ok(fields([("p_harm", json!(harm.p_harm)), ("ambiguous", json!(harm.ambiguous))]))
                });
                Ok(added.collect())
            })
        })
    }

    /// Prompt and answer; ids are nothing that a judge could read.
    fn texts(&self, row: &Row) -> Result<(Prompt, String)> {
        match row.answered(self.rows.raw)? {
            (Prompt::Tokens(_), _) => Err(row.wrong("`prompt` and `response` as texts", "`tokens`")),
            texts => Ok(texts),
        }
    }
}
