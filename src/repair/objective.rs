//! The joint objective in f64 on the host, the same for every backend: log-probabilities and rewards in, loss terms and the
//! weights out that the heads' gradient rows are multiplied with.
//!
//! ```text
//! L = λ_npo·L_npo + λ_safe·L_safe + λ_retain·L_retain                        policy
//!   + λ_bt·L_bt + λ_center·L_center + λ_replay·L_replay + λ_anchor·L_anchor  reward model
//! ```
//!
//! Every term is the mean over the items of the step that carry it. ℓ is a *mean* log-probability per answer token.

use super::config::{LogpScale, RepairConfig, UnlearnLoss};
use crate::judge::Thresholds;

/// Unlikelihood leaves tokens alone that are already below this log-probability.
const UNLIKELY: f64 = -5.0;

/// A loss and the derivative by its input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Term {
    pub(crate) loss: f64,
    pub(crate) slope: f64,
}

/// σ(x) without overflow on either side.
pub(crate) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// log σ(x) without overflow on either side.
pub(crate) fn log_sigmoid(x: f64) -> f64 {
    if x >= 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() }
}

/// NPO (arXiv:2404.05868) on the summed log-probability `sum` of `n` tokens against π_0's mean `start`; the slope is by each
/// token's log p: w·(−2/b)·log σ(−b(ℓ_θ − ℓ_0)), or with sums w·(−2/(bn))·log σ(−bn(ℓ_θ − ℓ_0)).
pub(crate) fn npo(sum: f64, n: usize, start: f64, w: f64, b: f64, scale: LogpScale) -> Term {
    let n = n as f64;
    let b = if scale == LogpScale::Sum { b * n } else { b };
    let x = b * (sum / n - start);
    Term { loss: -w * 2.0 / b * log_sigmoid(-x), slope: w * 2.0 * sigmoid(x) / n }
}

/// −w·mean log(1 − p_t) over the tokens with log p_t ≥ −5. Writes each token's slope w·p/((1 − p)·m) and returns the loss.
pub(crate) fn unlikelihood(slopes: &mut [f64], logprob: &[f32], log_rest: &[f32], w: f64) -> f64 {
    let counted = logprob.iter().filter(|&&l| f64::from(l) >= UNLIKELY).count().max(1) as f64;
    let mut loss = 0.0;
    for ((slope, &l), &rest) in slopes.iter_mut().zip(logprob).zip(log_rest) {
        let (l, rest) = (f64::from(l), f64::from(rest));
        *slope = 0.0;
        if l >= UNLIKELY {
            loss -= w * rest / counted;
            *slope = w * (l - rest).exp() / counted;
        }
    }
    loss
}

/// DPO's β.
const DPO_BETA: f64 = 0.1;

/// DPO (arXiv:2305.18290): −log σ(β(Δ⁺ − Δ⁻)), each Δ an answer's summed log-probability less π_0's; the slope is by each token of y⁺,
/// its negative by each token of y⁻.
pub(crate) fn dpo(chosen: f64, rejected: f64) -> Term {
    let x = DPO_BETA * (chosen - rejected);
    Term { loss: -log_sigmoid(x), slope: -DPO_BETA * sigmoid(-x) }
}

/// −ℓ; the slope is by each token's log p.
pub(crate) fn cross_entropy(sum: f64, n: usize) -> Term {
    Term { loss: -sum / n as f64, slope: -1.0 / n as f64 }
}

/// Bradley–Terry: −log σ(r⁺ − r⁻ − m) on raw scores; the slope is by r⁺, its negative by r⁻.
pub(crate) fn bradley_terry(chosen: f64, rejected: f64, margin: f64) -> Term {
    let x = chosen - rejected - margin;
    Term { loss: -log_sigmoid(x), slope: -sigmoid(-x) }
}

/// (r̃⁺ + r̃⁻)²; the slope is by either raw score.
pub(crate) fn center(chosen: f64, rejected: f64, t: &Thresholds) -> Term {
    let sum = (chosen - t.mu_0) / t.s + (rejected - t.mu_0) / t.s;
    Term { loss: sum * sum, slope: 2.0 * sum / t.s }
}

/// (r̃_φ − r̃_0)²; the slope is by the raw score.
pub(crate) fn anchor(reward: f64, start: f64, t: &Thresholds) -> Term {
    let shift = (reward - start) / t.s;
    Term { loss: shift * shift, slope: 2.0 * shift / t.s }
}

/// The coupling weights of a step's failures, no gradient through them: ½ + σ((r_φ(y⁻) − τ_r)/s), divided by their mean, so that
/// coupling moves weight and adds none; and that mean, 1 of nothing.
pub fn coupling(rewards: &[f64], t: &Thresholds) -> (Vec<f64>, f64) {
    let weights: Vec<f64> = rewards.iter().map(|reward| 0.5 + sigmoid((reward - t.tau_r) / t.s)).collect();
    let mean = if weights.is_empty() { 1.0 } else { weights.iter().sum::<f64>() / weights.len() as f64 };
    (weights.into_iter().map(|w| w / mean).collect(), mean)
}

