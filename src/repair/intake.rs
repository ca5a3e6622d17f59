//! Intake: every y⁺ and y⁻ that is trained on has been judged on its own side of the band.

use serde::Serialize;

use super::data::{Failure, RepairData};
use crate::error::Result;
use crate::judge::{AMBIGUITY_BAND as BAND, Judge, Thresholds};
use crate::model::{Ask, Decoding, Subject, Version};
use crate::text::Prompt;

/// Samples drawn for a failure that has no y⁺.
const SAMPLES: usize = 8;

/// An item kept out of the repair, with the reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quarantined {
    pub(crate) prompt: String,
    pub(crate) reason: String,
}

/// Keeps the failures whose texts lie on their own side of the band, after giving those without y⁺ the safest of eight samples
/// where one is safe enough. Returns what was left out.
pub fn admit(
    data: &mut RepairData,
    subject: &mut dyn Subject,
    judge: &mut dyn Judge,
    thresholds: &Thresholds,
    decoding: &Decoding,
) -> Result<Vec<Quarantined>> {
    let mut quarantined = Vec::new();
    let rejected = judged(data, judge, thresholds, |f| Some(&f.rejected.text))?;
    let mut keep = rejected.into_iter();
    data.failures.retain(|failure| {
        let p = keep.next().flatten();
        let holds = p.is_some_and(|p| p >= thresholds.tau_h + BAND);
        if !holds {
            quarantined.push(refuse(failure, "y-", p, ">=", thresholds.tau_h + BAND));
        }
        holds
    });
    let chosen = judged(data, judge, thresholds, |f| f.chosen.as_ref())?;
    for (failure, p) in data.failures.iter_mut().zip(chosen) {
        if failure.chosen.is_some() && !p.is_some_and(|p| p <= thresholds.tau_h - BAND) {
            quarantined.push(refuse(failure, "y+", p, "<=", thresholds.tau_h - BAND));
            failure.chosen = None;
        }
    }
    sample_missing(data, subject, judge, thresholds, decoding)?;
    Ok(quarantined)
}

fn refuse(failure: &Failure, which: &str, p: Option<f64>, relation: &str, limit: f64) -> Quarantined {
    let found = p.map_or("no judgement".to_string(), |p| format!("{p:.3}"));
    Quarantined {
        prompt: failure.prompt.text().to_string(),
        reason: format!("{which}: expected p_harm {relation} {limit:.2}, found {found}"),
    }
}

/// p_harm of one text per failure; `None` where there is no text or no judgement.
fn judged<'a>(
    data: &'a RepairData,
    judge: &mut dyn Judge,
    thresholds: &Thresholds,
    text: impl Fn(&'a Failure) -> Option<&'a String>,
) -> Result<Vec<Option<f64>>> {
    let rows: Vec<(&Prompt, &str)> =
        data.failures.iter().filter_map(|f| Some((&f.prompt, text(f)?.as_str()))).collect();
    let mut harms = judge.judge(&rows, thresholds.tau_h)?.into_iter();
    let one = |f: &'a Failure| text(f).and_then(|_| harms.next()).and_then(|harm| Some(harm.ok()?.p_harm));
    Ok(data.failures.iter().map(one).collect())
}

/// Of eight samples the one with the lowest p_harm, if that lies below the band.
fn sample_missing(
    data: &mut RepairData,
    subject: &mut dyn Subject,
    judge: &mut dyn Judge,
    thresholds: &Thresholds,
    decoding: &Decoding,
) -> Result<()> {
    let missing: Vec<usize> = (0..data.failures.len()).filter(|&i| data.failures[i].chosen.is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let ask = |&i: &usize, k: usize| Ask::new(data.failures[i].prompt.clone(), (i * SAMPLES + k) as u64);
    let asks: Vec<Ask> = missing.iter().flat_map(|i| (0..SAMPLES).map(move |k| ask(i, k))).collect();
    let decoding = Decoding { temperature: 1.0, ..decoding.clone() };
    let answers = subject.answer(Version::Start, &asks, &decoding)?;
    let mut rows = Vec::new();
    for (ask, answer) in asks.iter().zip(&answers) {
        if let Ok(answer) = answer {
            rows.push((&ask.prompt, answer.text.as_str()));
        }
    }
    let mut harms = judge.judge(&rows, thresholds.tau_h)?.into_iter();
    let mut best: Vec<Option<(f64, String)>> = vec![None; missing.len()];
    for (n, answer) in answers.iter().enumerate() {
        let Ok(answer) = answer else { continue };
        let Some(Ok(harm)) = harms.next() else { continue };
        let slot = &mut best[n / SAMPLES];
        let safe = harm.p_harm < thresholds.tau_h - BAND && !answer.text.trim().is_empty();
        if safe && slot.as_ref().is_none_or(|(p, _)| harm.p_harm < *p) {
            *slot = Some((harm.p_harm, answer.text.clone()));
        }
    }
    for (i, best) in missing.into_iter().zip(best) {
        data.failures[i].chosen = best.map(|(_, text)| text);
    }
    Ok(())
}
