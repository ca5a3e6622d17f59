//! The embedded kernels, one typed launcher each; written by `build.rs` from the signatures in `kernels/`.

use bytemuck::bytes_of;
use half::bf16;

use super::driver::{Define, LaunchConfig, TensorMap};
use super::source::Source;
use super::{Cuda, DeviceBuffer};
use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Writes one field of a struct at its place, which `kernels/` was compiled to agree with.
fn put<T: bytemuck::NoUninit>(words: &mut [u64], at: usize, value: T) {
    bytemuck::cast_slice_mut(words)[at..at + size_of::<T>()].copy_from_slice(bytes_of(&value));
}

/// A count as kernels take it.
fn narrow(name: &str, value: usize) -> Result<u32> {
    let fault = |_| Error::Shape { op: "launch", expected: format!("`{name}` below 2^32"), found: value.to_string() };
    u32::try_from(value).map_err(fault)
}
