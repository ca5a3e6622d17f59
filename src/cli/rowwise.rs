//! The commands that add to each row what models say of it: `generate`, `score`, `logprob`, `judge`, `detect`.

use std::cell::RefCell;
use std::num::NonZeroUsize;

use clap::Args;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Session;
use super::device::on_device;
use super::rows::{Done, RowArgs};
use crate::detect::agreement::{Agreement, Calibration};
use crate::detect::measure::Rate;
use crate::detect::rows::labelled;
use crate::error::{Error, Result};
use crate::judge::{Harm, JudgeSpec};
use crate::model::pretrained::fill;
use crate::model::{Answer, Ask, Decoding, Finish, ModelSpec, Version};
use crate::report::tables;
use crate::run::args;
use crate::run::detect::{Added, DetectOptions, Detector};
use crate::run::interrupt;
use crate::run::records::object;
use crate::text::{Exchange, Prompt, Rendered, Rendering, Row};

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
    #[arg(long, value_name = "N", default_value = "256")]
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
        let job = self.rows.read(session, &device, &self.model.places())?;
        on_device!(device, |ops| {
            let mut model = self.rows.open(ops, &self.model)?;
            model.transformer.config.expect_causal()?;
            let decoding = self.decoding.decoding(session.seed());
            let (mut cut, mut all) = (0, 0);
            let done = job.work(session, "generate", nothing, |rows| {
                let asks: Vec<Result<Ask>> = rows.iter().map(|row| self.ask(row, &model.rendering)).collect();
                let good: Vec<Ask> = asks.iter().flatten().cloned().collect();
                let answers = model.generate(Version::Current, &good, &decoding)?;
                cut += answers.iter().flatten().filter(|answer| answer.finish == Finish::Length).count() as u64;
                all += answers.len() as u64;
                Ok(fill(asks, answers, answered))
            })?;
            Rate::of(cut, all).warning_of_cuts().iter().for_each(|warning| session.say(warning));
            session.result(&done)
        })
    }

    fn ask(&self, row: &Row, rendering: &Rendering) -> Result<Ask> {
        Ok(Ask::new(row.prompt_for(self.rows.raw, Some(rendering))?, key(row)))
    }
}

/// What most commands make of rows that an earlier run has done.
fn nothing(_: &Row, _: &Added) -> Result<()> {
    Ok(())
}

/// What keys a row's random numbers: its `id`, else its line. So neither order nor company changes an answer.
fn key(row: &Row) -> u64 {
    let Some(id) = row.object.get("id") else { return row.line as u64 };
    let hash = Sha256::digest(id.to_string());
    hash.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

fn answered(answer: Result<Answer>) -> Result<Added> {
    let Answer { text, tokens, finish } = answer?;
    Ok(object([("response", json!(text)), ("tokens_out", json!(tokens)), ("finish", json!(finish))]))
}

/// Score answers with a reward model: add `reward` to each row
#[derive(Debug, Args)]
pub(crate) struct Score {
    /// Reward model: a sequence classifier with one label
    #[arg(long, value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    reward: ModelSpec,
    /// End raw texts (--raw) with the token that ends a turn, as most trainers of reward models do
    #[arg(long, value_name = "TOKEN", value_parser = ["eos"], requires = "raw")]
    append: Option<String>,
    #[command(flatten)]
    rows: RowArgs,
}

impl Score {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session, &device, &self.reward.places())?;
        on_device!(device, |ops| {
            let mut model = self.rows.open(ops, &self.reward)?;
            model.transformer.config.expect_score()?;
            self.append.iter().try_for_each(|_| model.rendering.append_eos())?;
            let done = job.work(session, "score", nothing, |rows| {
                let exchange = |row: &Row| row.exchange(self.rows.raw, Some(&model.rendering));
                let rendered = rendered(rows, &model.rendering, &exchange, Rendering::fulls);
                let scores = model.scores(Version::Current, rendered)?;
                Ok(scores.into_iter().map(|scores| Ok(object([("reward", json!(model.reward(&scores?)?))]))).collect())
            })?;
            session.result(&done)
        })
    }
}

/// How a model reads exchanges: [`Rendering::fulls`] or [`Rendering::with_answers`].
type Render = for<'a> fn(&Rendering, Vec<(&'a Prompt, &'a str)>) -> Vec<Result<Rendered>>;

/// The ids of each row's exchange; texts by `render`, all at once.
fn rendered(
    rows: &[Row],
    rendering: &Rendering,
    exchange: &(dyn Fn(&Row) -> Result<Exchange> + Sync),
    render: Render,
) -> Vec<Result<Rendered>> {
    let exchanges: Vec<Result<Exchange>> = rows.par_iter().map(exchange).collect();
    let texts = exchanges.iter().flatten().filter_map(|exchange| match exchange {
        Exchange::Text { prompt, answer } => Some((prompt, answer.as_str())),
        Exchange::Tokens { .. } => None,
    });
    let mut texts = render(rendering, texts.collect()).into_iter();
    let lost = || Err(Error::row("text", "a rendering per row", "fewer"));
    let one = |exchange: Result<Exchange>| match exchange? {
        Exchange::Text { .. } => texts.next().unwrap_or_else(lost),
        Exchange::Tokens { tokens, prompt_len } => rendering.given(&tokens, prompt_len),
    };
    exchanges.into_iter().map(one).collect()
}

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
        let job = self.rows.read(session, &device, &self.model.places())?;
        on_device!(device, |ops| {
            let mut model = self.rows.open(ops, &self.model)?;
            model.transformer.config.expect_causal()?;
            let done = job.work(session, "logprob", nothing, |rows| {
                let exchange = |row: &Row| self.exchange(row, &model.rendering);
                let rendered = rendered(rows, &model.rendering, &exchange, Rendering::with_answers);
                let logprobs = model.logprobs(Version::Current, rendered)?;
                Ok(logprobs.into_iter().map(|logprobs| self.added(logprobs?)).collect())
            })?;
            session.result(&done)
        })
    }

    /// Ids that are given whole have a border between prompt and answer.
    fn exchange(&self, row: &Row, rendering: &Rendering) -> Result<Exchange> {
        match row.exchange(self.rows.raw, Some(rendering))? {
            Exchange::Tokens { tokens, prompt_len } if !(1..tokens.len()).contains(&prompt_len) => Err(row.wrong(
                &format!("`prompt_tokens` from 1 to {}", tokens.len().saturating_sub(1)),
                &prompt_len.to_string(),
            )),
            other => Ok(other),
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
        let mut added = object([("logprob", json!(sum)), ("n", json!(logprobs.len()))]);
        if self.per_token {
            added.insert("logprobs".to_string(), json!(logprobs));
        }
        Ok(added)
    }
}

