//! Intake: every y⁺ and y⁻ that is trained on has been judged on its own side of the band.

use serde::{Deserialize, Serialize};

use super::data::{Failure, RepairData};
use super::trainer::Setting;
use crate::error::Result;
use crate::judge::AMBIGUITY_BAND as BAND;
use crate::model::subject::ask_some;
use crate::model::{Ask, Decoding, Subject, Version};
use crate::ops::Ops;

/// Samples drawn for a failure that has no y⁺.
const SAMPLES: usize = 8;

/// An item kept out of the repair, with the reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quarantined {
    pub(crate) prompt: String,
    pub(crate) reason: String,
}

/// Keeps the failures whose texts lie on their own side of the band, after giving those without y⁺ the safest of eight samples
/// where one is safe enough. Returns what was left out.
pub fn admit<B: Ops>(data: &mut RepairData, setting: &mut Setting<B>) -> Result<Vec<Quarantined>> {
    let (mut quarantined, thresholds) = (Vec::new(), setting.thresholds);
    let rejected = judged(data, setting, |f| Some(&f.rejected.text))?;
    let mut keep = rejected.into_iter();
    data.failures.retain(|failure| {
        let p = keep.next().flatten();
        let holds = p.is_some_and(|p| p >= thresholds.tau_h + BAND);
        if !holds {
            quarantined.push(refuse(failure, "y-", p, ">=", thresholds.tau_h + BAND));
        }
        holds
    });
    let chosen = judged(data, setting, |f| f.chosen.as_ref())?;
    for (failure, p) in data.failures.iter_mut().zip(chosen) {
        if failure.chosen.is_some() && !p.is_some_and(|p| p <= thresholds.tau_h - BAND) {
            quarantined.push(refuse(failure, "y+", p, "<=", thresholds.tau_h - BAND));
            failure.chosen = None;
        }
    }
    sample_missing(data, setting)?;
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
fn judged<'a, B: Ops>(
    data: &'a RepairData,
    setting: &mut Setting<B>,
    text: impl Fn(&'a Failure) -> Option<&'a String>,
) -> Result<Vec<Option<f64>>> {
    let rows = data.failures.iter().map(|f| Some((&f.prompt, text(f)?.as_str())));
    let harms = ask_some(rows, |rows| setting.judge.judge(rows, setting.thresholds.tau_h))?;
    Ok(harms.into_iter().map(|harm| Some(harm?.ok()?.p_harm)).collect())
}

/// Of eight samples the one with the lowest p_harm, if that lies below the band.
fn sample_missing<B: Ops>(data: &mut RepairData, setting: &mut Setting<B>) -> Result<()> {
    let missing: Vec<usize> = (0..data.failures.len()).filter(|&i| data.failures[i].chosen.is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let ask = |&i: &usize, k: usize| Ask::new(data.failures[i].prompt.clone(), (i * SAMPLES + k) as u64);
    let asks: Vec<Ask> = missing.iter().flat_map(|i| (0..SAMPLES).map(move |k| ask(i, k))).collect();
    let decoding = Decoding { temperature: 1.0, ..setting.decoding.clone() };
    let answers = setting.pair.answer(Version::Start, &asks, &decoding)?;
    let tau_h = setting.thresholds.tau_h;
    let rows = asks.iter().zip(&answers).map(|(ask, answer)| Some((&ask.prompt, answer.as_ref().ok()?.text.as_str())));
    let harms = ask_some(rows, |rows| setting.judge.judge(rows, tau_h))?;
    let mut best: Vec<Option<(f64, String)>> = vec![None; missing.len()];
    for (n, (answer, harm)) in answers.into_iter().zip(harms).enumerate() {
        let (Ok(answer), Some(Ok(harm))) = (answer, harm) else { continue };
        let slot = &mut best[n / SAMPLES];
        let safe = harm.p_harm < tau_h - BAND && !answer.text.trim().is_empty();
        if safe && slot.as_ref().is_none_or(|(p, _)| harm.p_harm < *p) {
            *slot = Some((harm.p_harm, answer.text));
        }
    }
    for (i, best) in missing.into_iter().zip(best) {
        data.failures[i].chosen = best.map(|(_, text)| text);
    }
    Ok(())
}
