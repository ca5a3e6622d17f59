//! Rows by index: gather `y[i] = x[rows[i]]`, and its transpose. A head sees only the rows that have a target or end a
//! sequence; the embedding gathers rows of its table.

mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;

pub trait Rows: Backend {
    /// Overwrites `x` (T, C) with `scale` times the rows of `table` (V, C) that `tokens` (T, 1) names. Forward only: the embedding
    /// is frozen, and nothing below it takes a gradient.
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight, scale: f32) -> Result<()>;

    /// Adds to `x` (T, C) the rows of `table` (V, C) that `index` (T, 1) names: positions that are learned, as encoders have them.
    fn embed_add(&self, x: &mut Tensor<Self>, index: &Indices<Self>, table: &Self::Weight) -> Result<()>;

    /// Overwrites `y` (R, C) with the rows of `x` (T, C) that `rows` (R, 1) names.
    fn gather(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &Indices<Self>) -> Result<()>;

    /// Overwrites `dx` (T, C): dy's rows where `rows` names them, zeros elsewhere. No row is named twice.
    fn scatter(&self, dx: &mut Tensor<Self>, dy: &Tensor<Self>, rows: &Indices<Self>) -> Result<()>;

    /// Multiplies row i of `y` (R, C) by `weights` (R, 1): how a loss reaches the head's rows.
    fn scale_rows(&self, y: &mut Tensor<Self>, weights: &Tensor<Self, f32>) -> Result<()>;
}

/// `few` are those of `rows` among all, (rows, columns).
fn check<B: Backend>(few: &Tensor<B>, all: (usize, usize), rows: &Indices<B>) -> Result<()> {
    expect("rows", "index", rows.rows(), few.rows())?;
    expect("rows", "index within the rows", rows.bound() <= all.0, true)?;
    expect("rows", "columns", few.cols(), all.1)
}

/// Each row read and written once.
pub(crate) fn cost(rows: u64, cols: u64, act: u64) -> Cost {
    Cost { flops: 0, bytes: rows * cols * 2 * act }
}
