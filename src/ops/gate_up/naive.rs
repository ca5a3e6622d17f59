//! The feed-forward's first half in plain loops.

use std::f64::consts::PI;

use super::{Activation, GateUpSpec};
use crate::ops::lora::naive::{self as linear, Weights};

/// Overwrites `act` (T, F), `gate_up` (T, N) and `xa` (T, P·r).
pub fn forward(act: &mut [f32], gate_up: &mut [f32], xa: &mut [f32], x: &[f32], weights: Weights, spec: GateUpSpec) {
    linear::forward(gate_up, xa, x, weights, None);
    activate(act, gate_up, spec, x.len() / weights.k);
}

/// Overwrites `act` (T, F): f(gate)·up, or f(gate).
fn activate(act: &mut [f32], gate_up: &[f32], spec: GateUpSpec, rows: usize) {
    let features = act.len() / rows;
    for t in 0..rows {
        let row = &gate_up[t * spec.width(features)..];
        for i in 0..features {
            let up = if spec.gated { row[features + i] } else { 1.0 };
            act[t * features + i] = curve(row[i], spec.activation).0 * up;
        }
    }
}

/// Turns `gate_up` into its own gradient, act's gradient `act` (T, F) into act; overwrites `dx` (T, K) and `dxa` (T, P·r); adds to `da`
/// and `db`.
pub fn backward(
    dx: &mut [f32],
    (da, db): (&mut [f32], &mut [f32]),
    gate_up: &mut [f32],
    dxa: &mut [f32],
    act: &mut [f32],
    x: &[f32],
    xa: &[f32],
    weights: Weights,
    spec: GateUpSpec,
) {
    let rows = x.len() / weights.k;
    let features = act.len() / rows;
    for t in 0..rows {
        let row = &mut gate_up[t * spec.width(features)..];
        for i in 0..features {
            let (act, (value, slope)) = (&mut act[t * features + i], curve(row[i], spec.activation));
            let up = if spec.gated { row[features + i] } else { 1.0 };
            row[i] = *act * up * slope;
            if spec.gated {
                row[features + i] = *act * value;
            }
            *act = value * up;
        }
    }
    linear::backward(dx, (da, db), dxa, gate_up, x, xa, weights);
}

/// f(g) and f′(g), in f64.
pub fn curve(g: f32, activation: Activation) -> (f32, f32) {
    let g = f64::from(g);
    let (value, slope) = match activation {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-g).exp());
            (g * s, s + g * s * (1.0 - s))
        }
        Activation::Gelu => (g * normal(g), normal(g) + g * (-0.5 * g * g).exp() / (2.0 * PI).sqrt()),
        Activation::GeluTanh => {
            let root = (2.0 / PI).sqrt();
            let tanh = (root * (g + 0.044715 * g.powi(3))).tanh();
            let dtanh = (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * g * g);
            (g / 2.0 * (1.0 + tanh), (1.0 + tanh + g * dtanh) / 2.0)
        }
    };
    (value as f32, slope as f32)
}

/// Φ(g) = ½ + φ(g)·Σ g^(2n+1)/(1·3·…·(2n+1)).
fn normal(g: f64) -> f64 {
    let (mut term, mut sum, mut odd) = (g, 0.0f64, 1.0);
    while term.abs() > 1e-20 * sum.abs() {
        sum += term;
        odd += 2.0;
        term *= g * g / odd;
    }
    0.5 + (-0.5 * g * g).exp() / (2.0 * PI).sqrt() * sum
}
