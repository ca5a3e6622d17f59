//! The language-model head over R target rows, in chunks: logits l = h·Wᵀ, `log p = l[y] − lse`, and the rows
//! `g = ∂log p/∂h = W[y] − pᵀW`. Logits of a whole batch never exist, and the head knows no loss: a loss is a weight per row,
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

pub trait LmHead: Backend {
    /// Rows of the chunk of logits that this backend wants for a vocabulary of `vocab` tokens.
    fn lm_head_chunk(vocab: usize) -> usize;

    /// Overwrites `out` and, where asked, `dh` (R, C) with the rows g; `chunk` is scratch of (chunk rows, V). `h` (R, C) are
    /// normed hidden rows, `targets` (R, 1) below V.
    fn lm_head_forward(
        &self,
        out: &mut HeadRows<Self>,
        dh: Option<&mut Tensor<Self>>,
        chunk: &mut Tensor<Self>,
        h: &Tensor<Self>,
        targets: &Tensor<Self, u32>,
        w: &Self::Weight,
    ) -> Result<()>;

    /// KL(π_0 ‖ π_θ) per row into `kl` (R, 1) and its gradient rows (π_θ − π_0)ᵀW into `dh` (R, C), both overwritten; `h` are
    /// π_θ's and `h0` π_0's normed hidden rows. Both chunks of logits are computed again.
    fn lm_head_kl(
        &self,
        kl: &mut Tensor<Self, f32>,
        dh: &mut Tensor<Self>,
        chunk: &mut Tensor<Self>,
        chunk0: &mut Tensor<Self>,
        h: &Tensor<Self>,
        h0: &Tensor<Self>,
        w: &Self::Weight,
    ) -> Result<()>;
}

pub(crate) fn check<B: Backend>(h: &Tensor<B>, chunk: &Tensor<B>, w: &B::Weight) -> Result<(usize, usize, usize)> {
    expect("lm_head", "hidden columns", h.cols(), w.cols())?;
    expect("lm_head", "chunk columns", chunk.cols(), w.rows())?;
    expect("lm_head", "a chunk with rows", chunk.capacity() > 0, true)?;
    Ok((h.rows(), w.rows(), w.cols()))
}

/// Without gradient rows: one product, whose logits need not be kept. With them: two, and one write and read of each chunk.
pub(crate) fn costs(rows: u64, vocab: u64, cols: u64, act: u64) -> [Cost; 2] {
    let (product, read) = (2 * rows * vocab * cols, vocab * cols + rows * cols);
    [Cost { flops: product, bytes: act * read }, Cost { flops: 2 * product, bytes: 2 * act * (rows * vocab + read) }]
}
