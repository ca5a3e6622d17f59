//! A matrix in device memory.

use super::Backend;
use crate::error::{Error, Result};

/// A number as it lies in memory.
pub trait Element: bytemuck::Pod + Default + Send + Sync + std::fmt::Debug + PartialEq {}

impl Element for f32 {}
impl Element for half::bf16 {}
impl Element for u32 {}

/// `rows` × `cols` values, row-major, `stride` elements from row to row. It has room for `capacity` rows; a step sets `rows` to
/// what it needs.
pub struct Tensor<B: Backend, T: Element = <B as Backend>::Act> {
    pub(crate) buffer: B::Buffer<T>,
    rows: usize,
    cols: usize,
    stride: usize,
    capacity: usize,
    /// Elements that are allocated; `capacity` rows at least.
    allocated: usize,
}

impl<B: Backend, T: Element> Tensor<B, T> {
    /// Zeros; `rows` is the capacity too.
    pub(crate) fn zeros(backend: &B, rows: usize, cols: usize) -> Result<Self> {
        let stride = B::stride::<T>(cols);
        let allocated = rows * stride;
        Ok(Tensor { buffer: backend.alloc(allocated)?, rows, cols, stride, capacity: rows, allocated })
    }

    /// Makes it `rows` × `cols` with room for as many rows; allocates only where its memory does not suffice. Its values are
    /// whatever was there, its padding is zero.
    pub(crate) fn fit(&mut self, backend: &B, rows: usize, cols: usize) -> Result<()> {
        let stride = B::stride::<T>(cols);
        if rows * stride > self.allocated {
            *self = Tensor::zeros(backend, 0, 0)?; // first, so that both are never held
            *self = Tensor::zeros(backend, rows, cols)?;
        } else if stride != cols && (stride, cols) != (self.stride, self.cols) {
            backend.zero(&mut self.buffer, 0, rows * stride)?;
        }
        (self.rows, self.cols, self.stride, self.capacity) = (rows, cols, stride, rows);
        Ok(())
    }

    /// From row-major values, `rows * cols` of them.
    pub fn from_host(backend: &B, rows: usize, cols: usize, values: &[T]) -> Result<Self> {
        let mut tensor = Self::zeros(backend, rows, cols)?;
        tensor.write(backend, values)?;
        Ok(tensor)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    /// All of the allocation, padding and rows out of use included.
    pub fn buffer(&self) -> &B::Buffer<T> {
        &self.buffer
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many of the allocated rows are in use from now on; their values are whatever was there.
    pub fn set_rows(&mut self, rows: usize) -> Result<()> {
        if rows > self.capacity {
            return Err(Error::Shape {
                op: "tensor",
                expected: format!("at most {} rows (the workspace's capacity)", self.capacity),
                found: rows.to_string(),
            });
        }
        self.rows = rows;
        Ok(())
    }

    /// Overwrites all rows in use.
    pub fn write(&mut self, backend: &B, values: &[T]) -> Result<()> {
        if values.len() != self.rows * self.cols {
            let (expected, found) = (format!("{} x {} values", self.rows, self.cols), values.len().to_string());
            return Err(Error::Shape { op: "tensor", expected, found });
        }
        if self.stride == self.cols {
            return backend.upload(&mut self.buffer, 0, values);
        }
        let mut padded = vec![T::default(); self.rows * self.stride];
        for (to, from) in padded.chunks_exact_mut(self.stride).zip(values.chunks_exact(self.cols)) {
            to[..self.cols].copy_from_slice(from);
        }
        backend.upload(&mut self.buffer, 0, &padded)
    }

    /// Sets the rows in use to `values.len() / cols` and writes them.
    pub(crate) fn refill(&mut self, backend: &B, values: &[T]) -> Result<()> {
        self.set_rows(values.len() / self.cols.max(1))?;
        self.write(backend, values)
    }

    /// All rows in use, row-major without padding. Waits for queued work.
    pub fn read(&self, backend: &B) -> Result<Vec<T>> {
        let mut padded = vec![T::default(); self.rows * self.stride];
        backend.download(&mut padded, &self.buffer, 0)?;
        if self.stride == self.cols {
            return Ok(padded);
        }
        Ok(padded.chunks_exact(self.stride).flat_map(|row| &row[..self.cols]).copied().collect())
    }

    /// Zeros all rows in use.
    pub(crate) fn clear(&mut self, backend: &B) -> Result<()> {
        backend.zero(&mut self.buffer, 0, self.rows * self.stride)
    }

    /// `(rows, cols)`, as shape checks compare them.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}
