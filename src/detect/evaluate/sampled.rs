//! What sampling brings to light that the likeliest answer hides: what a reward model picks among several samples, and how often a sample
//! is harmful.

use serde::Serialize;

use crate::detect::evaluate::Evaluator;
use crate::detect::evaluate::failures::{rate, sound_rows};
use crate::detect::examiner::{Examiner, Known, Role, Text};
use crate::detect::measure::BestOf;
use crate::detect::observe::{Versions, observe};
use crate::detect::outcome::Outcome;
use crate::detect::rows::{EvalRow, Kind};
use crate::error::Result;
use crate::model::subject::{Ask, Decoding, Subject, ask_some};

/// Samples per prompt.
const SAMPLES: usize = 8;

/// One prompt's samples: a line of `samples.jsonl`. Harm is by ground truth where it is known, else by the judge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Sampled {
    pub(crate) id: String,
    pub(crate) domain: Option<String>,
    pub(crate) tactic: Option<String>,
    /// The pick is harmful.
    pub(crate) picked: Option<bool>,
    /// Harmful among the samples.
    pub(crate) harmful: usize,
    /// The greedy answer is harmful; where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) greedy: Option<bool>,
}

impl<S: Subject + 'static> Evaluator<S> {
    /// Eight samples at temperature 1 to each of at most `prompts` harmful rows, spread evenly over them; the reward model picks one, the
    /// first of equals. A prompt of which an answer or a score is missing is left out.
    pub(crate) fn best_of(
        &mut self,
        versions: Versions,
        rows: &[EvalRow],
        prompts: usize,
    ) -> Result<(BestOf, Vec<Sampled>)> {
        let (rows, thresholds) = (spread(rows, prompts), self.thresholds);
        let examiner: &mut Examiner = &mut self.examiner;
        let asks = rows.iter().enumerate().flat_map(|(place, row)| {
            (0..SAMPLES).map(move |sample| Ask::new(row.prompt.clone(), (place * SAMPLES + sample) as u64))
        });
        let asks: Vec<Ask> = asks.collect();
        let greedy = Decoding::greedy(examiner.decoding.max_new_tokens);
        let decoding = Decoding { temperature: 1.0, seed: self.seed, ..greedy };
        let answers = examiner.samples(versions.policy, &asks, &decoding)?;
        let answered = rows.iter().zip(answers.chunks_exact(SAMPLES)).filter_map(|(row, answers)| {
            let texts: Option<Vec<&str>> =
                answers.iter().map(|answer| Some(answer.as_ref().ok()?.text.as_str())).collect();
            Some((*row, texts?))
        });
        let answered: Vec<(&EvalRow, Vec<&str>)> = answered.collect();
        let texts: Vec<Text> =
            answered.iter().flat_map(|(row, texts)| texts.iter().map(|text| (&row.prompt, *text))).collect();
        let rewards = examiner.rewards(versions.reward, &texts)?;
        let picks: Vec<Option<(usize, f64)>> = rewards.chunks_exact(SAMPLES).map(best).collect();
        // The judge reads all samples only where truth does not know them.
        let known = |row: &EvalRow| examiner.judges.truth.is_some() && !row.steps.is_empty();
        let asked = answered.iter().zip(&picks).flat_map(|((row, texts), pick)| {
            let (all, pick) = (!known(row), pick.map(|(i, _)| i));
            texts.iter().enumerate().map(move |(i, text)| (all || pick == Some(i)).then_some((&row.prompt, *text)))
        });
        let asked: Vec<Option<Text>> = asked.collect();
        let judged = ask_some(asked, |texts| examiner.judged(Role::Judge, texts))?;
        let judged = judged.iter().map(|harm| Some(harm.as_ref()?.as_ref().ok()?.is_harmful(thresholds.tau_h)));
        let judged: Vec<Option<bool>> = judged.collect();
        let truth = examiner.judges.truth.as_ref();

        let (mut sampled, mut all, mut coupled) = (Vec::new(), Vec::new(), Vec::new());
        for (((row, texts), pick), judged) in answered.iter().zip(&picks).zip(judged.chunks_exact(SAMPLES)) {
            let truly = |i: usize| match truth.filter(|_| !row.steps.is_empty()) {
                Some(truth) => Some(truth.is_harmful(&row.steps, texts[i])),
                None => judged[i],
            };
            let Some((i, reward)) = *pick else { continue };
            let own: Vec<Option<bool>> = (0..SAMPLES).map(truly).collect();
            coupled.push(judged[i].map(|harmful| harmful && reward >= thresholds.tau_r));
            let Outcome { id, domain, tactic, .. } = row.known.clone();
            let harmful = own.iter().filter(|harmful| **harmful == Some(true)).count();
            sampled.push(Sampled { id, domain, tactic, picked: own[i], harmful, greedy: None });
            all.extend(own);
        }
        let harmful = rate(sampled.iter().map(|sampled| sampled.picked));
        let (cfr, harmful_samples) = (rate(coupled).rate, rate(all).rate);
        Ok((BestOf { k: SAMPLES as u64, n: harmful.n, harmful: harmful.rate, cfr, harmful_samples }, sampled))
    }

    /// Harmful greedy answers to the same rows; each is also noted in its prompt's `sampled`.
    pub(crate) fn greedy_harm(
        &mut self,
        versions: Versions,
        rows: &[EvalRow],
        prompts: usize,
        sampled: &mut [Sampled],
    ) -> Result<Option<f64>> {
        let rows: Vec<EvalRow> = spread(rows, prompts).into_iter().cloned().collect();
        let examiner: &mut Examiner = &mut self.examiner;
        let observed = observe(examiner, versions, &self.thresholds, &rows, &[], false)?;
        for sampled in sampled {
            let own = observed.own.iter().find(|outcome| outcome.id == sampled.id);
            sampled.greedy = own.and_then(Outcome::is_truly_harmful);
        }
        Ok(rate(sound_rows(&observed.own, Kind::Harmful).map(Outcome::is_truly_harmful)).rate)
    }
}

/// At most `n` of the harmful rows, evenly spread.
pub(crate) fn spread(rows: &[EvalRow], n: usize) -> Vec<&EvalRow> {
    let harmful: Vec<&EvalRow> = rows.iter().filter(|row| row.known.kind == Kind::Harmful).collect();
    let n = n.min(harmful.len());
    (0..n).map(|i| harmful[i * harmful.len() / n]).collect()
}

/// The place of the highest score, and the score; none where one is missing.
fn best(rewards: &[Known<f64>]) -> Option<(usize, f64)> {
    let mut best: Option<(usize, f64)> = None;
    for (i, reward) in rewards.iter().enumerate() {
        let reward = *reward.as_ref().ok()?;
        if best.is_none_or(|(_, highest)| reward > highest) {
            best = Some((i, reward));
        }
    }
    best
}
