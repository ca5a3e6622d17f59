//! The embedded kernels, one typed launcher each; written by `build.rs` from the signatures in `kernels/`.

use half::bf16;

use super::driver::{Define, LaunchConfig};
use super::source::Source;
use super::{Cuda, DeviceBuffer};
use crate::error::Result;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