/// Dr.GRPO's advantages: each reward less the mean of its group, and not divided by their deviation.
pub fn advantages(rewards: &[f64]) -> Vec<f64> {
    let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    rewards.iter().map(|r| r - mean).collect()
}

/// Dr.GRPO (arXiv:2503.20783) with one update per sample (ratio 1, the clip never binds) and a k3 KL to π_0: the slope by one
/// token's log p of −A·log p + β·(e^d − d − 1), d = log π_0 − log π_θ. TRL's, but for the correction that it makes by default since
/// DeepSeek-V3.2 (`use_bias_correction_kl`): the KL times the ratio, which has the slope −β·d instead.
pub(crate) fn grpo_token(advantage: f64, logprob: f64, start: f64, beta: f64) -> Term {
    let d = start - logprob;
    Term { loss: -advantage + beta * (d.exp() - d - 1.0), slope: -advantage + beta * (1.0 - d.exp()) }
}

/// The unlearning term of one answer: loss and each token's slope.
pub(crate) fn unlearn(c: &RepairConfig, logprob: &[f32], log_rest: &[f32], start: f64, w: f64) -> (f64, Vec<f64>) {
    let mut slopes = vec![0.0; logprob.len()];
    let loss = match c.unlearn {
        UnlearnLoss::Unlikelihood => unlikelihood(&mut slopes, logprob, log_rest, w),
        UnlearnLoss::Npo => {
            let term = npo(total(logprob), logprob.len(), start, w, c.npo_beta, c.logp);
            slopes.fill(term.slope);
            term.loss
        }
    };
    (loss, slopes)
}

/// Σ in f64.
pub(crate) fn total(logprob: &[f32]) -> f64 {
    logprob.iter().map(|&l| f64::from(l)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Thresholds = Thresholds { tau_h: 0.5, tau_r: 0.3, mu_0: -0.2, s: 1.7 };

    /// The slope is the loss's own, by central differences.
    fn check(name: &str, at: f64, f: impl Fn(f64) -> Term) {
        let h = 1e-5;
        let (slope, difference) = (f(at).slope, (f(at + h).loss - f(at - h).loss) / (2.0 * h));
        let near = (difference - slope).abs() <= 1e-6 * (1.0 + slope.abs());
        assert!(near, "{name} at {at}: {slope} against {difference}");
    }

    #[test]
    fn slopes_are_derivatives() {
        for at in [-8.0, -2.5, -0.4, 0.0, 1.3, 6.0] {
            for scale in [LogpScale::Mean, LogpScale::Sum] {
                check("npo", at, |x| npo(x, 7, -0.9, 1.2, 0.7, scale));
            }
            check("dpo", at, |x| dpo(x, -1.1));
            check("dpo, rejected", at, |x| Term { slope: -dpo(0.4, x).slope, ..dpo(0.4, x) });
            check("cross entropy", at, |x| cross_entropy(x, 3));
            check("bradley-terry", at, |x| bradley_terry(x, 0.4, 0.25));
            check("center", at, |x| center(x, 0.4, &T));
            check("anchor", at, |x| anchor(x, -0.6, &T));
            let rejected = |x: f64| {
                let t = bradley_terry(0.4, x, 0.25);
                Term { loss: t.loss, slope: -t.slope }
            };
            check("bradley-terry, rejected", at, rejected);
        }
    }

    #[test]
    fn unlikelihood_slopes_are_derivatives_and_spare_the_unlikely() {
        let logprob = [-0.1f32, -2.0, -5.5];
        let rest: Vec<f32> = logprob.iter().map(|l| (1.0 - f64::from(*l).exp()).ln() as f32).collect();
        let mut slopes = [f64::NAN; 3];
        unlikelihood(&mut slopes, &logprob, &rest, 1.5);
        let loss = |l: [f64; 3]| -> f64 { -1.5 * l[..2].iter().map(|l| (1.0 - l.exp()).ln()).sum::<f64>() / 2.0 };
        for i in 0..2 {
            let at = |h: f64| {
                let mut l = logprob.map(f64::from);
                l[i] += h;
                loss(l)
            };
            let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((difference - slopes[i]).abs() <= 1e-4 * slopes[i].abs(), "{difference} against {}", slopes[i]);
        }
        assert_eq!(slopes[2], 0.0);
    }

    #[test]
    fn extremes_stay_finite_and_coupling_between_a_half_and_three_halves() {
        for x in [-1e4, 1e4] {
            assert!(npo(x, 1, 0.0, 1.0, 1.0, LogpScale::Mean).loss.is_finite());
            assert!(bradley_terry(x, 0.0, 0.0).loss.is_finite());
            assert!((0.5..=1.5).contains(&coupling(&[x], &T).1));
        }
        let (weights, mean) = coupling(&[T.tau_r, T.tau_r + T.s, T.tau_r - 1e9], &T);
        assert!(
            (weights.iter().sum::<f64>() - 3.0).abs() < 1e-12 && weights[1] > weights[0] && weights[0] > weights[2]
        );
        assert!((mean - (1.0 + 0.5 + sigmoid(1.0) + 0.5) / 3.0).abs() < 1e-12);
        assert_eq!(coupling(&[], &T), (vec![], 1.0));
    }
}
