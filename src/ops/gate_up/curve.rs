//! The activations and their derivatives, in arithmetic that the compiler turns into whole vectors.

use crate::ops::product::exp;

/// An activation function.
pub(super) trait Curve {
    /// f(g) and f′(g).
    fn at(g: f32) -> (f32, f32);
}

pub(super) struct Silu;
pub(super) struct Gelu;
pub(super) struct GeluTanh;

impl Curve for Silu {
    #[inline(always)]
    fn at(g: f32) -> (f32, f32) {
        under_sigmoid(g, g, 1.0)
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn at(g: f32) -> (f32, f32) {
        let (below, density) = normal(g);
        (g * below, below + g * density)
    }
}

impl Curve for GeluTanh {
    /// (1 + tanh(v/2))/2 = σ(v).
    #[inline(always)]
    fn at(g: f32) -> (f32, f32) {
        const LINEAR: f32 = 1.595_769; // 2·√(2/π)
        const CUBIC: f32 = LINEAR * 0.044_715;
        under_sigmoid(g, g * (LINEAR + CUBIC * g * g), LINEAR + 3.0 * CUBIC * g * g)
    }
}

/// g·σ(v) and its derivative, dv that of v.
#[inline(always)]
fn under_sigmoid(g: f32, v: f32, dv: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-v));
    let value = g * s;
    (value, s + value * (1.0 - s) * dv)
}

/// Of the standard normal distribution: Φ(g), the share below g, and the density φ(g).
///
/// Φ(−|g|) = φ(g)·t·P(t), t = 1/(1 + 0.2316419·|g|), as in Abramowitz and Stegun 26.2.17 with eight coefficients instead of
/// five, fitted to the relative error (6·10⁻⁸ of the formula, 2·10⁻⁶ in f32): the far tail is as right as the middle.
#[inline(always)]
fn normal(g: f32) -> (f32, f32) {
    let bell = exp(-0.5 * g * g);
    let t = 1.0 / (1.0 + 0.231_641_9 * g.abs());
    let p = -0.072_225_064;
    let p = p * t + 0.255_447_03;
    let p = p * t - 0.215_599_09;
    let p = p * t + 0.238_753_6;
    let p = p * t + 5.951_844e-3;
    let p = p * t + 0.105_132_72;
    let p = p * t + 0.089_985_18;
    let p = p * t + 0.092_553_75;
    let tail = bell * t * p;
    (if g < 0.0 { tail } else { 1.0 - tail }, bell * 0.398_942_3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Φ(−g) for g ≥ 0 in f64: ½ − φ(g)·Σ g^(2n+1)/(1·3·…·(2n+1)), whose terms have one sign.
    fn tail(g: f64) -> f64 {
        let (mut term, mut sum) = (g, 0.0);
        for n in 1..400 {
            sum += term;
            term *= g * g / f64::from(2 * n + 1);
        }
        0.5 - (-0.5 * g * g).exp() / std::f64::consts::TAU.sqrt() * sum
    }

    #[test]
    fn the_normal_distribution_is_right_to_the_tail() {
        for i in 0..5500 {
            let g = i as f32 * 1e-3;
            let (exact, (above, _), (below, density)) = (tail(f64::from(g)), normal(g), normal(-g));
            assert!((f64::from(below) / exact - 1.0).abs() <= 3e-6, "Φ(-{g}): found {below}, expected {exact}");
            assert!((f64::from(above) + exact - 1.0).abs() <= 4e-7, "Φ({g}): found {above}, expected 1 - {exact}");
            let exact = (-0.5 * f64::from(g).powi(2)).exp() / std::f64::consts::TAU.sqrt();
            assert!((f64::from(density) / exact - 1.0).abs() <= 3e-6, "φ({g}): found {density}, expected {exact}");
        }
        assert_eq!(normal(-40.0), (0.0, 0.0));
        assert_eq!(normal(40.0), (1.0, 0.0));
        assert!(normal(f32::NAN).0.is_nan());
    }

    #[test]
    fn curves_are_their_formulas() {
        let two_over_pi = std::f64::consts::FRAC_2_PI;
        for i in -5500..5500 {
            let g = i as f32 * 1e-3;
            let x = f64::from(g);
            let below = if x < 0.0 { tail(-x) } else { 1.0 - tail(x) };
            let tanh = (two_over_pi.sqrt() * (x + 0.044715 * x.powi(3))).tanh();
            let expected = [x / (1.0 + (-x).exp()), x * below, x / 2.0 * (1.0 + tanh)];
            for (found, expected) in [Silu::at(g).0, Gelu::at(g).0, GeluTanh::at(g).0].into_iter().zip(expected) {
                let limit = 4e-6 * expected.abs() + 1e-12;
                assert!((f64::from(found) - expected).abs() <= limit, "at {g}: found {found}, expected {expected}");
            }
        }
    }

    /// Where the exponentials over- and underflow.
    #[test]
    fn curves_are_straight_far_out() {
        for at in [Silu::at, Gelu::at, GeluTanh::at] {
            for g in [100.0, 1e4, 1e12] {
                assert_eq!(at(g), (g, 1.0));
                assert_eq!(at(-g), (0.0, 0.0));
            }
        }
    }
}
