//! Differences between methods, on the same prompts.

use crate::detect::evaluate::Evaluation;
use crate::detect::measure::{Difference, MethodResult};
use crate::detect::outcome::Outcome;
use crate::detect::rows::Kind;
use crate::detect::stats::{Cluster, cluster_bootstrap, clusters};
use crate::judge::{Sense, Verdict};
use crate::repair::Method;

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

/// Fills in what relates the methods of one seed to the originals and to `policy`, which may have been run after others: the
/// interval of the difference to it have only those after it.
pub(crate) fn relate(
    methods: Vec<(MethodResult, Evaluation)>,
    before: &Evaluation,
    sense: Sense,
    seed: u64,
) -> Vec<MethodResult> {
    let reduction = |own: &Evaluation, base: &Evaluation| {
        let (own, base) = own.measure.cfr_in(sense).zip(base.measure.cfr_in(sense))?;
        (base > 0.0).then(|| 1.0 - own / base)
    };
    let (mut results, measured): (Vec<_>, Vec<_>) = methods.into_iter().unzip();
    let policy = results.iter().position(|result: &MethodResult| result.name == Method::Policy.name());
    for (i, (result, own)) in results.iter_mut().zip(&measured).enumerate() {
        result.reduction_vs_before = reduction(own, before);
        if let Some(at) = policy {
            result.reduction_vs_policy = reduction(own, &measured[at]);
            if at <= i {
                let difference = cfr_difference(&own.outcomes, &measured[at].outcomes, sense, seed);
                result.cfr_diff_vs_policy = difference.0;
            }
        }
    }
    results
}
