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
    use crate::ops::gate_up::{Activation, naive};

    /// To the far tail, where Φ is 2·10⁻⁸.
    #[test]
    fn curves_are_the_plain_ones() {
        for g in (-5500..5500).map(|i| i as f32 * 1e-3) {
            let silu = (Silu::at(g), naive::curve(g, Activation::Silu));
            let gelu = (Gelu::at(g), naive::curve(g, Activation::Gelu));
            let gelu_tanh = (GeluTanh::at(g), naive::curve(g, Activation::GeluTanh));
            for ((value, slope), (plain_value, plain_slope)) in [silu, gelu, gelu_tanh] {
                let limit = 4e-6 * plain_value.abs() + 1e-12;
                assert!((value - plain_value).abs() <= limit, "at {g}: found {value}, expected {plain_value}");
                assert!((slope - plain_slope).abs() <= 4e-6, "slope at {g}: found {slope}, expected {plain_slope}");
            }
        }
        assert!(Gelu::at(f32::NAN).0.is_nan());
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
