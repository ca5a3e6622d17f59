//! Token embedding: `x[t] = E[token[t]]`.

mod cpu;
mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Matrix, Tensor};
use crate::error::Result;

/// Forward only: the embedding is frozen, and nothing below it takes a gradient.
pub trait Embed: Backend {
    /// Overwrites `x` (T, C) with rows of `table` (V, C). Every token is below V: the batch's maker checked it.
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Tensor<Self, u32>, table: &Self::Weight) -> Result<()>;
}

pub(crate) fn check<B: Backend>(x: &Tensor<B>, tokens: &Tensor<B, u32>, table: &B::Weight) -> Result<()> {
    expect("embed", "tokens", tokens.shape(), (x.rows(), 1))?;
    expect("embed", "columns", x.cols(), table.cols())
}

/// One row read and written per token.
pub(crate) fn cost(rows: u64, cols: u64, act: u64) -> Cost {
    Cost { flops: 0, bytes: rows * cols * 2 * act }
}
