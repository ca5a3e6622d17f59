//! Token embedding: `x[t] = E[token[t]]`.

mod cpu;
mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Indices, Matrix, Tensor};
use crate::error::Result;

/// Forward only: the embedding is frozen, and nothing below it takes a gradient.
pub trait Embed: Backend {
    /// Overwrites `x` (T, C) with rows of `table` (V, C).
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight) -> Result<()>;
}

pub(crate) fn check<B: Backend>(x: &Tensor<B>, tokens: &Indices<B>, table: &B::Weight) -> Result<()> {
    expect("embed", "tokens", tokens.rows(), x.rows())?;
    expect("embed", "tokens within the vocabulary", tokens.bound() <= table.rows(), true)?;
    expect("embed", "columns", x.cols(), table.cols())
}

/// One row read and written per token.
pub(crate) fn cost(rows: u64, cols: u64, act: u64) -> Cost {
    Cost { flops: 0, bytes: rows * cols * 2 * act }
}
