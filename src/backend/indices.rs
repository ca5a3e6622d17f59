//! Ids that index memory, and the bound that each of them keeps.

use super::{Backend, Tensor};
use crate::error::{Error, Result};

/// A column of ids, all below `bound`: compared as they were written from the host, and kept to by the kernels that write them.
/// An operation that is given them compares the bound with what it indexes, so no id reaches beyond it.
pub struct Indices<B: Backend> {
    tensor: Tensor<B, u32>,
    bound: usize,
}

impl<B: Backend> Indices<B> {
    /// Room for `rows` ids, of which none is there yet.
    pub fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        let mut tensor = Tensor::zeros(backend, rows, 1)?;
        tensor.set_rows(0)?;
        Ok(Indices { tensor, bound: 0 })
    }

    /// Ids below `bound`; fails where one is not.
    pub fn from_host(backend: &B, ids: &[u32], bound: usize) -> Result<Self> {
        let mut indices = Self::with_capacity(backend, ids.len())?;
        indices.set(backend, ids, bound).map(|()| indices)
    }

    /// Overwrites all with ids below `bound`; fails where one is not.
    pub fn set(&mut self, backend: &B, ids: &[u32], bound: usize) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= bound) {
            return Err(Error::Shape { op: "indices", expected: format!("ids below {bound}"), found: id.to_string() });
        }
        // Should the copy fail, old ids may remain.
        self.bound = self.bound.max(bound);
        self.tensor.refill(backend, ids)?;
        self.bound = bound;
        Ok(())
    }

    /// Overwrites all; the bound becomes the least that holds.
    pub(crate) fn refill(&mut self, backend: &B, ids: &[u32]) -> Result<()> {
        self.set(backend, ids, ids.iter().max().map_or(0, |&id| id as usize + 1))
    }

    pub fn rows(&self) -> usize {
        self.tensor.rows()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.tensor.capacity()
    }

    pub(crate) fn bound(&self) -> usize {
        self.bound
    }

    pub fn buffer(&self) -> &B::Buffer<u32> {
        &self.tensor.buffer
    }

    /// For what writes ids below the bound only.
    pub(crate) fn buffer_mut(&mut self) -> &mut B::Buffer<u32> {
        &mut self.tensor.buffer
    }

    /// Waits for queued work.
    pub fn read(&self, backend: &B) -> Result<Vec<u32>> {
        self.tensor.read(backend)
    }
}
