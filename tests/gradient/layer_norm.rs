//! LayerNorm: its definition in f64, also where a row lies far from zero, and its gradient.

use ares::backend::{Cpu, Tensor};
use ares::ops::LayerNorm;

use super::common::*;
use super::{added, assert_gradient, functional};

const COLS: usize = 37;
const EPS: f32 = 1e-2;

/// y, mean and rstd.
fn forward(x: &[f32], w: &Tensor<Cpu>, bias: Option<&Tensor<Cpu>>) -> [Tensor<Cpu>; 3] {
    let rows = x.len() / COLS;
    let (mut y, mut mean, mut rstd) = (nans(rows, COLS), nans(rows, 1), nans(rows, 1));
    Cpu::new().layer_norm_forward(&mut y, &mut mean, &mut rstd, &tensor(COLS, x), w, bias, EPS).unwrap();
    [y, mean, rstd]
}

/// y of one row, in f64.
fn definition(x: &[f32], w: &[f32], bias: &[f32]) -> Vec<f64> {
    let cols = x.len() as f64;
    let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / cols;
    let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / cols;
    let rstd = (variance + f64::from(EPS)).sqrt().recip();
    let terms = x.iter().zip(w).zip(bias);
    terms.map(|((x, w), bias)| (f64::from(*x) - mean) * rstd * f64::from(*w) + f64::from(*bias)).collect()
}

#[test]
fn forward_is_the_definition() {
    let (w, bias, zeros) = (noise(2, COLS), noise(3, COLS), [0.0; COLS]);
    // (distance of the row from zero, limit: of f32's own steps there, of which the deviation is about a half)
    for (distance, limit) in [(0.0, 1e-6), (-3.0, 2e-6), (1e4, 4e-3)] {
        let x: Vec<f32> = noise(1, 7 * COLS).iter().map(|x| x + distance).collect();
        for (b, with_bias) in [(&zeros[..], false), (&bias[..], true)] {
            let bias = with_bias.then(|| tensor(COLS, b));
            let [y, ..] = forward(&x, &tensor(COLS, &w), bias.as_ref());
            let expected: Vec<f64> = x.chunks(COLS).flat_map(|x| definition(x, &w, b)).collect();
            assert_close(&format!("y at {distance}"), &values(&y), &expected, limit);
        }
    }
}

#[test]
fn backward_is_the_gradient() {
    let (x, c) = (noise(1, 7 * COLS), noise(3, 7 * COLS));
    let (w, bias) = (tensor(COLS, &noise(2, COLS)), tensor(COLS, &noise(5, COLS)));
    let [_, mean, rstd] = forward(&x, &w, Some(&bias));
    let mut dx = tensor(COLS, &noise(4, x.len()));
    Cpu::new().layer_norm_backward(&mut dx, &tensor(COLS, &c), &tensor(COLS, &x), &mean, &rstd, &w).unwrap();
    let f = |x: &[f32]| functional(&c, &values(&forward(x, &w, Some(&bias))[0]));
    assert_gradient("layer_norm dx", &added(&values(&dx), 4), &x, f);
}