/// Judge answers: add `p_harm` and `ambiguous` to each row, and `cut` where an answer's middle was left out
#[derive(Debug, Args)]
pub(crate) struct Judge {
    /// Judge of harm: model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC
    #[arg(long, value_name = "SPEC")]
    judge: JudgeSpec,
    /// Call an answer harmful from this p_harm on, 0 to 1
    #[arg(long, value_name = "P", default_value = "0.5", value_parser = args::share)]
    harm_threshold: f64,
    /// Hold the judge against labels of the answers, where rows have them: harmful (unsafe, true, 1) or safe (false, 0) under FIELD
    #[arg(long, value_name = "FIELD", num_args = 0..=1, default_missing_value = "label")]
    labels: Option<String>,
    #[command(flatten)]
    rows: RowArgs,
}

impl Judge {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let job = self.rows.read(session, &device, &self.judge.places())?;
        on_device!(device, |ops| {
            let mut judge = self.judge.open(ops, self.rows.batch(ops), &interrupt::flag())?;
            let counts = RefCell::new(Agreement::default());
            let count = |row: &Row, p_harm: f64| -> Result<()> {
                let Some(field) = &self.labels else { return Ok(()) };
                let known = labelled(row, field)?;
                known.into_iter().for_each(|known| counts.borrow_mut().add(known, p_harm >= self.harm_threshold));
                Ok(())
            };
            // What an earlier run has judged counts as well.
            let passed = |row: &Row, done: &Added| match done.get("p_harm").and_then(Value::as_f64) {
                Some(p_harm) if !done.contains_key("error") => count(row, p_harm),
                _ => Ok(()),
            };
            let done = job.work(session, "judge", passed, |rows| {
                let texts: Vec<Result<(Prompt, String)>> = rows.iter().map(|row| self.texts(row)).collect();
                let good: Vec<(&Prompt, &str)> =
                    texts.iter().flatten().map(|(p, answer)| (p, answer.as_str())).collect();
                let words = judge.judge(&good, self.harm_threshold)?;
                let mut judged = rows.iter().zip(&texts).filter(|(_, text)| text.is_ok()).map(|(row, _)| row);
                let words = words.into_iter().map(|word| {
                    let row = judged.next();
                    word.and_then(|word| row.map_or(Ok(()), |row| count(row, word.p_harm)).map(|()| word))
                });
                let words = words.collect();
                Ok(fill(texts, words, |harm: Result<Harm>| {
                    let harm = harm?;
                    let mut added = object([("p_harm", json!(harm.p_harm)), ("ambiguous", json!(harm.ambiguous))]);
                    if harm.cut {
                        added.insert("cut".to_string(), json!(true));
                    }
                    Ok(added)
                }))
            })?;
            if self.labels.is_none() {
                return session.result(&done);
            }
            let found = counts.borrow().calibration();
            session.table(&tables::calibration(&found));
            session.result(&Judged { done, labels: found })
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

/// What `--json` says with `--labels`.
#[derive(Serialize)]
struct Judged {
    #[serde(flatten)]
    done: Done,
    labels: Calibration,
}

/// Say who fails on each prompt: answer, judge, score, and add `verdict` and `verdict_pairwise`
#[derive(Debug, Args)]
pub(crate) struct Detect {
    #[command(flatten)]
    options: DetectOptions,
    #[command(flatten)]
    rows: RowArgs,
}

impl Detect {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let device = session.device()?;
        let (batch_tokens, raw, seed) = (self.rows.batch_tokens(), self.rows.raw, session.seed());
        let options = DetectOptions { batch_tokens, raw, seed, arguments: self.rows.arguments(), ..self.options };
        options.scale()?;
        let job = self.rows.read(session, &device, &options.places())?;
        on_device!(device, |ops| {
            let detector = Detector::open(ops, &options)?;
            session.detail(&format!("reward threshold {}", detector.thresholds.tau_r));
            let detector = RefCell::new(detector);
            let passed = |row: &Row, done: &Added| detector.borrow_mut().recall(row, done);
            job.work(session, "detect", passed, |rows| detector.borrow_mut().look(rows))?;
            let measure = detector.borrow().measure();
            session.table(&tables::verdicts(&measure));
            measure.truncated.warning_of_cuts().iter().for_each(|warning| session.say(warning));
            session.result(&measure)
        })
    }
}
