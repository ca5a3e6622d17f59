//! The score head of a sequence classifier: `r[s] = h[s]·wᵀ` in f32, h the last normed hidden row of each sequence.

mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

pub struct ScoreBackward<'a, B: Backend> {
    pub dh: &'a mut Tensor<B>,              // (S, C) overwritten
    pub dw: Option<&'a mut Tensor<B, f32>>, // (labels, C) added to, where the head is trained
    pub dr: &'a Tensor<B, f32>,             // (S, labels)
    pub h: &'a Tensor<B>,                   // (S, C)
    pub w: &'a Tensor<B, f32>,              // (labels, C)
}

pub trait ScoreHead: Backend {
    /// Overwrites `r` (S, labels).
    fn score_forward(&self, r: &mut Tensor<Self, f32>, h: &Tensor<Self>, w: &Tensor<Self, f32>) -> Result<()>;

    fn score_backward(&self, operands: ScoreBackward<Self>) -> Result<()>;
}

/// Forward: h in once, the weights and rewards beside it. Backward: dh out and h in once, the weights and their gradient beside
/// them.
pub(crate) fn costs(rows: u64, labels: u64, cols: u64, act: u64) -> [Cost; 2] {
    [
        Cost { flops: 2 * rows * labels * cols, bytes: act * rows * cols + 4 * labels * (rows + cols) },
        Cost { flops: 4 * rows * labels * cols, bytes: 2 * act * rows * cols + 4 * labels * (2 * rows + 3 * cols) },
    ]
}

fn check<B: Backend>(r: &Tensor<B, f32>, h: &Tensor<B>, w: &Tensor<B, f32>) -> Result<()> {
    expect("score_head", "rewards", r.shape(), (h.rows(), w.rows()))?;
    expect("score_head", "columns", w.cols(), h.cols())
}

fn check_backward<B: Backend>(operands: &ScoreBackward<B>) -> Result<()> {
    let ScoreBackward { dh, dw, dr, h, w } = operands;
    expect("score_head", "dh", dh.shape(), h.shape())?;
    if let Some(dw) = dw {
        expect("score_head", "dw", dw.shape(), w.shape())?;
    }
    check(dr, h, w)
}
