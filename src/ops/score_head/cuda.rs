use super::{ScoreBackward, ScoreHead, check, check_backward, costs};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::Cost;

/// Heads are narrow and rows few: any size serves.
const THREADS: u32 = 256;
const DEFINES: &[Define] = &[("THREADS", THREADS as u64)];

pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::SCORE_HEAD, DEFINES, THREADS)]
}

impl ScoreHead for Cuda {
    fn score_forward(&self, r: &mut Tensor<Self, f32>, h: &Tensor<Self>, w: &Tensor<Self, f32>) -> Result<()> {
        check(r, h, w)?;
        let (rows, labels, cols) = (h.rows(), w.rows(), w.cols());
        let config = LaunchConfig::linear((rows * labels).div_ceil(THREADS as usize / 32) as u32, THREADS);
        self.charge(|| costs(rows as u64, labels as u64, cols as u64, 2)[0]);
        let (r, stride) = (&mut r.buffer, h.stride());
        // SAFETY: `check` proved r (rows, labels), h (rows, cols) and w (labels, cols).
        unsafe { kernels::score_forward(self, DEFINES, config, r, &h.buffer, &w.buffer, rows, labels, cols, stride) }
    }

    fn score_backward(&self, operands: ScoreBackward<Self>) -> Result<()> {
        check_backward(&operands)?;
        let ScoreBackward { dh, dw, dr, h, w } = operands;
        let (rows, labels, cols, stride) = (h.rows(), w.rows(), w.cols(), h.stride());
        let config = LaunchConfig::linear(rows as u32, THREADS);
        let [weights, both] = costs(rows as u64, labels as u64, cols as u64, 2);
        self.charge(|| Cost { flops: both.flops - weights.flops, bytes: both.bytes - weights.bytes });
        let (dh, dr, h) = (&mut dh.buffer, &dr.buffer, &h.buffer);
        // SAFETY: `check_backward` proved dh and h (rows, cols), dr (rows, labels) and w (labels, cols).
        unsafe { kernels::score_backward(self, DEFINES, config, dh, dr, &w.buffer, labels, cols, stride)? };
        let Some(dw) = dw else { return Ok(()) };
        let config = LaunchConfig::linear((labels * cols).div_ceil(THREADS as usize) as u32, THREADS);
        self.charge(|| weights);
        // SAFETY: as above, and dw (labels, cols).
        unsafe { kernels::score_weights(self, DEFINES, config, &mut dw.buffer, dr, h, rows, labels, cols, stride) }
    }
}
