use super::{Rows, check};
use crate::backend::{Cpu, Indices, Tensor};
use crate::error::Result;
use crate::ops::expect;

impl Rows for Cpu {
    fn gather(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        let cols = check(y, x, rows)?;
        let count = y.rows();
        for (y, &row) in y.buffer.chunks_exact_mut(cols).take(count).zip(rows.buffer()) {
            y.copy_from_slice(&x.buffer[row as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn scatter(&self, dx: &mut Tensor<Self>, dy: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        let cols = check(dy, dx, rows)?;
        dx.clear(self)?;
        for (dy, &row) in dy.buffer.chunks_exact(cols).take(dy.rows()).zip(rows.buffer()) {
            dx.buffer[row as usize * cols..][..cols].copy_from_slice(dy);
        }
        Ok(())
    }

    fn scale_rows(&self, y: &mut Tensor<Self>, weights: &Tensor<Self, f32>) -> Result<()> {
        expect("rows", "weights", weights.shape(), (y.rows(), 1))?;
        let (rows, cols) = y.shape();
        for (y, weight) in y.buffer.chunks_exact_mut(cols).take(rows).zip(&weights.buffer) {
            y.iter_mut().for_each(|y| *y *= weight);
            self.store(y);
        }
        Ok(())
    }
}
