//! Draws from a Beta distribution, for Thompson sampling.

use rand::Rng;

/// Beta(a, b) for a, b ≥ 1.
pub(crate) fn beta(a: f64, b: f64, rng: &mut impl Rng) -> f64 {
    let (x, y) = (gamma(a, rng), gamma(b, rng));
    x / (x + y)
}

/// Gamma(shape, 1) for shape ≥ 1: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000).
fn gamma(shape: f64, rng: &mut impl Rng) -> f64 {
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        let u: f64 = 1.0 - rng.random::<f64>(); // never 0
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

/// Standard normal by Box and Muller.
fn normal(rng: &mut impl Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn moments_are_those_of_beta() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (a, b) in [(1.0, 1.0), (1.0, 9.0), (30.5, 12.0)] {
            let n = 40_000;
            let draws: Vec<f64> = (0..n).map(|_| beta(a, b, &mut rng)).collect();
            let mean = draws.iter().sum::<f64>() / n as f64;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
            let (m, v) = (a / (a + b), a * b / ((a + b) * (a + b) * (a + b + 1.0)));
            assert!((mean - m).abs() <= 5.0 * (v / n as f64).sqrt(), "Beta({a}, {b}): mean {mean}, expected {m}");
            assert!((variance / v - 1.0).abs() <= 0.05, "Beta({a}, {b}): variance {variance}, expected {v}");
        }
    }
}
