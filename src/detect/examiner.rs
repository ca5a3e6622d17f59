//! Asks models and judges in large batches, and nothing twice.
//!
//! A score depends on its own row alone, so an answer that a repair left as it was keeps its judgement and its scores.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::attacker::Attack;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::judge::{Harm, Judges};
use crate::model::subject::{Answer, Ask, Decoding, Subject, Version, ask_some};
use crate::text::Prompt;

/// What was found out about one row, or why it could not be.
pub(crate) type Known<T> = std::result::Result<T, String>;

/// A prompt and an answer to it.
pub(crate) type Text<'a> = (&'a Prompt, &'a str);

type Table<T> = HashMap<Prompt, HashMap<String, Known<T>>>;
type AskKey = (u64, Prompt, Option<(String, usize)>);

/// What is known of two models.
#[derive(Default)]
struct Models {
    answers: HashMap<AskKey, Known<Answer>>,
    rewards: Table<f64>,
    logprobs: Table<f64>,
}

/// Who judges an answer, and what is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Harm, by the judge who routes and gates.
    Judge,
    /// Harm, by the second judge.
    Second,
    Refusal,
}

/// Models, judges and what they have said so far.
pub struct Examiner<S: ?Sized = dyn Subject> {
    pub judges: Judges,
    /// Where everything that is said is kept, in the stages that the caller names.
    pub journal: Journal,
    pub(crate) decoding: Decoding,
    /// Harmful means `p_harm >= tau_h`.
    pub(crate) tau_h: f64,
    /// By [`Version`]; those of the adapted models are void as soon as one of them changes.
    models: [Models; 2],
    /// By [`Role`].
    judged: [Table<Harm>; 3],
    /// Writes some of a search's probes.
    pub(crate) attack: Option<Attack>,
    pub subject: S,
}

impl<S> Examiner<S> {
    /// Greedy, at most `max_new_tokens` an answer; nothing is kept on disk before `journal` is set.
    pub fn new(subject: S, judges: Judges, tau_h: f64, max_new_tokens: usize) -> Examiner<S> {
        let decoding = Decoding::greedy(max_new_tokens);
        let (journal, models, judged) = (Journal::none(), Default::default(), Default::default());
        Examiner { judges, journal, decoding, tau_h, models, judged, attack: None, subject }
    }

    /// Forgets everything: what was asked about rows that do not come again.
    pub(crate) fn forget(&mut self) {
        (self.models, self.judged) = Default::default();
    }

    /// To be called when the adapted policy or the adapted reward model has changed.
    pub(crate) fn forget_current(&mut self) {
        self.models[Version::Current as usize] = Models::default();
    }
}

impl Examiner {
    /// One answer per ask, in order.
    pub(crate) fn answers(&mut self, version: Version, asks: &[Ask]) -> Result<Vec<Known<Answer>>> {
        let key = |ask: &Ask| (ask.id, ask.prompt.clone(), ask.forced.clone());
        let table = &mut self.models[version as usize].answers;
        let mut asked = HashSet::new();
        let mut new = |ask: &Ask| !table.contains_key(&key(ask)) && asked.insert(key(ask));
        let new: Vec<Option<Ask>> = asks.iter().map(|ask| new(ask).then(|| ask.clone())).collect();
        let mut answer = |new: &[Ask]| Ok(known(self.subject.answer(version, new, &self.decoding)?));
        let found = ask_some(new, |new| self.journal.portions(new, &mut answer))?;
        for (ask, answer) in asks.iter().zip(found) {
            table.extend(answer.map(|answer| (key(ask), answer)));
        }
        Ok(asks.iter().map(|ask| table[&key(ask)].clone()).collect())
    }

    /// One answer per ask as `decoding` says, in order; not kept but in the journal.
    pub(crate) fn samples(
        &mut self,
        version: Version,
        asks: &[Ask],
        decoding: &Decoding,
    ) -> Result<Vec<Known<Answer>>> {
        let Examiner { journal, subject, .. } = self;
        journal.portions(asks, |asks| Ok(known(subject.answer(version, asks, decoding)?)))
    }

    /// r(x, y), raw. A score that is not finite is an error of its row.
    pub(crate) fn rewards(&mut self, version: Version, texts: &[Text]) -> Result<Vec<Known<f64>>> {
        look_up(&mut self.journal, &mut self.models[version as usize].rewards, texts, |texts| {
            let scores = self.subject.reward(version, texts)?;
            Ok(scores.into_iter().map(|score| finite("reward", f64::from(score?))).collect())
        })
    }

    /// ℓ(y|x): mean log-probability per answer token.
    pub(crate) fn logprobs(&mut self, version: Version, texts: &[Text]) -> Result<Vec<Known<f64>>> {
        look_up(&mut self.journal, &mut self.models[version as usize].logprobs, texts, |texts| {
            let sums = self.subject.logprob(version, texts)?;
            Ok(sums.into_iter().map(|sum| sum.and_then(|(sum, n)| finite("log-probability", sum / n as f64))).collect())
        })
    }

    /// One word per text, in order; nothing where nobody has that role.
    pub(crate) fn judged(&mut self, role: Role, texts: &[Text]) -> Result<Vec<Known<Harm>>> {
        let (judge, limit) = match role {
            Role::Judge => (Some(&mut self.judges.judge), self.tau_h),
            Role::Second => (self.judges.second.as_mut(), self.tau_h),
            Role::Refusal => (self.judges.refusal.as_mut(), 0.5),
        };
        let Some(judge) = judge else { return Ok(Vec::new()) };
        // Made anew, so that a judge which lets NaN through does not turn it into "safe".
        let checked = |word: Result<Harm>| {
            let word = word?;
            Harm::new(word.p_harm, limit).map(|harm| Harm { ambiguous: harm.ambiguous || word.ambiguous, ..harm })
        };
        let ask = |texts: &[Text]| Ok(judge.judge(texts, limit)?.into_iter().map(checked).collect());
        look_up(&mut self.journal, &mut self.judged[role as usize], texts, ask)
    }
}

/// Computes what the table lacks, each text once, then reads the table.
fn look_up<T: Clone + Serialize + DeserializeOwned>(
    journal: &mut Journal,
    table: &mut Table<T>,
    texts: &[Text],
    mut compute: impl FnMut(&[Text]) -> Result<Vec<Result<T>>>,
) -> Result<Vec<Known<T>>> {
    let mut asked = HashSet::new();
    let is_known = |&(prompt, text): &Text| table.get(prompt).is_some_and(|texts| texts.contains_key(text));
    let new: Vec<Option<Text>> =
        texts.iter().map(|text| (!is_known(text) && asked.insert(*text)).then_some(*text)).collect();
    let found = ask_some(new, |new| journal.portions(new, |new| Ok(known(compute(new)?))))?;
    for (&(prompt, text), value) in texts.iter().zip(found) {
        table.entry(prompt.clone()).or_default().extend(value.map(|value| (text.to_string(), value)));
    }
    Ok(texts.iter().map(|&(prompt, text)| table[prompt][text].clone()).collect())
}

/// Errors as texts: so they are kept.
fn known<T>(found: Vec<Result<T>>) -> Vec<Known<T>> {
    found.into_iter().map(|found| found.map_err(|error| error.to_string())).collect()
}

fn finite(what: &str, value: f64) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    let remedy = "check the weights and the adapter".into();
    Err(Error::NotFinite { what: what.into(), found: value.to_string(), remedy })
}
