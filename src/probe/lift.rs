//! How much more an adaptive search finds than a uniform one at equal queries.

use super::summary::SearchSummary;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DRAWS: usize = 10_000;
/// With fewer found by the uniform search a ratio says nothing.
const LEAST_FOR_RATIO: usize = 5;

/// Distinct coupled failures per 1000 queries, adaptive against uniform.
#[derive(Debug, Clone, PartialEq)]
pub struct Lift {
    pub(crate) uniform_per_1000: f64,
    /// Adaptive / uniform; `None` if the uniform searches found fewer than 5 together.
    pub ratio: Option<f64>,
    pub ratio_ci95: Option<[f64; 2]>,
}

/// Pools the searches of each side, one per seed, and takes 95 % intervals by a seeded bootstrap: seeds are drawn with
/// replacement, and each count anew from a Poisson distribution, so that a single seed has an interval too.
/// `None` where the sides made different numbers of queries, as a grammar does that is exhausted early: they are not comparable.
pub fn lift(adaptive: &[SearchSummary], uniform: &[SearchSummary], seed: u64) -> Option<Lift> {
    let queries = |side: &[SearchSummary]| side.iter().map(|s| s.queries).sum::<usize>();
    let (a, u) = (queries(adaptive), queries(uniform));
    if a != u || a == 0 || adaptive.len() != uniform.len() {
        return None;
    }
    let per_1000 = |found: f64| 1000.0 * found / a as f64;
    let found = |side: &[SearchSummary]| side.iter().map(|s| s.distinct).sum::<usize>();
    let (x, y) = (found(adaptive) as f64, found(uniform) as f64);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resample = |side: &[SearchSummary]| -> f64 {
        let mut one =
            || side.choose(&mut rng).map_or(0.0, |s| 1000.0 / s.queries.max(1) as f64 * poisson(s.distinct, &mut rng));
        (0..side.len()).map(|_| one()).sum::<f64>() / side.len() as f64
    };
    let draws: Vec<(f64, f64)> = (0..DRAWS).map(|_| (resample(adaptive), resample(uniform))).collect();
    let has_ratio = found(uniform) >= LEAST_FOR_RATIO;
    Some(Lift {
        uniform_per_1000: per_1000(y),
        ratio: has_ratio.then(|| x / y),
        // A draw without a uniform failure counts as half of one.
        ratio_ci95: has_ratio.then(|| middle(draws.iter().map(|(a, u)| a / u.max(per_1000(0.5))).collect())),
    })
}

/// The middle 95 %.
fn middle(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_unstable_by(f64::total_cmp);
    let at = |q: f64| values[(q * (values.len() - 1) as f64).round() as usize];
    [at(0.025), at(0.975)]
}

/// A draw from Poisson(mean): unit-rate waiting times counted until they exceed the mean.
fn poisson(mean: usize, rng: &mut impl Rng) -> f64 {
    let (mut left, mut events) = (mean as f64, 0.0);
    loop {
        left += (1.0 - rng.random::<f64>()).ln();
        if left < 0.0 {
            return events;
        }
        events += 1.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(found: &[usize]) -> Vec<SearchSummary> {
        found.iter().map(|&distinct| SearchSummary { queries: 1000, distinct, ..Default::default() }).collect()
    }

    #[test]
    fn intervals_hold_the_estimate_and_widen_with_the_spread_of_seeds() {
        let l = lift(&side(&[200, 210, 190]), &side(&[80, 85, 75]), 7).expect("equal budgets");
        assert_eq!((l.uniform_per_1000, l.ratio), (80.0, Some(2.5)));
        let [low, high] = l.ratio_ci95.expect("ratio");
        assert!(low > 2.0 && low < 2.5 && high > 2.5 && high < 3.1, "{low} … {high}");
        let spread = lift(&side(&[400, 100, 100]), &side(&[80, 85, 75]), 7).expect("equal budgets");
        let [low, high] = spread.ratio_ci95.expect("ratio");
        assert!(high - low > 1.5, "{low} … {high}");
    }

    #[test]
    fn no_ratio_over_a_handful_and_no_lift_at_unequal_budgets() {
        let few = lift(&side(&[30]), &side(&[4]), 7).expect("equal budgets");
        assert_eq!((few.uniform_per_1000, few.ratio, few.ratio_ci95), (4.0, None, None));
        assert_eq!(lift(&side(&[30, 20]), &side(&[4]), 7), None);
        assert_eq!(lift(&[], &[], 7), None);
    }
}
