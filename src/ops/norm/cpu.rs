use rayon::prelude::*;

use super::{Norm, NormSpec, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::product::dot;

/// Rows per task: enough work to pay for handing it to another thread.
const ROWS: usize = 64;

impl Norm for Cpu {
    fn norm_forward(
        &self,
        y: &mut Tensor<Self>,
        rstd: &mut Tensor<Self, f32>,
        x: &Tensor<Self>,
        w: &Tensor<Self>,
        spec: NormSpec,
    ) -> Result<()> {
        let (rows, cols) = check(&[x, y], rstd, w)?;
        let (y, x) = (&mut y.buffer[..rows * cols], &x.buffer[..rows * cols]);
        let tasks = y.par_chunks_mut(ROWS * cols).zip(rstd.buffer[..rows].par_chunks_mut(ROWS));
        tasks.zip(x.par_chunks(ROWS * cols)).for_each(|((y, rstd), x)| {
            for ((y, rstd), x) in y.chunks_exact_mut(cols).zip(rstd).zip(x.chunks_exact(cols)) {
                *rstd = rms_row(y, x, &w.buffer, spec);
            }
            self.store(y);
        });
        Ok(())
    }

    fn norm_backward(
        &self,
        dx: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        x: &Tensor<Self>,
        rstd: &Tensor<Self, f32>,
        w: &Tensor<Self>,
        spec: NormSpec,
    ) -> Result<()> {
        let (rows, cols) = check(&[x, dx, dy], rstd, w)?;
        let tasks =
            dx.buffer[..rows * cols].par_chunks_mut(ROWS * cols).zip(dy.buffer[..rows * cols].par_chunks(ROWS * cols));
        let saved = x.buffer[..rows * cols].par_chunks(ROWS * cols).zip(rstd.buffer[..rows].par_chunks(ROWS));
        tasks.zip(saved).for_each(|((dx, dy), (x, rstd))| {
            for (r, dx) in dx.chunks_exact_mut(cols).enumerate() {
                rms_backward_row(dx, &dy[r * cols..][..cols], &x[r * cols..][..cols], rstd[r], &w.buffer, spec);
            }
            self.store(dx);
        });
        Ok(())
    }
}

/// One row forward; returns its rstd.
pub(crate) fn rms_row(y: &mut [f32], x: &[f32], w: &[f32], spec: NormSpec) -> f32 {
    let rstd = (dot(x, x) / x.len() as f32 + spec.eps).sqrt().recip();
    let offset = if spec.unit_offset { 1.0 } else { 0.0 };
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = (w + offset) * x * rstd;
    }
    rstd
}

/// One row backward: dx += rstd·(g·dy − x·rstd²·mean(g·dy·x)).
pub(crate) fn rms_backward_row(dx: &mut [f32], dy: &[f32], x: &[f32], rstd: f32, w: &[f32], spec: NormSpec) {
    let offset = if spec.unit_offset { 1.0 } else { 0.0 };
    let mut mean = 0.0;
    for ((dy, x), w) in dy.iter().zip(x).zip(w) {
        mean += (w + offset) * dy * x;
    }
    mean /= x.len() as f32;
    let pull = rstd * rstd * mean;
    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
        *dx += rstd * ((w + offset) * dy - x * pull);
    }
}
