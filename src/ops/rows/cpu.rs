use rayon::prelude::*;

use super::{Rows, check};
use crate::backend::{Cpu, Indices, Matrix, Tensor};
use crate::error::Result;
use crate::ops::expect;

/// Rows per task: enough work to pay for handing it to another thread.
const ROWS: usize = 64;

impl Rows for Cpu {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight, scale: f32) -> Result<()> {
        check(x, (table.rows(), table.cols()), tokens)?;
        let (rows, cols) = x.shape();
        let x = x.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        x.zip(tokens.buffer()[..rows].par_chunks(ROWS)).for_each(|(x, tokens)| {
            let rows = x.chunks_exact_mut(cols).zip(tokens);
            rows.for_each(|(row, &token)| table.read_row(token as usize, row));
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
                self.store(x);
            }
        });
        Ok(())
    }

    fn embed_add(&self, x: &mut Tensor<Self>, index: &Indices<Self>, table: &Self::Weight) -> Result<()> {
        check(x, (table.rows(), table.cols()), index)?;
        let (rows, cols) = x.shape();
        let tasks = x.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        tasks.zip(index.buffer()[..rows].par_chunks(ROWS)).for_each(|(x, index)| {
            let mut more = vec![0.0; cols];
            for (row, &at) in x.chunks_exact_mut(cols).zip(index) {
                table.read_row(at as usize, &mut more);
                row.iter_mut().zip(&more).for_each(|(x, more)| *x += more);
            }
            self.store(x);
        });
        Ok(())
    }

    fn gather(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        check(y, x.shape(), rows)?;
        let (count, cols) = y.shape();
        for (y, &row) in y.buffer.chunks_exact_mut(cols).take(count).zip(rows.buffer()) {
            y.copy_from_slice(&x.buffer[row as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn scatter(&self, dx: &mut Tensor<Self>, dy: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        check(dy, dx.shape(), rows)?;
        let cols = dy.cols();
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
