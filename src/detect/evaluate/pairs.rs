//! The calibration pairs: thresholds by r_0, and how far r_φ has moved from it.

use crate::detect::evaluate::failures::rate;
use crate::detect::evaluate::{ERRORS_FAIL, Evaluation};
use crate::detect::examiner::{Examiner, Known, Role, Text};
use crate::detect::stats::{mean, spearman};
use crate::error::{Error, Result};
use crate::judge::{Harm, Thresholds, calibrate};
use crate::model::subject::{Version, ask_some};
use crate::text::rows::Preference;

/// Calibration pairs as r_0 sees them.
pub(super) struct Pairs {
    rows: Vec<Preference>,
    /// r_0 of chosen and rejected; `None` where the pair could not be scored, and then it is left out for good.
    start: Vec<Option<[f64; 2]>>,
    /// Validated answers [chosen, rejected] that r_0 has right: only these may not drift.
    right: Vec<[bool; 2]>,
}

impl Pairs {
    pub(super) fn calibrate(examiner: &mut Examiner, rows: Vec<Preference>) -> Result<(Pairs, Thresholds, f64)> {
        let start = scores(examiner, Version::Start, &rows)?;
        check_errors(&start)?;
        let known: Vec<Option<[f64; 2]>> = start.into_iter().map(|pair| pair.ok()).collect();
        let side = |side: usize| -> Vec<f32> { known.iter().flatten().map(|pair| pair[side] as f32).collect() };
        let (thresholds, balanced_accuracy) = calibrate(&side(0), &side(1), examiner.tau_h)?;
        let right = right_answers(examiner, &rows, &known, thresholds.tau_r)?;
        Ok((Pairs { rows, start: known, right }, thresholds, balanced_accuracy))
    }

    /// Fixed drift, raw and centred; pairs kept and mended; rank correlation with r_0; τ_r as r_φ itself calibrates to.
    pub(super) fn measure(
        &self,
        examiner: &mut Examiner,
        reward: Version,
        s: f64,
        Evaluation { measure, counts, .. }: &mut Evaluation,
    ) -> Result<()> {
        let now = scores(examiner, reward, &self.rows)?;
        let both = || self.start.iter().zip(&now).map(|(start, now)| Some((start.as_ref()?, now.as_ref().ok()?)));
        counts.rows += self.rows.len() as u64;
        counts.errors += both().filter(Option::is_none).count() as u64;

        let moved: Vec<f64> = both()
            .zip(&self.right)
            .filter_map(|(pair, right)| pair.zip(Some(right)))
            .flat_map(|((start, now), right)| (0..2).filter(|&i| right[i]).map(move |i| now[i] - start[i]))
            .collect();
        let shift = mean(moved.iter().copied()).unwrap_or(0.0);
        measure.reward_drift = mean(moved.iter().map(|moved| moved.abs() / s));
        measure.reward_drift_centred = mean(moved.iter().map(|moved| (moved - shift).abs() / s));
        counts.drift = moved.len() as u64;

        let known: Vec<(&[f64; 2], &[f64; 2])> = both().flatten().collect();
        let ordered = |pair: &[f64; 2]| pair[0] > pair[1];
        let of = |right: bool| {
            known.iter().filter(move |(start, _)| ordered(start) == right).map(|(_, now)| Some(ordered(now)))
        };
        let kept = rate(of(true));
        (measure.pairs_kept, counts.pairs) = (kept.rate, kept.n);
        measure.pairs_mended = rate(of(false)).rate;
        let unmarked = both().zip(&self.right).filter_map(|(pair, right)| pair.zip(Some(right)));
        let unmarked =
            unmarked.flat_map(|((start, now), right)| (0..2).filter(|&i| right[i]).map(move |i| (start[i], now[i])));
        measure.spearman = spearman(&unmarked.collect::<Vec<_>>());
        let side = |side: usize| -> Vec<f32> { known.iter().map(|(_, now)| now[side] as f32).collect() };
        // Scores that no longer separate the pairs have no threshold: unknown, with a warning by the caller.
        measure.tau_r_recalibrated =
            calibrate(&side(0), &side(1), examiner.tau_h).ok().map(|(thresholds, _)| thresholds.tau_r);
        Ok(())
    }
}

/// [chosen, rejected] per pair.
fn scores(examiner: &mut Examiner, version: Version, rows: &[Preference]) -> Result<Vec<Known<[f64; 2]>>> {
    let texts: Vec<Text> = rows
        .iter()
        .flat_map(|row| [(&row.prompt, row.chosen.as_str()), (&row.prompt, row.rejected.as_str())])
        .collect();
    let scores = examiner.rewards(version, &texts)?;
    Ok(scores.chunks_exact(2).map(|pair| Ok([pair[0].clone()?, pair[1].clone()?])).collect())
}

fn check_errors(pairs: &[Known<[f64; 2]>]) -> Result<()> {
    let errors = pairs.iter().filter(|pair| pair.is_err()).count();
    if errors as f64 <= ERRORS_FAIL * pairs.len() as f64 {
        return Ok(());
    }
    let first = pairs.iter().find_map(|pair| pair.as_ref().err()).cloned().unwrap_or_default();
    Err(Error::Data {
        what: "calibration pairs".into(),
        expected: "at most 5 % that cannot be scored".into(),
        found: format!("{errors} of {}; the first: {first}", pairs.len()),
        remedy: "check that the pairs fit the reward model's context and template".into(),
    })
}

/// Wrong: misordered or tied by r_0, or judged harmful with r_0 ≥ τ_r. Only answers of well ordered pairs that r_0 approves are
/// judged; one that cannot be judged does not count as right.
fn right_answers(
    examiner: &mut Examiner,
    rows: &[Preference],
    start: &[Option<[f64; 2]>],
    tau_r: f64,
) -> Result<Vec<[bool; 2]>> {
    let ordered = |pair: &Option<[f64; 2]>| pair.is_some_and(|[chosen, rejected]| chosen > rejected);
    let texts = rows.iter().zip(start).flat_map(|(row, pair)| {
        let approved = |side: usize| ordered(pair) && pair.is_some_and(|pair| pair[side] >= tau_r);
        let text = |side, text| approved(side).then_some((&row.prompt, text));
        [text(0, row.chosen.as_str()), text(1, row.rejected.as_str())]
    });
    let harms = ask_some(texts, |texts| examiner.judged(Role::Judge, texts))?;
    let safe = |harm: &Option<Known<Harm>>| {
        harm.as_ref().is_none_or(|harm| harm.as_ref().is_ok_and(|harm| !harm.is_harmful(examiner.tau_h)))
    };
    let right = start.iter().zip(harms.chunks_exact(2));
    Ok(right.map(|(pair, harms)| [0, 1].map(|side| ordered(pair) && safe(&harms[side]))).collect())
}
