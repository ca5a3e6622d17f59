//! RMSNorm: `y[t,c] = g[c]·x[t,c]·rstd[t] (+ r[t,c])`, rstd = (mean_c x² + eps)^-½, g = w or 1 + w. (arXiv:1910.07467)
//!
//! Backward: `dx[t,c] += rstd·(g·dy − x·rstd²·mean_c(g·dy·x))`; dr is dy.

mod cpu;
pub(super) mod cuda;
pub mod naive;

pub(crate) use cpu::{rms_backward_row, rms_row, rstd};

use super::{Cost, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    pub eps: f32,
    /// Gain is 1 + w instead of w.
    pub unit_offset: bool,
}

pub struct NormForward<'a, B: Backend> {
    pub y: &'a mut Tensor<B>,            // (T, C) overwritten
    pub rstd: &'a mut Tensor<B, f32>,    // (T, 1) overwritten
    pub x: &'a Tensor<B>,                // (T, C)
    pub w: &'a Tensor<B>,                // (1, C)
    pub residual: Option<&'a Tensor<B>>, // r (T, C)
    pub spec: NormSpec,
}

pub struct NormBackward<'a, B: Backend> {
    pub dx: &'a mut Tensor<B>,    // (T, C) added to: the residual stream's gradient
    pub dy: &'a Tensor<B>,        // (T, C)
    pub x: &'a Tensor<B>,         // (T, C)
    pub rstd: &'a Tensor<B, f32>, // (T, 1)
    pub w: &'a Tensor<B>,         // (1, C)
    pub spec: NormSpec,
}

pub trait Norm: Backend {
    /// The caller saves x and rstd for backward.
    fn norm_forward(&self, operands: NormForward<Self>) -> Result<()>;

    fn norm_backward(&self, operands: NormBackward<Self>) -> Result<()>;
}

pub(crate) fn check<B: Backend>(x: &[&Tensor<B>], rstd: &Tensor<B, f32>, w: &Tensor<B>) -> Result<(usize, usize)> {
    let (rows, cols) = x[0].shape();
    for tensor in x {
        expect("norm", "shape", tensor.shape(), (rows, cols))?;
    }
    expect("norm", "rstd", rstd.shape(), (rows, 1))?;
    expect("norm", "weight", w.shape(), (1, cols))?;
    Ok((rows, cols))
}

/// Forward: x in, y and rstd out, w once. Backward: x, dy and rstd in, dx in and out.
pub(crate) fn costs(rows: u64, cols: u64, act: u64) -> [Cost; 2] {
    [
        Cost { flops: 4 * rows * cols, bytes: act * (2 * rows * cols + cols) + 4 * rows },
        Cost { flops: 8 * rows * cols, bytes: act * (4 * rows * cols + cols) + 4 * rows },
    ]
}
