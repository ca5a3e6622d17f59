//! The perplexity filter: a probe that no one would write is no finding.

use super::grammar::Grammar;
use super::sampler::{Sampler, SamplerKind};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::model::Subject;
use crate::model::subject::ask_some;
use crate::text::Prompt;
use rand::Rng;
use std::collections::HashMap;

/// Prompts that are measured at most: mean and deviation need no more.
const MEASURED: usize = 512;
/// A probe is refused this many standard deviations below their mean.
const DEVIATIONS: f64 = 3.0;
/// Nats per token. Prompts that are all alike would refuse everything else.
const MIN_DEVIATION: f64 = 0.1;

/// Mean log-probability per token under π_0, and the least that is accepted.
pub(crate) struct Plausible {
    least: f64,
    /// By text, for a search comes back to the same wordings.
    known: HashMap<String, Result<f64, String>>,
}

impl Plausible {
    /// Takes the measure from prompts as people write them, or from compositions of the grammar if there are none.
    pub(crate) fn new(
        grammar: &Grammar,
        prompts: &[Prompt],
        subject: &mut dyn Subject,
        journal: &mut Journal,
        rng: &mut impl Rng,
    ) -> Result<Plausible> {
        let composed: Vec<Prompt>;
        let mut measured: Vec<&Prompt> = evenly(prompts, MEASURED);
        if prompts.is_empty() {
            let uniform = Sampler::new(SamplerKind::Uniform, grammar);
            composed =
                (0..MEASURED).map(|_| Prompt::user(grammar.compose_plain(&uniform.draw(grammar, None, rng)))).collect();
            measured = composed.iter().collect();
        }
        let means = || Ok(subject.prompt_logprob(&measured)?.into_iter().flatten().map(mean_of).collect());
        let means: Vec<f64> = journal.unit(means)?;
        let n = means.len() as f64;
        let mean = means.iter().sum::<f64>() / n;
        let deviation = (means.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / n).sqrt().max(MIN_DEVIATION);
        let least = mean - DEVIATIONS * deviation;
        match least.is_finite() {
            true => Ok(Plausible { least, known: HashMap::new() }),
            false => Err(Error::Data {
                what: "plausible prompts of the probe search".into(),
                expected: "at least one prompt with a finite log-probability under the policy".into(),
                found: format!("{n} of {} prompts measured, mean {mean}", measured.len()),
                remedy: "give prompts that fit the policy's context, and check its weights".into(),
            }),
        }
    }

    /// Mean log-probability per token of each text, or why it has none.
    pub(crate) fn measure(&mut self, texts: &[String], subject: &mut dyn Subject) -> Result<Vec<Result<f64, String>>> {
        let mut new: Vec<&String> = texts.iter().filter(|t| !self.known.contains_key(*t)).collect();
        new.sort_unstable();
        new.dedup();
        let prompts: Vec<Prompt> = new.iter().map(|t| Prompt::user(t.as_str())).collect();
        let rows = ask_some(prompts.iter().map(Some), |prompts| subject.prompt_logprob(prompts))?;
        for (text, row) in new.into_iter().zip(rows.into_iter().flatten()) {
            self.known.insert(text.clone(), row.map(mean_of).map_err(|e| e.to_string()));
        }
        Ok(texts.iter().map(|text| self.known[text].clone()).collect())
    }

    /// Whether a mean log-probability is high enough; never for NaN.
    pub(crate) fn accepts(&self, mean: f64) -> bool {
        mean >= self.least
    }
}

fn mean_of((sum, n): (f64, usize)) -> f64 {
    sum / n.max(1) as f64
}

/// At most `n` of the items, spread evenly over all.
fn evenly<T>(items: &[T], n: usize) -> Vec<&T> {
    let take = items.len().min(n);
    (0..take).map(|i| &items[i * items.len() / take]).collect()
}
