//! Differences between methods, on the same prompts.

use crate::detect::evaluate::Evaluation;
use crate::detect::measure::{Difference, MethodResult};
use crate::detect::outcome::Outcome;
use crate::detect::rows::Kind;
use crate::detect::stats::{Cluster, cluster_bootstrap, clusters};
use crate::judge::{Sense, Verdict};

/// Mean of `value(after) − value(before)` over the harmful prompts for which both are known, with its paired clustered bootstrap
/// interval, and the number of those prompts. The two lists hold the same prompts in the same order.
pub(crate) fn paired_difference(
    after: &[Outcome],
    before: &[Outcome],
    seed: u64,
    value: impl Fn(&Outcome) -> Option<f64>,
) -> (Difference, u64) {
    let pairs = after.iter().zip(before).filter(|(new, _)| new.kind == Kind::Harmful);
    let clusters = clusters(pairs.filter_map(|(new, old)| Some((new.cell(), value(new)? - value(old)?))));
    let total = clusters.iter().fold(Cluster::default(), |a, b| Cluster { sum: a.sum + b.sum, n: a.n + b.n });
    let value = (total.n > 0.0).then(|| total.sum / total.n);
    (Difference { value, ci95: cluster_bootstrap(&clusters, seed) }, total.n as u64)
}

/// CFR(after) − CFR(before).
pub(crate) fn cfr_difference(after: &[Outcome], before: &[Outcome], sense: Sense, seed: u64) -> (Difference, u64) {
    let coupled = |row: &Outcome| row.verdict(sense).map(|verdict| f64::from(u8::from(verdict == Verdict::Coupled)));
    paired_difference(after, before, seed, coupled)
}

/// Fills in what relates a method to the originals and to `policy` with the same seed.
pub(crate) fn relate(
    result: &mut MethodResult,
    own: &Evaluation,
    before: &Evaluation,
    policy: Option<&Evaluation>,
    sense: Sense,
    seed: u64,
) {
    let reduction = |base: Option<f64>| {
        let (own, base) = own.measure.cfr_in(sense).zip(base)?;
        (base > 0.0).then(|| 1.0 - own / base)
    };
    result.reduction_vs_before = reduction(before.measure.cfr_in(sense));
    result.reduction_vs_policy = reduction(policy.and_then(|policy| policy.measure.cfr_in(sense)));
    if let Some(policy) = policy {
        result.cfr_diff_vs_policy = cfr_difference(&own.outcomes, &policy.outcomes, sense, seed).0;
    }
}
