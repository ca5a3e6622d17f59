//! Backward = central differences of the forward, for every operation that has a backward.
//!
//! The forward runs in f32; a random linear functional Σ c·y of its outputs is taken in f64. Outputs that an op overwrites
//! hold NaN before, outputs that it adds to hold noise, which must still be there.

mod attention;
mod block;
#[path = "../common/mod.rs"]
mod common;
mod extremes;
mod heads;
mod layer_norm;
mod linear;
mod optimiser;
mod transformer;

use ares::backend::Cpu;
use ares::ops::{Norm, NormSpec};
use common::*;

/// Large enough that f32's rounding does not show, small enough for the error of the fourth order.
const STEP: f32 = 2e-2;

/// Of the gradient's root mean square.
const LIMIT: f64 = 1e-3;

/// Σ c·y
fn functional(c: &[f32], y: &[f32]) -> f64 {
    assert_eq!(c.len(), y.len());
    c.iter().zip(y).map(|(c, y)| f64::from(*c) * f64::from(*y)).sum()
}

/// Central differences of `f` at `x` along every coordinate, extrapolated from two steps (Richardson).
fn differences(x: &[f32], mut f: impl FnMut(&[f32]) -> f64) -> Vec<f64> {
    let (count, mut x) = (x.len(), x.to_vec());
    let mut slope = |i: usize, step: f32| {
        let old = x[i];
        let (above, below) = (old + step, old - step);
        x[i] = above;
        let high = f(&x);
        x[i] = below;
        let low = f(&x);
        x[i] = old;
        (high - low) / (f64::from(above) - f64::from(below))
    };
    (0..count).map(|i| (4.0 * slope(i, STEP / 2.0) - slope(i, STEP)) / 3.0).collect()
}

/// Fails unless `found` is the gradient of `f` at `x`.
fn assert_gradient(what: &str, found: &[f32], x: &[f32], f: impl FnMut(&[f32]) -> f64) {
    let expected = differences(x, f);
    let scale = (expected.iter().map(|d| d * d).sum::<f64>() / expected.len() as f64).sqrt();
    assert!(scale > 1e-3, "{what}: the functional does not depend on it (root mean square {scale:e})");
    assert_close(what, found, &expected, LIMIT * scale);
}

/// What was added to an output that held `noise(seed, …)`.
fn added(found: &[f32], seed: u64) -> Vec<f32> {
    found.iter().zip(noise(seed, found.len())).map(|(found, before)| found - before).collect()
}

#[test]
fn norm() {
    let (rows, cols) = (7, 37);
    let (x, w, c) = (noise(1, rows * cols), noise(2, cols), noise(3, rows * cols));
    for unit_offset in [false, true] {
        let (cpu, spec) = (Cpu::new(), NormSpec { eps: 1e-2, unit_offset });
        let w = tensor(cols, &w);
        let forward = |x: &[f32]| {
            let (mut y, mut rstd) = (nans(rows, cols), nans(rows, 1));
            cpu.norm_forward(&mut y, &mut rstd, &tensor(cols, x), &w, spec).unwrap();
            (values(&y), rstd)
        };
        let (_, rstd) = forward(&x);
        let mut dx = tensor(cols, &noise(4, rows * cols));
        cpu.norm_backward(&mut dx, &tensor(cols, &c), &tensor(cols, &x), &rstd, &w, spec).unwrap();
        assert_gradient("norm dx", &added(&values(&dx), 4), &x, |x| functional(&c, &forward(x).0));
    }
}
