//! LayerNorm, as encoders have it: `y[t,c] = (x[t,c] − mean[t])·rstd[t]·w[c] + bias[c]`, rstd = (mean_c (x − mean)² + eps)^-½.
//! (arXiv:1607.06450)
//!
//! Backward, x̂ being (x − mean)·rstd: `dx[t,c] += rstd·(w·dy − mean_c(w·dy) − x̂·mean_c(w·dy·x̂))`.
//!
//! The variance is the mean square of what is left after the mean is taken off. mean x² − mean² is the same number only on
//! paper: where |mean| is far above the deviation it is what rounding leaves of two large numbers.

mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

pub struct LayerNormForward<'a, B: Backend> {
    pub y: &'a mut Tensor<B>,         // (T, C) overwritten
    pub mean: &'a mut Tensor<B, f32>, // (T, 1) overwritten
    pub rstd: &'a mut Tensor<B, f32>, // (T, 1) overwritten
    pub x: &'a Tensor<B>,             // (T, C)
    pub w: &'a Tensor<B>,             // (1, C)
    pub bias: Option<&'a Tensor<B>>,  // (1, C)
    pub eps: f32,
}

pub struct LayerNormBackward<'a, B: Backend> {
    pub dx: &'a mut Tensor<B>,    // (T, C) added to
    pub dy: &'a Tensor<B>,        // (T, C)
    pub x: &'a Tensor<B>,         // (T, C)
    pub mean: &'a Tensor<B, f32>, // (T, 1)
    pub rstd: &'a Tensor<B, f32>, // (T, 1)
    pub w: &'a Tensor<B>,         // (1, C)
}

pub trait LayerNorm: Backend {
    /// The caller saves x, mean and rstd for backward.
    fn layer_norm_forward(&self, operands: LayerNormForward<Self>) -> Result<()>;

    /// `dx` is the residual stream's gradient: in a block that norms first, x also goes around the norm. Where it does
    /// not (a norm after the sum), the caller clears `dx` before. No dw and no dbias: the base is frozen.
    fn layer_norm_backward(&self, operands: LayerNormBackward<Self>) -> Result<()>;
}

/// Rows and columns of the activations; `gains` are w and, where there is one, the bias.
pub(crate) fn check<B: Backend>(
    x: &[&Tensor<B>],
    mean: &Tensor<B, f32>,
    rstd: &Tensor<B, f32>,
    gains: &[&Tensor<B>],
) -> Result<(usize, usize)> {
    let (rows, cols) = x[0].shape();
    for tensor in x {
        expect("layer_norm", "shape", tensor.shape(), (rows, cols))?;
    }
    expect("layer_norm", "mean", mean.shape(), (rows, 1))?;
    expect("layer_norm", "rstd", rstd.shape(), (rows, 1))?;
    for tensor in gains {
        expect("layer_norm", "weight and bias", tensor.shape(), (1, cols))?;
    }
    Ok((rows, cols))
}

/// Forward: x in, y, mean and rstd out, w and bias once. Backward: x, dy, mean and rstd in, dx in and out.
pub(crate) fn costs(rows: u64, cols: u64, act: u64) -> [Cost; 2] {
    [
        Cost { flops: 8 * rows * cols, bytes: act * (2 * rows * cols + 2 * cols) + 8 * rows },
        Cost { flops: 13 * rows * cols, bytes: act * (4 * rows * cols + cols) + 8 * rows },
    ]
}
