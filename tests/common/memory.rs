//! Device memory of a driver.

use std::sync::Arc;

use ares::backend::cuda::driver::Driver;

/// Device memory that holds `values`; never freed.
pub fn upload<T: bytemuck::Pod>(driver: &Arc<dyn Driver>, values: &[T]) -> u64 {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let address = driver.alloc(bytes.len()).expect("memory");
    // SAFETY: the allocation is as long as the values.
    unsafe { driver.upload(address, bytes) }.expect("an upload");
    address
}

/// `len` values from device memory.
pub fn download<T: bytemuck::Pod>(driver: &Arc<dyn Driver>, address: u64, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    // SAFETY: the tests name what they allocated.
    unsafe { driver.download(bytemuck::cast_slice_mut(&mut values), address) }.expect("a download");
    values
}
