//! How much more an adaptive search finds than a uniform one at equal queries.

use super::summary::{Diversity, SearchSummary};
use super::writing::Writing;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const DRAWS: usize = 10_000;
/// With fewer found by the uniform search a ratio says nothing.
const LEAST_FOR_RATIO: usize = 5;

/// What the adaptive searches found, one per seed, and what uniform ones found with as many queries.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeResult {
    pub(crate) queries: usize,
    pub(crate) coupled_found: usize,
    /// Distinct coupled failures (near-duplicates count once).
    pub(crate) distinct: usize,
    /// Distinct coupled failures per 1000 queries.
    pub(crate) per_1000: Option<f64>,
    /// Unknown where the sides made different numbers of queries, as a grammar does that is exhausted early: they are not comparable.
    pub(crate) uniform_per_1000: Option<f64>,
    /// Ratio of the two; null if the uniform searches found fewer than 5 together.
    pub lift: Option<f64>,
    pub lift_ci95: Option<[f64; 2]>,
    /// Of the first seed.
    #[serde(flatten)]
    pub(crate) diversity: Diversity,
    pub(crate) reprobe_per_1000: Option<f64>,
    /// What an attacker wrote in the adaptive searches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writing: Option<Writing>,
}

/// Pools the searches of each side, one per seed, and takes 95 % intervals by a seeded bootstrap: seeds are drawn with
/// replacement, and each count anew from a Poisson distribution, so that a single seed has an interval too.
pub fn lift(adaptive: &[SearchSummary], uniform: &[SearchSummary], seed: u64) -> ProbeResult {
    let sum = |side: &[SearchSummary], of: fn(&SearchSummary) -> usize| side.iter().map(of).sum::<usize>();
    let (queries, distinct) = (sum(adaptive, |s| s.queries), sum(adaptive, |s| s.distinct));
    let per_1000 = |found: f64| 1000.0 * found / queries as f64;
    let mut result = ProbeResult {
        queries,
        coupled_found: sum(adaptive, |s| s.coupled_found),
        distinct,
        per_1000: (queries > 0).then(|| per_1000(distinct as f64)),
        diversity: adaptive.first().map(|s| s.diversity.clone()).unwrap_or_default(),
        writing: adaptive.iter().filter_map(|s| s.writing.as_ref()).cloned().reduce(Writing::add),
        ..ProbeResult::default()
    };
    if queries == 0 || queries != sum(uniform, |s| s.queries) || adaptive.len() != uniform.len() {
        return result;
    }
    let control = sum(uniform, |s| s.distinct);
    result.uniform_per_1000 = Some(per_1000(control as f64));
    if control >= LEAST_FOR_RATIO {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut resample = |side: &[SearchSummary]| -> f64 {
            let mut one = || {
                let drawn = side.choose(&mut rng);
                drawn.map_or(0.0, |s| 1000.0 / s.queries.max(1) as f64 * poisson(s.distinct, &mut rng))
            };
            (0..side.len()).map(|_| one()).sum::<f64>() / side.len() as f64
        };
        // A draw without a uniform failure counts as half of one.
        let ratio = |_| resample(adaptive) / resample(uniform).max(per_1000(0.5));
        result.lift_ci95 = Some(middle((0..DRAWS).map(ratio).collect()));
        result.lift = Some(distinct as f64 / control as f64);
    }
    result
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
        let l = lift(&side(&[200, 210, 190]), &side(&[80, 85, 75]), 7);
        assert_eq!((l.per_1000, l.uniform_per_1000, l.lift), (Some(200.0), Some(80.0), Some(2.5)));
        let [low, high] = l.lift_ci95.expect("ratio");
        assert!(low > 2.0 && low < 2.5 && high > 2.5 && high < 3.1, "{low} … {high}");
        let [low, high] = lift(&side(&[400, 100, 100]), &side(&[80, 85, 75]), 7).lift_ci95.expect("ratio");
        assert!(high - low > 1.5, "{low} … {high}");
    }

    #[test]
    fn no_ratio_over_a_handful_and_no_lift_at_unequal_budgets() {
        let few = lift(&side(&[30]), &side(&[4]), 7);
        assert_eq!((few.uniform_per_1000, few.lift, few.lift_ci95), (Some(4.0), None, None));
        let unequal = lift(&side(&[30, 20]), &side(&[4]), 7);
        assert_eq!((unequal.queries, unequal.distinct, unequal.uniform_per_1000), (2000, 50, None));
        assert_eq!(lift(&[], &[], 7), ProbeResult::default());
    }
}
