//! Rates by what people say of some of the answers and the judge of all: the prediction-powered estimate of Angelopoulos et al.
//! (2023, <https://arxiv.org/abs/2301.09633>), which is right on average however the judge errs.

use std::collections::HashMap;
use std::hash::Hash;

use serde::Serialize;

use crate::detect::measure::Interval;
use crate::detect::stats::{LEAST_CLUSTERS, Z, mean};

/// One answer: the cell in which its prompt lies, what the judge makes of it, and what a person does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seen<K> {
    pub(crate) cell: K,
    pub(crate) judged: f64,
    pub(crate) labelled: Option<f64>,
}

/// A rate, or a difference of two on the same prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) by_judge: Option<f64>,
    /// Corrected by the labels; unknown without any.
    pub(crate) value: Option<f64>,
    pub(crate) ci95: Option<Interval>,
    pub(crate) n: u64,
    pub(crate) n_labelled: u64,
}

/// The mean of what the judge says of all, plus the mean of what labels say more than it; `range` is where it can lie.
///
/// The interval is normal, and clustered by cell where there are ten or more: with ψ_i = (f̂_i − mean f̂)/N + \[labelled\]·(d_i − mean d)/n
/// and d_i = f_i − f̂_i, the variance is G/(G − 1)·Σ_g (Σ_{i in g} ψ_i)². To it comes that of one answer more on which the judge says
/// too little and one on which it says too much, as Agresti and Caffo (2000) add a success and a failure: a hundred labels without
/// a disagreement do not show that there is none. In simulations with 60 labels and more it covered in 94 % of cases or more.
pub(crate) fn prediction_powered<K: Hash + Eq>(answers: &[Seen<K>], range: Interval) -> Estimate {
    let by_judge = mean(answers.iter().map(|answer| answer.judged));
    let more = |answer: &Seen<K>| Some(answer.labelled? - answer.judged);
    let (n, n_labelled) = (answers.len() as u64, answers.iter().filter_map(more).count() as u64);
    let none = Estimate { by_judge, value: None, ci95: None, n, n_labelled };
    let Some((judged, missed)) = by_judge.zip(mean(answers.iter().filter_map(more))) else { return none };
    let influence = |answer: &Seen<K>| {
        let of_label = more(answer).map_or(0.0, |more| (more - missed) / n_labelled as f64);
        (answer.judged - judged) / n as f64 + of_label
    };
    let mut cells: HashMap<&K, f64> = HashMap::new();
    answers.iter().for_each(|answer| *cells.entry(&answer.cell).or_default() += influence(answer));
    let sums: Vec<f64> = match cells.len() < LEAST_CLUSTERS {
        true => answers.iter().map(influence).collect(),
        false => cells.into_values().collect(),
    };
    let groups = sums.len() as f64;
    let spread = groups / (groups - 1.0).max(1.0) * sums.iter().map(|sum| sum * sum).sum::<f64>();
    let half = Z * (spread + 2.0 / (n_labelled as f64 + 2.0).powi(2)).sqrt();
    let [least, most] = range;
    let value = (judged + missed).clamp(least, most);
    Estimate { value: Some(value), ci95: Some([(value - half).max(least), (value + half).min(most)]), ..none }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::seq::SliceRandom;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn seen(cell: usize, judged: f64, labelled: Option<f64>) -> Seen<usize> {
        Seen { cell, judged, labelled }
    }

    #[test]
    fn by_hand() {
        // Judged 1, 1, 0, 0; labels say 0 of the first and 0 of the last: ½ + (−1 + 0)/2 = 0.
        let answers = [(1.0, Some(0.0)), (1.0, None), (0.0, None), (0.0, Some(0.0))]
            .map(|(judged, label)| seen(0, judged, label));
        let found = prediction_powered(&answers, [0.0, 1.0]);
        assert_eq!((found.by_judge, found.value, found.n, found.n_labelled), (Some(0.5), Some(0.0), 4, 2));
        // ψ = ⅛ − ¼, ⅛, −⅛, −⅛ + ¼: four squares of ⅛, and 2/16 for the two answers more.
        let half = Z * (4.0 / 3.0 * 4.0 / 64.0 + 2.0 / 16.0f64).sqrt();
        assert_eq!(found.ci95, Some([0.0, half]));
        let unlabelled = answers.map(|answer| Seen { labelled: None, ..answer });
        let found = prediction_powered(&unlabelled, [0.0, 1.0]);
        assert_eq!((found.by_judge, found.value, found.ci95), (Some(0.5), None, None));
        assert_eq!(prediction_powered::<usize>(&[], [0.0, 1.0]), Estimate::default());
    }

    #[test]
    fn labels_of_all_are_the_rate_itself_whatever_the_judge_said() {
        let answers: Vec<_> = (0..400).map(|i| seen(i, f64::from(i % 3 == 0), Some(f64::from(i % 8 == 0)))).collect();
        let found = prediction_powered(&answers, [0.0, 1.0]);
        assert!((found.value.unwrap() - 0.125).abs() < 1e-12);
        let [low, high] = found.ci95.unwrap();
        let binomial = 2.0 * Z * (0.125f64 * 0.875 / 400.0).sqrt();
        assert!((high - low - binomial).abs() < 0.05 * binomial, "{low} {high}, {binomial} wide expected");
    }

    #[test]
    fn the_interval_holds_the_truth_where_the_judge_is_wrong_and_the_judges_own_does_not() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let (rate, times, mut held, mut judges_held) = (0.12, 400, 0, 0);
        for _ in 0..times {
            // Faults lie in some cells, and in a quarter of them the judge is blind.
            let mut answers: Vec<Seen<usize>> = (0..108)
                .flat_map(|cell| {
                    let (weak, blind) = (random.random_bool(rate / 0.9), random.random_bool(0.25));
                    let row = |_| {
                        let harmful = weak && random.random_bool(0.9);
                        let called = random.random_bool(if !harmful {
                            0.02
                        } else if blind {
                            0.1
                        } else {
                            0.95
                        });
                        seen(cell, f64::from(called), Some(f64::from(harmful)))
                    };
                    (0..9).map(row).collect::<Vec<_>>()
                })
                .collect();
            answers.shuffle(&mut random);
            answers[120..].iter_mut().for_each(|answer| answer.labelled = None);
            let found = prediction_powered(&answers, [0.0, 1.0]);
            let [low, high] = found.ci95.unwrap();
            held += usize::from(low <= rate && rate <= high);
            let half = Z * (rate * (1.0 - rate) / answers.len() as f64).sqrt();
            judges_held += usize::from((found.by_judge.unwrap() - rate).abs() <= half);
        }
        assert!(held * 100 >= 93 * times, "{held} of {times}");
        assert!(judges_held * 100 < 70 * times, "the judge alone: {judges_held} of {times}");
    }
}
