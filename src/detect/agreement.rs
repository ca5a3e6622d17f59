//! How far a judge agrees with what is known of answers, by labels or by construction.

use serde::Serialize;

use crate::detect::measure::{Interval, JudgeQuality, Rate, ratio};
use crate::detect::stats::Z;

/// Counts of answers: by what is known (rows: safe, harmful) and by what the judge says (columns).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Agreement([[u64; 2]; 2]);

/// What [`Agreement`] comes to, each rate with its Wilson interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Calibration {
    pub(crate) n: u64,
    pub(crate) harmful: u64,
    pub(crate) agreement: Rate,
    /// Of what the judge calls harmful, the share that is.
    pub(crate) precision: Rate,
    /// Of what is harmful, the share that the judge calls so.
    pub(crate) sensitivity: Rate,
    /// Of what is safe, the share that the judge calls so.
    pub(crate) specificity: Rate,
    /// Cohen's: agreement beyond chance; unknown where both only ever say one thing.
    pub(crate) kappa: Option<f64>,
    /// 95 %, by the large-sample error of Fleiss, Cohen and Everitt (1969).
    pub(crate) kappa_ci95: Option<Interval>,
}

impl Agreement {
    /// Counts one answer.
    pub(crate) fn add(&mut self, known_harmful: bool, called_harmful: bool) {
        self.0[usize::from(known_harmful)][usize::from(called_harmful)] += 1;
    }

    fn n(self) -> u64 {
        self.0.iter().flatten().sum()
    }

    pub(crate) fn quality(self) -> JudgeQuality {
        let Calibration { agreement, sensitivity, specificity, n, .. } = self.calibration();
        JudgeQuality { agreement: agreement.rate, sensitivity: sensitivity.rate, specificity: specificity.rate, n }
    }

    pub(crate) fn calibration(self) -> Calibration {
        let [[true_safe, false_alarm], [missed, found]] = self.0;
        let kappa = self.kappa();
        Calibration {
            n: self.n(),
            harmful: missed + found,
            agreement: Rate::of(true_safe + found, self.n()),
            precision: Rate::of(found, found + false_alarm),
            sensitivity: Rate::of(found, found + missed),
            specificity: Rate::of(true_safe, true_safe + false_alarm),
            kappa: kappa.map(|(kappa, _)| kappa),
            kappa_ci95: kappa.map(|(kappa, error)| [(kappa - Z * error).max(-1.0), (kappa + Z * error).min(1.0)]),
        }
    }

    /// κ and its standard error.
    fn kappa(self) -> Option<(f64, f64)> {
        let n = self.n() as f64;
        let p = self.0.map(|row| row.map(|count| count as f64 / n));
        let known = [0, 1].map(|i| p[i][0] + p[i][1]);
        let called = [0, 1].map(|j| p[0][j] + p[1][j]);
        let observed = ratio(self.0[0][0] + self.0[1][1], self.n())?;
        let chance = known[0] * called[0] + known[1] * called[1];
        if chance >= 1.0 {
            return None;
        }
        let kappa = (observed - chance) / (1.0 - chance);
        let mut variance = -(kappa - chance * (1.0 - kappa)).powi(2);
        for (i, row) in p.iter().enumerate() {
            for (j, share) in row.iter().enumerate() {
                let weight = match i == j {
                    true => 1.0 - (known[i] + called[i]) * (1.0 - kappa),
                    false => (called[i] + known[j]) * (1.0 - kappa),
                };
                variance += share * weight * weight;
            }
        }
        Some((kappa, (variance.max(0.0) / n).sqrt() / (1.0 - chance)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As statsmodels' `cohens_kappa` has them (0.14).
    #[test]
    fn kappa_and_its_interval() {
        for (counts, kappa, ci95) in [
            ([[15, 10], [5, 20]], 0.4, [0.151092290476661, 0.6489077095233389]),
            ([[90, 3], [2, 5]], 0.6397694524495672, [0.34779430370485354, 0.9317446011942808]),
            ([[40, 0], [1, 9]], 0.935064935064935, [0.8093395839181445, 1.0]), // there 1.06
        ] {
            let found = Agreement(counts).calibration();
            let [low, high] = found.kappa_ci95.unwrap();
            for (found, expected) in [(found.kappa.unwrap(), kappa), (low, ci95[0]), (high, ci95[1])] {
                assert!((found - expected).abs() <= 1e-9, "{counts:?}: expected {expected}, found {found}");
            }
        }
    }

    #[test]
    fn rates_by_hand_and_nothing_from_nothing() {
        let mut counts = Agreement::default();
        for (known, called, times) in [(true, true, 6), (true, false, 2), (false, true, 1), (false, false, 11)] {
            (0..times).for_each(|_| counts.add(known, called));
        }
        let found = counts.calibration();
        let rates =
            [found.agreement, found.precision, found.sensitivity, found.specificity].map(|rate| rate.rate.unwrap());
        assert_eq!(rates, [17.0 / 20.0, 6.0 / 7.0, 6.0 / 8.0, 11.0 / 12.0]);
        assert_eq!((found.n, found.harmful), (20, 8));
        assert_eq!(Agreement([[9, 0], [0, 0]]).calibration().kappa, None, "one word only");
        let none = Agreement::default().calibration();
        assert_eq!((none.agreement.rate, none.kappa, none.n), (None, None, 0));
    }
}
