//! Intervals and correlations. Everything random is seeded: same data, same seed, same interval.

use std::collections::HashMap;
use std::hash::Hash;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::detect::measure::Interval;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 10_000;
/// With fewer clusters a cluster bootstrap's interval means nothing.
pub(super) const LEAST_CLUSTERS: usize = 10;
/// The 0.975 quantile of the standard normal distribution.
pub(super) const Z: f64 = 1.959_963_984_540_054;

/// Wilson's 95 % interval of `hits / n` (E. B. Wilson, 1927); `None` when `n` is 0.
pub(crate) fn wilson(hits: u64, n: u64) -> Option<Interval> {
    if n == 0 {
        return None;
    }
    let (hits, n) = (hits as f64, n as f64);
    let (p, z2) = (hits / n, Z * Z);
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    // At the ends rounding could leave the interval without its own rate.
    Some([
        if hits == 0.0 { 0.0 } else { (centre - half).max(0.0) },
        if hits == n { 1.0 } else { (centre + half).min(1.0) },
    ])
}

/// What a cluster adds to the numerator and to the denominator of a rate.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Cluster {
    pub(crate) sum: f64,
    pub(crate) n: f64,
}

/// Sums (cluster key, value) per key, in order of first appearance: the order must not depend on a hash.
pub(crate) fn clusters<K: Hash + Eq>(values: impl IntoIterator<Item = (K, f64)>) -> Vec<Cluster> {
    let mut places: HashMap<K, usize> = HashMap::new();
    let mut clusters: Vec<Cluster> = Vec::new();
    for (key, value) in values {
        let place = *places.entry(key).or_insert_with(|| {
            clusters.push(Cluster::default());
            clusters.len() - 1
        });
        clusters[place].sum += value;
        clusters[place].n += 1.0;
    }
    clusters
}

/// 95 % percentile interval of Σ sum / Σ n over 10 000 resamples of whole clusters; `None` below 10 clusters. With values
/// 0 and 1 it is a rate's interval, with (after − before) on the same prompts that of a paired difference.
pub(crate) fn cluster_bootstrap(clusters: &[Cluster], seed: u64) -> Option<Interval> {
    if clusters.len() < LEAST_CLUSTERS {
        return None;
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let count = u32::try_from(clusters.len()).ok()?;
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let mut total = Cluster::default();
            for _ in 0..count {
                let drawn = clusters[random.random_range(0..count) as usize];
                total.sum += drawn.sum;
                total.n += drawn.n;
            }
            total.sum / total.n
        })
        .collect();
    means.sort_by(f64::total_cmp);
    Some([quantile(&means, 0.025)?, quantile(&means, 0.975)?])
}

/// Linear interpolation between order statistics; `sorted` ascending and `q` in 0…1. `None` of nothing.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let place = q * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

/// Mean; `None` of nothing.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.into_iter().fold((0.0, 0u64), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// Spearman's rank correlation of (x, y) pairs, ties at their mean rank. `None` for fewer than two pairs, for values that are not
/// finite, and where one side does not vary.
pub(crate) fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    if pairs.len() < 2 || !pairs.iter().all(|(x, y)| x.is_finite() && y.is_finite()) {
        return None;
    }
    let x = ranks(pairs.iter().map(|pair| pair.0));
    let y = ranks(pairs.iter().map(|pair| pair.1));
    let centre = (pairs.len() as f64 - 1.0) / 2.0;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - centre) * (b - centre)).sum::<f64>();
    let spread = (dot(&x, &x) * dot(&y, &y)).sqrt();
    (spread > 0.0).then(|| dot(&x, &y) / spread)
}

/// Ranks from 0, ties at their mean.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut order: Vec<(f64, usize)> = values.enumerate().map(|(i, value)| (value, i)).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut ranks = vec![0.0; order.len()];
    let mut first = 0;
    // `==` and not the total order: −0 and 0 are one score.
    for tied in order.chunk_by(|a, b| a.0 == b.0) {
        let rank = first as f64 + (tied.len() - 1) as f64 / 2.0;
        tied.iter().for_each(|&(_, i)| ranks[i] = rank);
        first += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, limit: f64) {
        assert!((found - expected).abs() <= limit, "found {found}, expected {expected}");
    }

    #[test]
    fn wilson_ends_where_the_rate_is_z_deviations_away() {
        for (hits, n, low, high) in [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (10, 10, 0.7225, 1.0)] {
            let [found_low, found_high] = wilson(hits, n).unwrap();
            close(found_low, low, 5e-5);
            close(found_high, high, 5e-5);
        }
        for (hits, n) in [(1u64, 3u64), (140, 1008), (21, 1008), (1007, 1008)] {
            let rate = hits as f64 / n as f64;
            for end in wilson(hits, n).unwrap() {
                close((rate - end).abs(), Z * (end * (1.0 - end) / n as f64).sqrt(), 1e-12);
            }
        }
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn a_bootstrap_has_the_binomial_width_of_what_fails_together() {
        // Every eighth run of `size` rows fails.
        let hit = |i: i32, size: i32| (i / size, f64::from(u8::from(i / size % 8 == 0)));
        let interval = |size: i32| cluster_bootstrap(&clusters((0..1000).map(|i| hit(i, size))), 7).unwrap();
        let half = |n: f64| Z * (0.125f64 * 0.875 / n).sqrt();
        let [low, high] = interval(1);
        close(low, 0.125 - half(1000.0), 0.002);
        close(high, 0.125 + half(1000.0), 0.002);
        let [low, high] = interval(25);
        close(high - low, 2.0 * half(40.0), 0.03);
    }

    #[test]
    fn a_bootstrap_is_seeded_and_needs_ten_clusters() {
        let of = |count: u32, seed| cluster_bootstrap(&clusters((0..100).map(|i| (i % count, f64::from(i % 3)))), seed);
        assert_eq!(of(9, 1), None);
        assert!(of(10, 1).is_some() && of(10, 1) == of(10, 1) && of(40, 1) != of(40, 2));
    }

    #[test]
    fn clusters_keep_their_sums_apart() {
        let found = clusters([("b", 1.0), ("a", 0.0), ("b", 0.5), ("a", 0.25)]);
        assert_eq!(found, [Cluster { sum: 1.5, n: 2.0 }, Cluster { sum: 0.25, n: 2.0 }]);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
        assert_eq!(quantile(&[1.0], 0.01), Some(1.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn spearman_of_known_tables() {
        close(spearman(&[(1.0, 10.0), (2.0, 20.0), (3.0, 1e9)]).unwrap(), 1.0, 1e-12);
        close(spearman(&[(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]).unwrap(), -1.0, 1e-12);
        // Centred ranks x: −2 −½ −½ 1 2, y: −1 −2 1½ 1½ 0; products sum to 3.75, squares to 9.5 each.
        let tied = spearman(&[(1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (4.0, 4.0), (5.0, 3.0)]);
        close(tied.unwrap(), 3.75 / 9.5, 1e-12);
        assert_eq!(spearman(&[(1.0, 1.0), (1.0, 2.0)]), None);
        assert_eq!(spearman(&[(1.0, f64::NAN), (2.0, 2.0)]), None);
    }
}
