use rayon::prelude::*;

use super::{LayerNorm, LayerNormBackward, LayerNormForward, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::product::{dot, simd, total};

/// Rows per task: enough work to pay for handing it to another thread.
const ROWS: usize = 64;

impl LayerNorm for Cpu {
    fn layer_norm_forward(&self, operands: LayerNormForward<Self>) -> Result<()> {
        let LayerNormForward { y, mean, rstd, x, w, bias, eps } = operands;
        let gains: Vec<&Tensor<Self>> = bias.into_iter().chain([w]).collect();
        let (rows, cols) = check(&[x, y], mean, rstd, &gains)?;
        let (w, bias) = (&w.buffer[..cols], bias.map_or(&[][..], |bias| &bias.buffer[..cols]));
        let outputs = y.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        let statistics = mean.buffer[..rows].par_chunks_mut(ROWS).zip(rstd.buffer[..rows].par_chunks_mut(ROWS));
        let tasks = outputs.zip(statistics).zip(x.buffer[..rows * cols].par_chunks(ROWS * cols));
        tasks.for_each(|((y, (mean, rstd)), x)| {
            forward(y, mean, rstd, x, w, bias, eps);
            self.store(y);
        });
        Ok(())
    }

    fn layer_norm_backward(&self, operands: LayerNormBackward<Self>) -> Result<()> {
        let LayerNormBackward { dx, dy, x, mean, rstd, w } = operands;
        let (rows, cols) = check(&[x, dx, dy], mean, rstd, &[w])?;
        let w = &w.buffer[..cols];
        let gradients =
            dx.buffer[..rows * cols].par_chunks_mut(ROWS * cols).zip(dy.buffer[..rows * cols].par_chunks(ROWS * cols));
        let statistics = mean.buffer[..rows].par_chunks(ROWS).zip(rstd.buffer[..rows].par_chunks(ROWS));
        let saved = x.buffer[..rows * cols].par_chunks(ROWS * cols).zip(statistics);
        gradients.zip(saved).for_each(|((dx, dy), (x, (mean, rstd)))| {
            backward(dx, dy, x, mean, rstd, w);
            self.store(dx);
        });
        Ok(())
    }
}

simd! {
    /// Without a bias `bias` is empty.
    fn forward<'a>(y: &'a mut [f32], mean: &'a mut [f32], rstd: &'a mut [f32], x: &'a [f32], w: &'a [f32], bias: &'a [f32], eps: f32) {
        let cols = w.len();
        let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).zip(mean.iter_mut().zip(rstd));
        for ((y, x), (mean, rstd)) in rows {
            *mean = total(x) / cols as f32;
            for (y, x) in y.iter_mut().zip(x) {
                *y = x - *mean;
            }
            *rstd = crate::ops::norm::rstd(dot(y, y) / cols as f32 + eps);
            for (y, w) in y.iter_mut().zip(w) {
                *y *= *rstd * w;
            }
            for (y, bias) in y.iter_mut().zip(bias) {
                *y += bias;
            }
        }
    }
}

simd! {
    fn backward<'a>(dx: &'a mut [f32], dy: &'a [f32], x: &'a [f32], mean: &'a [f32], rstd: &'a [f32], w: &'a [f32]) {
        let cols = w.len();
        let gradients = dx.chunks_exact_mut(cols).zip(dy.chunks_exact(cols));
        let saved = x.chunks_exact(cols).zip(mean.iter().zip(rstd));
        for ((dx, dy), (x, (mean, rstd))) in gradients.zip(saved) {
            let (plain, along) = gained_sums(dy, x, *mean, w);
            let (mean_dy, mean_dyx) = (plain / cols as f32, rstd * rstd * along / cols as f32);
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                *dx += rstd * (w * dy - mean_dy - (x - mean) * mean_dyx);
            }
        }
    }
}

/// Σ w·dy and Σ w·dy·(x − mean), each in sixteen running sums, as `dot` has them.
#[inline(always)]
fn gained_sums(dy: &[f32], x: &[f32], mean: f32, w: &[f32]) -> (f32, f32) {
    let (mut plain, mut along) = ([0.0f32; 16], [0.0f32; 16]);
    let whole = x.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        let (dy, x, w) = (&dy[at..][..16], &x[at..][..16], &w[at..][..16]);
        for i in 0..16 {
            let g = w[i] * dy[i];
            plain[i] += g;
            along[i] += g * (x[i] - mean);
        }
    }
    for i in whole..x.len() {
        let g = w[i] * dy[i];
        plain[i - whole] += g;
        along[i - whole] += g * (x[i] - mean);
    }
    (plain.iter().sum(), along.iter().sum())
}
