use rayon::prelude::*;

use super::{Norm, NormBackward, NormForward, NormSpec, check};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::product::{dot, simd};

/// Rows per task: enough work to pay for handing it to another thread.
const ROWS: usize = 64;

impl Norm for Cpu {
    fn norm_forward(&self, operands: NormForward<Self>) -> Result<()> {
        let NormForward { y, rstd, x, w, residual, spec } = operands;
        let (rows, cols) = check(&[x, y, residual.unwrap_or(x)], rstd, w)?;
        let (y, x) = (&mut y.buffer[..rows * cols], &x.buffer[..rows * cols]);
        let tasks = y.par_chunks_mut(ROWS * cols).zip(rstd.buffer[..rows].par_chunks_mut(ROWS));
        tasks.zip(x.par_chunks(ROWS * cols)).enumerate().for_each(|(task, ((y, rstd), x))| {
            forward(y, rstd, x, &w.buffer[..cols], spec);
            if let Some(residual) = residual {
                y.iter_mut().zip(&residual.buffer[task * ROWS * cols..]).for_each(|(y, r)| *y += r);
            }
            self.store(y);
        });
        Ok(())
    }

    fn norm_backward(&self, operands: NormBackward<Self>) -> Result<()> {
        let NormBackward { dx, dy, x, rstd, w, spec } = operands;
        let (rows, cols) = check(&[x, dx, dy], rstd, w)?;
        let tasks =
            dx.buffer[..rows * cols].par_chunks_mut(ROWS * cols).zip(dy.buffer[..rows * cols].par_chunks(ROWS * cols));
        let saved = x.buffer[..rows * cols].par_chunks(ROWS * cols).zip(rstd.buffer[..rows].par_chunks(ROWS));
        tasks.zip(saved).for_each(|((dx, dy), (x, rstd))| {
            backward(dx, dy, x, rstd, &w.buffer[..cols], spec);
            self.store(dx);
        });
        Ok(())
    }
}

simd! {
    fn forward<'a>(y: &'a mut [f32], rstd: &'a mut [f32], x: &'a [f32], w: &'a [f32], spec: NormSpec) {
        let cols = w.len();
        for ((y, rstd), x) in y.chunks_exact_mut(cols).zip(rstd).zip(x.chunks_exact(cols)) {
            *rstd = rms_row(y, x, w, spec);
        }
    }
}

simd! {
    fn backward<'a>(dx: &'a mut [f32], dy: &'a [f32], x: &'a [f32], rstd: &'a [f32], w: &'a [f32], spec: NormSpec) {
        let cols = w.len();
        let rows = dy.chunks_exact(cols).zip(x.chunks_exact(cols)).zip(rstd);
        for (dx, ((dy, x), rstd)) in dx.chunks_exact_mut(cols).zip(rows) {
            rms_backward_row(dx, dy, x, *rstd, w, spec);
        }
    }
}

/// A mean square that overflows would give 0, and its row a plausible nothing: it gives NaN, which is seen.
#[inline(always)]
pub(crate) fn rstd(mean_square: f32) -> f32 {
    mean_square.sqrt().recip() + 0.0 * mean_square
}

/// One row forward; returns its rstd.
#[inline(always)]
pub(crate) fn rms_row(y: &mut [f32], x: &[f32], w: &[f32], spec: NormSpec) -> f32 {
    let rstd = rstd(dot(x, x) / x.len() as f32 + spec.eps);
    let offset = if spec.unit_offset { 1.0 } else { 0.0 };
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = (w + offset) * x * rstd;
    }
    rstd
}

/// One row backward.
#[inline(always)]
pub(crate) fn rms_backward_row(dx: &mut [f32], dy: &[f32], x: &[f32], rstd: f32, w: &[f32], spec: NormSpec) {
    let offset = if spec.unit_offset { 1.0 } else { 0.0 };
    let mean_dyx = rstd * rstd * gained_dot(dy, x, w, offset) / x.len() as f32;
    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
        *dx += rstd * ((w + offset) * dy - x * mean_dyx);
    }
}

/// Σ (w + offset)·dy·x in sixteen running sums, as `dot` has them.
#[inline(always)]
fn gained_dot(dy: &[f32], x: &[f32], w: &[f32], offset: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let whole = x.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        let (dy, x, w) = (&dy[at..][..16], &x[at..][..16], &w[at..][..16]);
        for i in 0..16 {
            sums[i] += (w[i] + offset) * dy[i] * x[i];
        }
    }
    let rest: f32 = (whole..x.len()).map(|i| (w[i] + offset) * dy[i] * x[i]).sum();
    sums.iter().sum::<f32>() + rest
}
