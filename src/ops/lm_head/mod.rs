//! The language-model head over R target rows, in chunks: logits l = h·Wᵀ (capped: c·tanh(h·Wᵀ/c)), `log p = l[y] − lse`, and
//! the rows `g = ∂log p/∂h = W[y] − pᵀW` (each column of W times its cap's slope, 1 − (l/c)²). Logits of a whole batch never exist, and the head knows no loss: a loss is a weight per row,
//! applied to g afterwards. Only KL has an entry of its own, since its rows (π_θ − π_0)ᵀW are not of that form.

pub(crate) mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Matrix, Tensor};
use crate::error::Result;

/// What the host reads after a policy's forward: a few numbers per target row.
pub struct HeadRows<B: Backend> {
    pub logprob: Tensor<B, f32>,  // (R, 1) log p of the target
    pub lse: Tensor<B, f32>,      // (R, 1) log Σ exp l
    pub log_rest: Tensor<B, f32>, // (R, 1) log(1 − p), summed over the other tokens, never subtracted
}

impl<B: Backend> HeadRows<B> {
    /// Room for `rows` target rows.
    pub fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        let column = || Tensor::zeros(backend, rows, 1);
        Ok(HeadRows { logprob: column()?, lse: column()?, log_rest: column()? })
    }

    pub(crate) fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.logprob.set_rows(rows)?;
        self.lse.set_rows(rows)?;
        self.log_rest.set_rows(rows)
    }
}

pub struct LmHeadForward<'a, B: Backend> {
    pub out: &'a mut HeadRows<B>,      // overwritten
    pub dh: Option<&'a mut Tensor<B>>, // (R, C) the rows g, overwritten
    pub chunk: &'a mut Tensor<B>,      // (chunk rows, V) scratch
    pub h: &'a Tensor<B>,              // (R, C) normed hidden rows
    pub targets: &'a Tensor<B, u32>,   // (R, 1) below V
    pub w: &'a B::Weight,              // (V, C)
    pub softcap: Option<f32>,
}

pub struct LmHeadKl<'a, B: Backend> {
    pub kl: &'a mut Tensor<B, f32>, // (R, 1) overwritten
    pub dh: &'a mut Tensor<B>,      // (R, C) overwritten
    pub chunk: &'a mut Tensor<B>,   // (chunk rows, V) scratch
    pub chunk0: &'a mut Tensor<B>,  // (chunk rows, V) scratch
    pub h: &'a Tensor<B>,           // (R, C) π_θ's normed hidden rows
    pub h0: &'a Tensor<B>,          // (R, C) π_0's
    pub w: &'a B::Weight,           // (V, C)
    pub softcap: Option<f32>,
}

pub trait LmHead: Backend {
    /// Rows of the chunk of logits that this backend wants for a vocabulary of `vocab` tokens.
    fn lm_head_chunk(vocab: usize) -> usize;

    fn lm_head_forward(&self, operands: LmHeadForward<Self>) -> Result<()>;

    /// KL(π_0 ‖ π_θ) of each row and its gradient rows (π_θ − π_0)ᵀW. Both chunks of logits are computed again.
    fn lm_head_kl(&self, operands: LmHeadKl<Self>) -> Result<()>;
}

/// R, V and C.
fn check<B: Backend>(h: &Tensor<B>, chunk: &Tensor<B>, w: &B::Weight) -> Result<[usize; 3]> {
    expect("lm_head", "hidden columns", h.cols(), w.cols())?;
    expect("lm_head", "chunk columns", chunk.cols(), w.rows())?;
    expect("lm_head", "a chunk with rows", chunk.capacity() > 0, true)?;
    Ok([h.rows(), w.rows(), w.cols()])
}

fn check_forward<B: Backend>(operands: &LmHeadForward<B>) -> Result<[usize; 3]> {
    let LmHeadForward { out, dh, chunk, h, targets, w, softcap: _ } = operands;
    expect("lm_head", "targets", targets.shape(), (h.rows(), 1))?;
    for column in [&out.logprob, &out.lse, &out.log_rest] {
        expect("lm_head", "logprob, lse and log_rest", column.shape(), (h.rows(), 1))?;
    }
    if let Some(dh) = dh {
        expect("lm_head", "dh", dh.shape(), h.shape())?;
    }
    check(h, chunk, w)
}

fn check_kl<B: Backend>(operands: &LmHeadKl<B>) -> Result<[usize; 3]> {
    let LmHeadKl { kl, dh, chunk, chunk0, h, h0, w, softcap: _ } = operands;
    expect("lm_head", "kl", kl.shape(), (h.rows(), 1))?;
    expect("lm_head", "dh and h0", (dh.shape(), h0.shape()), (h.shape(), h.shape()))?;
    check(h0, chunk0, w)?;
    check(h, chunk, w)
}

/// Without gradient rows: one product, whose logits need not be kept. With them: two, and one write and read of each chunk.
pub(crate) fn costs(rows: u64, vocab: u64, cols: u64, act: u64) -> [Cost; 2] {
    let (product, read) = (2 * rows * vocab * cols, vocab * cols + rows * cols);
    [Cost { flops: product, bytes: act * read }, Cost { flops: 2 * product, bytes: 2 * act * (rows * vocab + read) }]
}
