use super::{ScoreHead, backward_cost, check, forward_cost};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::{Cost, expect};

/// Heads are narrow and rows few: any size serves.
const THREADS: u32 = 256;
const DEFINES: &[Define] = &[("THREADS", THREADS as u64)];

/// What is compiled for any model.
pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::SCORE_HEAD, DEFINES, THREADS)]
}

impl ScoreHead for Cuda {
    fn score_forward(&self, r: &mut Tensor<Self, f32>, h: &Tensor<Self>, w: &Tensor<Self, f32>) -> Result<()> {
        check(r, h, w)?;
        let (rows, labels, cols, stride) = (h.rows() as u32, w.rows() as u32, w.cols() as u32, h.stride() as u32);
        let config = LaunchConfig::linear((rows * labels).div_ceil(THREADS / 32), THREADS);
        let (r, h, w) = (&mut r.buffer, &h.buffer, &w.buffer);
        self.charge(|| forward_cost(rows.into(), labels.into(), cols.into(), 2));
        // SAFETY: `check` proved r (rows, labels), h (rows, cols) and w (labels, cols).
        unsafe { kernels::score_forward(self, DEFINES, config, r, h, w, rows, labels, cols, stride) }
    }

    fn score_backward(
        &self,
        dh: &mut Tensor<Self>,
        dw: Option<&mut Tensor<Self, f32>>,
        dr: &Tensor<Self, f32>,
        h: &Tensor<Self>,
        w: &Tensor<Self, f32>,
    ) -> Result<()> {
        check(dr, h, w)?;
        expect("score_head", "dh", dh.shape(), h.shape())?;
        let (rows, labels, cols, stride) = (h.rows() as u32, w.rows() as u32, w.cols() as u32, h.stride() as u32);
        let config = LaunchConfig::linear(rows, THREADS);
        let weights = forward_cost(rows.into(), labels.into(), cols.into(), 2);
        self.charge(|| {
            let Cost { flops, bytes } = backward_cost(rows.into(), labels.into(), cols.into(), 2);
            Cost { flops: flops - weights.flops, bytes: bytes - weights.bytes }
        });
        // SAFETY: `check` and `expect` proved dh and h (rows, cols), dr (rows, labels) and w (labels, cols).
        unsafe {
            kernels::score_backward(
                self,
                DEFINES,
                config,
                &mut dh.buffer,
                &dr.buffer,
                &w.buffer,
                labels,
                cols,
                stride,
            )?;
        }
        let Some(dw) = dw else { return Ok(()) };
        expect("score_head", "dw", dw.shape(), w.shape())?;
        let config = LaunchConfig::linear((labels * cols).div_ceil(THREADS), THREADS);
        let (dw, dr, h) = (&mut dw.buffer, &dr.buffer, &h.buffer);
        self.charge(|| weights);
        // SAFETY: as above, and dw (labels, cols).
        unsafe { kernels::score_weights(self, DEFINES, config, dw, dr, h, rows, labels, cols, stride) }
    }
}
