//! τ_r: from which score on the reward model is held to approve. Calibrated once, on r_0. It is the threshold that separates
//! chosen from rejected calibration answers best: the midpoint of the widest plateau of best balanced accuracy ((share of chosen
//! with r ≥ τ_r + share of rejected with r < τ_r) / 2), the lowest on a tie.

use crate::error::{Error, Result};
use crate::judge::Thresholds;

/// Below this balanced accuracy the reward model's scores do not say which of two answers is the better one.
const LEAST_BALANCED_ACCURACY: f64 = 0.6;
/// Below this standard deviation all scores are one score.
const LEAST_DEVIATION: f64 = 1e-6;

/// Thresholds beside a judge's `tau_h`, and the balanced accuracy of τ_r, from the raw scores of chosen and rejected answers. Fails
/// if they do not vary, do not separate, or are not finite.
pub(crate) fn calibrate(chosen: &[f32], rejected: &[f32], tau_h: f64) -> Result<(Thresholds, f64)> {
    let all = || chosen.iter().chain(rejected).map(|&score| f64::from(score));
    if chosen.is_empty() || rejected.is_empty() {
        let found = format!("{} chosen and {} rejected", chosen.len(), rejected.len());
        return Err(unusable("at least one scored answer of each side", found));
    }
    if let Some(score) = all().find(|score| !score.is_finite()) {
        return Err(unusable("finite scores", format!("{score}")));
    }
    let n = all().count() as f64;
    let mu_0 = all().sum::<f64>() / n;
    let s = (all().map(|score| (score - mu_0).powi(2)).sum::<f64>() / n).sqrt();
    if s < LEAST_DEVIATION {
        return Err(unusable("scores that vary (standard deviation ≥ 1e-6)", format!("{s:.1e}")));
    }
    let (tau_r, balanced_accuracy) = widest_best_plateau(chosen, rejected);
    if balanced_accuracy < LEAST_BALANCED_ACCURACY {
        let found = format!("balanced accuracy {balanced_accuracy:.3} at best");
        return Err(unusable("scores that separate chosen from rejected (balanced accuracy ≥ 0.6)", found));
    }
    Ok((Thresholds { tau_h, tau_r, mu_0, s }, balanced_accuracy))
}

fn unusable(expected: &str, found: String) -> Error {
    Error::Data {
        what: "calibration of the reward threshold".into(),
        expected: expected.into(),
        found,
        remedy: "check that `chosen` and `rejected` are not swapped and that the reward model fits its tokenizer and template".into(),
    }
}

/// The best (τ, balanced accuracy) over thresholds between two scores. Accuracy is constant for τ in (v_i, v_{i+1}]; neighbouring
/// pieces of the same accuracy are one plateau. Counts are compared as integers: rounding must not break a tie.
fn widest_best_plateau(chosen: &[f32], rejected: &[f32]) -> (f64, f64) {
    let mut scores: Vec<(f64, bool)> = chosen.iter().map(|&score| (f64::from(score), true)).collect();
    scores.extend(rejected.iter().map(|&score| (f64::from(score), false)));
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (positives, negatives) = (chosen.len() as u64, rejected.len() as u64);

    // All of the lowest threshold's answers are approved; each score passed takes its answers away.
    let (mut approved, mut refused) = (positives, 0);
    let mut best = (0, f64::NEG_INFINITY, 0.0); // (accuracy × 2·positives·negatives, width, midpoint)
    let mut plateau: Option<(u64, f64)> = None; // (accuracy, lower end) of the plateau that is open
    for (i, &(score, is_chosen)) in scores.iter().enumerate() {
        if is_chosen {
            approved -= 1
        } else {
            refused += 1
        }
        let Some(&(next, _)) = scores.get(i + 1) else { break };
        if next == score {
            continue;
        }
        let accuracy = approved * negatives + refused * positives;
        let lower = match plateau {
            Some((same, lower)) if same == accuracy => lower,
            _ => score,
        };
        plateau = Some((accuracy, lower));
        let width = next - lower;
        if accuracy > best.0 || (accuracy == best.0 && width > best.1) {
            best = (accuracy, width, lower + width / 2.0);
        }
    }
    (best.2, best.0 as f64 / (2 * positives * negatives) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_midpoint_of_the_gap_between_separated_scores() {
        let (Thresholds { tau_r, mu_0, s, .. }, accuracy) = calibrate(&[2.0, 3.0], &[-1.0, 0.0], 0.5).unwrap();
        assert_eq!((tau_r, accuracy, mu_0), (1.0, 1.0, 1.0));
        assert!((s - 2.5f64.sqrt()).abs() <= 1e-12, "{s}");
    }

    #[test]
    fn the_widest_best_plateau() {
        for (chosen, rejected, expected) in [
            (&[1.0, 5.0][..], &[0.0, 2.0][..], (3.5, 0.75)), // 3/4 in (0, 1] and again in (2, 5]
            (&[3.0, 5.0], &[0.0, 4.0], (1.5, 0.75)),         // in (0, 3] and (4, 5]: the wider one lies below
            (&[1.0, 3.0], &[0.0, 2.0], (0.5, 0.75)),         // of equally wide ones the lowest
            (&[2.0, 4.0], &[0.0, 2.0], (2.0, 0.75)),         // one of each side at 2: (0, 4] is one plateau
            (&[2.0], &[1.0, 0.0, -1.0, -2.0], (1.5, 1.0)),   // classes of unequal size count alike
            (&[0.0], &[1.0, -1.0, -2.0, -3.0], (-0.5, 0.875)), // where plain accuracy would reject everything
        ] {
            assert_eq!(widest_best_plateau(chosen, rejected), expected, "{chosen:?}, {rejected:?}");
        }
    }

    #[test]
    fn the_threshold_lies_between_neighbouring_floats() {
        let (low, high) = (1.0f32, f32::from_bits(1.0f32.to_bits() + 1));
        let tau = calibrate(&[high, high + 1.0], &[low, low - 1.0], 0.5).unwrap().0.tau_r;
        assert!(f64::from(low) < tau && tau < f64::from(high), "{tau}");
    }

    #[test]
    fn what_cannot_be_calibrated_is_an_error_with_a_remedy() {
        let message = |chosen: &[f32], rejected: &[f32]| calibrate(chosen, rejected, 0.5).unwrap_err().to_string();
        assert!(message(&[], &[1.0]).contains("0 chosen and 1 rejected"));
        assert!(message(&[1.0, 1.0], &[1.0]).contains("standard deviation"));
        assert!(message(&[f32::NAN], &[1.0]).contains("found NaN"));
        let swapped = message(&[0.0, 1.0, 2.0, 3.0], &[4.0, 5.0, 6.0, 7.0]);
        assert!(swapped.contains("balanced accuracy") && swapped.contains("swapped"), "{swapped}");
    }
}
