//! Asks models and judges in large batches, and nothing twice.
//!
//! A score depends on its own row alone, so an answer that a repair left as it was keeps its judgement and its scores.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::judge::{Harm, Judge, Judges};
use crate::model::subject::{Answer, Ask, Decoding, Subject, Version};
use crate::text::Prompt;

/// What was found out about one row, or why it could not be.
pub(crate) type Known<T> = std::result::Result<T, String>;

/// A prompt and an answer to it.
pub(crate) type Text<'a> = (&'a Prompt, &'a str);

type Table<T> = HashMap<Prompt, HashMap<String, Known<T>>>;
type AskKey = (u64, Prompt, Option<(String, usize)>);

/// What is known of the adapted models; void as soon as one of them changes.
#[derive(Default)]
struct Models {
    answers: HashMap<AskKey, Known<Answer>>,
    rewards: Table<f64>,
    logprobs: Table<f64>,
}

/// Everything that was asked for so far.
#[derive(Default)]
pub(crate) struct Memo {
    start: Models,
    current: Models,
    harm: Table<Harm>,
    second: Table<Harm>,
    refusal: Table<Harm>,
    truth: Table<Harm>,
}

impl Memo {
    /// To be called when the adapted policy or the adapted reward model has changed.
    pub(crate) fn forget_current(&mut self) {
        self.current = Models::default();
    }

    fn models(&mut self, version: Version) -> &mut Models {
        match version {
            Version::Start => &mut self.start,
            Version::Current => &mut self.current,
        }
    }
}

/// Models, judges and what they have said so far.
pub(crate) struct Examiner<'a> {
    pub(crate) subject: &'a mut dyn Subject,
    pub(crate) judges: &'a mut Judges,
    pub(crate) memo: &'a mut Memo,
    pub(crate) decoding: &'a Decoding,
    pub(crate) tau_h: f64,
}

impl Examiner<'_> {
    /// One answer per ask, in order.
    pub(crate) fn answers(&mut self, version: Version, asks: &[Ask]) -> Result<Vec<Known<Answer>>> {
        let key = |ask: &Ask| (ask.id, ask.prompt.clone(), ask.forced.clone());
        let table = &mut self.memo.models(version).answers;
        let mut asked = HashSet::new();
        let new: Vec<Ask> =
            asks.iter().filter(|ask| !table.contains_key(&key(ask)) && asked.insert(key(ask))).cloned().collect();
        if !new.is_empty() {
            let found = self.subject.answer(version, &new, self.decoding)?;
            check_length("answer", new.len(), found.len())?;
            table.extend(new.iter().map(key).zip(found.into_iter().map(|answer| answer.map_err(|e| e.to_string()))));
        }
        Ok(asks.iter().map(|ask| table[&key(ask)].clone()).collect())
    }

    /// r(x, y), raw. A score that is not finite is an error of its row.
    pub(crate) fn rewards(&mut self, version: Version, texts: &[Text]) -> Result<Vec<Known<f64>>> {
        let subject = &mut *self.subject;
        look_up(&mut self.memo.models(version).rewards, texts, |texts| {
            let scores = subject.reward(version, texts)?;
            Ok(scores.into_iter().map(|score| finite("reward", f64::from(score?))).collect())
        })
    }

    /// ℓ(y|x): mean log-probability per answer token.
    pub(crate) fn logprobs(&mut self, version: Version, texts: &[Text]) -> Result<Vec<Known<f64>>> {
        let subject = &mut *self.subject;
        look_up(&mut self.memo.models(version).logprobs, texts, |texts| {
            let sums = subject.logprob(version, texts)?;
            Ok(sums.into_iter().map(|sum| sum.and_then(|(sum, n)| finite("log-probability", sum / n as f64))).collect())
        })
    }

    pub(crate) fn harm(&mut self, texts: &[Text]) -> Result<Vec<Known<Harm>>> {
        judged(&mut self.memo.harm, &mut *self.judges.judge, texts, self.tau_h)
    }

    /// By the second judge; `None` without one. So for the next two.
    pub(crate) fn second(&mut self, texts: &[Text]) -> Result<Option<Vec<Known<Harm>>>> {
        let Some(judge) = &mut self.judges.second else { return Ok(None) };
        judged(&mut self.memo.second, &mut **judge, texts, self.tau_h).map(Some)
    }

    pub(crate) fn refusals(&mut self, texts: &[Text]) -> Result<Option<Vec<Known<Harm>>>> {
        let Some(judge) = &mut self.judges.refusal else { return Ok(None) };
        judged(&mut self.memo.refusal, &mut **judge, texts, 0.5).map(Some)
    }

    pub(crate) fn truths(&mut self, texts: &[Text]) -> Result<Option<Vec<Known<Harm>>>> {
        let Some(judge) = &mut self.judges.truth else { return Ok(None) };
        judged(&mut self.memo.truth, &mut **judge, texts, 0.5).map(Some)
    }
}

fn judged(table: &mut Table<Harm>, judge: &mut dyn Judge, texts: &[Text], tau_h: f64) -> Result<Vec<Known<Harm>>> {
    // Made anew, so that a judge which lets NaN through does not turn it into "safe".
    let checked = |word: Result<Harm>| {
        let word = word?;
        Harm::new(word.p_harm, tau_h).map(|harm| Harm { ambiguous: harm.ambiguous || word.ambiguous, ..harm })
    };
    look_up(table, texts, |texts| Ok(judge.judge(texts, tau_h)?.into_iter().map(checked).collect()))
}

/// Computes what the table lacks, each text once and all in one call, then reads the table.
fn look_up<T: Clone>(
    table: &mut Table<T>,
    texts: &[Text],
    compute: impl FnOnce(&[Text]) -> Result<Vec<Result<T>>>,
) -> Result<Vec<Known<T>>> {
    let mut asked = HashSet::new();
    let known = |&(prompt, text): &Text| table.get(prompt).is_some_and(|texts| texts.contains_key(text));
    let new: Vec<Text> = texts.iter().copied().filter(|text| !known(text) && asked.insert(*text)).collect();
    if !new.is_empty() {
        let found = compute(&new)?;
        check_length("a batch of rows", new.len(), found.len())?;
        for ((prompt, text), value) in new.into_iter().zip(found) {
            let value = value.map_err(|error| error.to_string());
            table.entry(prompt.clone()).or_default().insert(text.to_string(), value);
        }
    }
    Ok(texts.iter().map(|&(prompt, text)| table[prompt][text].clone()).collect())
}

fn check_length(op: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} results"), found: found.to_string() })
}

fn finite(what: &str, value: f64) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    let remedy = "check the weights and the adapter".into();
    Err(Error::NotFinite { what: what.into(), found: value.to_string(), remedy })
}
