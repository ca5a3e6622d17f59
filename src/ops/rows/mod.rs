//! Rows by index: gather `y[i] = x[rows[i]]`, and its transpose. A head sees only the rows that have a target or end a sequence.

mod cpu;
pub(super) mod cuda;
pub mod naive;

pub(crate) use cuda::gather;

use super::expect;
use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;

pub trait Rows: Backend {
    /// Overwrites `y` (R, C) with the rows of `x` (T, C) that `rows` (R, 1) names.
    fn gather(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &Indices<Self>) -> Result<()>;

    /// Overwrites `dx` (T, C): dy's rows where `rows` names them, zeros elsewhere. No row is named twice.
    fn scatter(&self, dx: &mut Tensor<Self>, dy: &Tensor<Self>, rows: &Indices<Self>) -> Result<()>;

    /// Multiplies row i of `y` (R, C) by `weights` (R, 1): how a loss reaches the head's rows.
    fn scale_rows(&self, y: &mut Tensor<Self>, weights: &Tensor<Self, f32>) -> Result<()>;
}

pub(crate) fn check<B: Backend>(few: &Tensor<B>, all: &Tensor<B>, rows: &Indices<B>) -> Result<usize> {
    expect("rows", "index", rows.rows(), few.rows())?;
    expect("rows", "index within the rows", rows.bound() <= all.rows(), true)?;
    expect("rows", "columns", few.cols(), all.cols())?;
    Ok(few.cols())
}
