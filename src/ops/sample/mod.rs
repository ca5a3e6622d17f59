//! The next token of each sequence: greedy, or drawn after temperature, top-k and top-p.
//!
//! Random numbers are counter-based (Philox 4x32-10, Salmon et al., SC 2011) and keyed by (seed, row id, position): a sequence
//! draws the same numbers in any company, at any occupancy, on any backend.

mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::expect;
use crate::backend::{Backend, Indices, Matrix, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleSpec {
    /// 0 is greedy: the largest logit, the lowest id on a tie.
    pub temperature: f32,
    /// Keeps the k largest; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of the largest whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    pub seed: u64,
}

/// What keys each row's random number.
pub struct SampleTable<B: Backend> {
    pub(crate) ids: Tensor<B, u32>,       // (S, 2) low and high half of the row id
    pub(crate) positions: Tensor<B, u32>, // (S, 1) position of the token that is drawn
}

impl<B: Backend> SampleTable<B> {
    /// Room for `rows` sequences.
    pub fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        Ok(SampleTable { ids: Tensor::zeros(backend, rows, 2)?, positions: Tensor::zeros(backend, rows, 1)? })
    }

    /// Overwrites both columns.
    pub fn set(&mut self, backend: &B, ids: &[u64], positions: &[u32]) -> Result<()> {
        let halves: Vec<u32> = ids.iter().flat_map(|id| [*id as u32, (*id >> 32) as u32]).collect();
        self.ids.refill(backend, &halves)?;
        self.positions.refill(backend, positions)
    }
}

/// Where drawn tokens collect until the host reads them.
pub struct History<B: Backend> {
    pub(crate) tokens: Tensor<B, u32>, // (S, steps)
    /// The column that the next step writes.
    pub(crate) step: Tensor<B, u32>, // (1, 1)
}

impl<B: Backend> History<B> {
    /// Room for `rows` sequences and as many steps as the backend takes between two looks at them.
    pub(crate) fn with_capacity(backend: &B, rows: usize) -> Result<Self>
    where
        B: Sample,
    {
        Ok(History { tokens: Tensor::zeros(backend, rows, B::BURST)?, step: Tensor::zeros(backend, 1, 1)? })
    }

    /// Empty, for `rows` sequences.
    pub(crate) fn clear(&mut self, backend: &B, rows: usize) -> Result<()> {
        self.tokens.set_rows(rows)?;
        self.step.clear(backend)
    }
}

pub struct SampleTokens<'a, B: Backend> {
    pub tokens: &'a mut Indices<B>, // (S, 1) overwritten; V, no token, where a logit is not finite
    pub logits: &'a mut Tensor<B, f32>, // (S, V) scratch
    pub h: &'a Tensor<B>,           // (S, C) normed hidden rows
    pub table: &'a SampleTable<B>,  // (S)
    pub w: &'a B::Weight,           // (V, C)
    pub softcap: Option<f32>,       // of the logits, as lm_head has it
    pub spec: SampleSpec,
}

pub struct Advance<'a, B: Backend> {
    pub history: &'a mut History<B>,   // (S, steps)
    pub tokens: &'a mut Indices<B>,    // (S, 1) the next step's input
    pub positions: &'a mut Indices<B>, // (S, 1)
    pub drawn: &'a mut Tensor<B, u32>, // (S, 1) positions that key the draws
    pub next: &'a Indices<B>,          // (S, 1) the drawn tokens
}

/// Forward only: a drawn token has no gradient.
pub trait Sample: Backend {
    /// Steps that run before the host looks at their tokens: more where waiting for the device is expensive, since a sequence that
    /// ends within them runs on for nothing.
    const BURST: usize;

    fn sample(&self, operands: SampleTokens<Self>) -> Result<()>;

    /// Notes `next` in `history` and makes it the next step's `tokens`, id 0 where it is none of them; adds one to both positions,
    /// which stay at the last that is allowed. So the host need not prepare the next step.
    fn advance(&self, operands: Advance<Self>) -> Result<()>;
}

fn check<B: Backend>(operands: &SampleTokens<B>) -> Result<()> {
    let SampleTokens { tokens, logits, h, table, w, .. } = operands;
    let rows = h.rows();
    expect("sample", "tokens", tokens.rows(), rows)?;
    expect("sample", "tokens of this vocabulary, or none", tokens.bound() > w.rows(), true)?;
    expect("sample", "logits", logits.shape(), (rows, w.rows()))?;
    expect("sample", "columns", h.cols(), w.cols())?;
    expect("sample", "table", (table.ids.shape(), table.positions.shape()), ((rows, 2), (rows, 1)))
}

/// Rows, and columns of the history.
fn check_advance<B: Backend>(operands: &Advance<B>) -> Result<(usize, usize)> {
    let Advance { history, tokens, positions, drawn, next } = operands;
    let rows = next.rows();
    expect("advance", "columns", (tokens.rows(), positions.rows(), drawn.shape()), (rows, rows, (rows, 1)))?;
    expect("advance", "tokens of this vocabulary, or none", next.bound() <= tokens.bound() + 1, true)?;
    expect("advance", "history", history.tokens.rows(), rows)?;
    Ok((rows, history.tokens.cols()))
}

/// A number in [0, 1) from (seed, id, position): the first word of Philox 4x32-10, 24 bits of it.
pub(crate) fn uniform(seed: u64, id: [u32; 2], position: u32) -> f32 {
    let mut counter = [id[0], id[1], position, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    (counter[0] >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::uniform;

    /// Known answers of the reference implementation (Random123, kat_vectors: philox 4x32 10).
    #[test]
    fn philox_gives_its_published_numbers() {
        let first = |word: u32| (word >> 8) as f32 / (1 << 24) as f32;
        assert_eq!(uniform(0, [0, 0], 0), first(0x6627_e8d5));
    }
}
