//! What a GPU's faults are called, and what to do about them.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUresult;

use super::trail::Trail;
use crate::error::Error;

/// `CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)`
pub(super) fn describe(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}

/// A call failed; `action` completes "cannot …". When a kernel is at fault, `trail` says which it may be.
pub(super) fn fault(device: &str, action: &str, error: DriverError, trail: &Trail, sync: bool) -> Error {
    if !is_kernels(error) {
        let what = format!("cannot {action}: {}", describe(error));
        return failed(device, what, "look at `nvidia-smi`; if the device is well, please report this");
    }
    let what = format!("{}: {}", describe(error), trail.describe());
    if sync {
        return ours(device, what);
    }
    failed(device, what, "run again with --sync to learn which kernel it was, and please report it")
}

/// A fault of the program.
pub(super) fn ours(device: &str, what: String) -> Error {
    failed(device, what, "this is a fault in ares: please report it")
}

fn failed(device: &str, what: String, remedy: &str) -> Error {
    Error::Device { device: device.into(), what, remedy: remedy.into() }
}

/// The context must be current.
pub(super) fn out_of_memory(device: &str, bytes: usize) -> Error {
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let found = match result::mem_get_info() {
        Ok((free, total)) => format!("found {:.2} of {:.1} GiB free", gib(free), gib(total)),
        Err(_) => "found less".to_string(),
    };
    let what = format!("out of memory: expected {:.2} GiB, {found}", gib(bytes));
    let remedy = "lower --batch-tokens or the number of sequences at once, take smaller models, or end other programs on \
                  this GPU";
    failed(device, what, remedy)
}

/// Whether a kernel did this, now or earlier: the context is lost.
fn is_kernels(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
    )
}
