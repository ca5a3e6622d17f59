//! Device memory with its length.

use std::marker::PhantomData;
use std::sync::Arc;

use super::driver::Driver;
use crate::backend::{Element, within};
use crate::error::Result;

/// `len` elements in device memory, freed with their owner.
pub struct DeviceBuffer<T: Element> {
    driver: Arc<dyn Driver>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> DeviceBuffer<T> {
    /// Of no elements, and without memory.
    pub(super) fn empty(driver: &Arc<dyn Driver>) -> Self {
        DeviceBuffer { driver: driver.clone(), address: 0, len: 0, element: PhantomData }
    }

    /// Zeros.
    pub(super) fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let address = if len == 0 { 0 } else { driver.alloc(len * size_of::<T>())? };
        Ok(DeviceBuffer { driver: driver.clone(), address, len, element: PhantomData })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of `at`, when `at..at + len` lies within.
    pub(super) fn range(&self, at: usize, len: usize) -> Result<u64> {
        let range = within(self.len, at, len)?;
        Ok(self.address + (range.start * size_of::<T>()) as u64)
    }
}

impl<T: Element> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: the address is ours alone; the driver waits for what is queued before it gives memory away.
            unsafe { self.driver.free(self.address) };
        }
    }
}
