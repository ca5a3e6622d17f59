//! The driver's library, its devices, and a context on one of them.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::fault::describe;
use crate::backend::cuda::driver::{Arch, DeviceInfo};
use crate::backend::cuda::search::DriverVersion;
use crate::error::{Error, Result};

/// Oldest driver that can load what NVRTC 12 makes.
const OLDEST_CUDA: u32 = 12;

/// Whether the driver's library can be loaded; any other call to it would panic without.
pub(crate) fn driver_present() -> bool {
    // SAFETY: loads libcuda, whose initialisation has no precondition.
    unsafe { sys::is_culib_present() }
}

/// What the installed driver speaks; `None` without a driver.
pub(crate) fn driver_version() -> Option<DriverVersion> {
    if !driver_present() {
        return None;
    }
    let mut version = 0;
    // SAFETY: the library was loaded; the call writes one integer and needs no initialisation.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok()?;
    let version = u32::try_from(version).ok()?;
    let release = std::fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|text| release(&text));
    Some(DriverVersion { cuda: (version / 1000, version % 1000 / 10), release })
}

/// `550.54.14`, as the kernel module says.
fn release(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let number = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(number).map(str::to_string)
}

/// All devices as people read them, usable or not.
pub(crate) fn devices() -> Result<Vec<String>> {
    let count = initialise("cuda")?;
    let describe = |ordinal| {
        let device = Gpu::get(ordinal).map_err(|e| unusable(&format!("cuda:{ordinal}"), &describe(e)))?;
        let gib = device.memory as f64 / (1u64 << 30) as f64;
        let Gpu { name, capability: (major, minor), .. } = device;
        Ok(format!("cuda:{ordinal} {name} ({gib:.1} GiB, compute capability {major}.{minor})"))
    };
    (0..count).map(describe).collect()
}

/// Makes the driver ready; the number of devices. `asked` is who asks, for messages.
fn initialise(asked: &str) -> Result<usize> {
    let Some(version) = driver_version() else {
        let what = "expected a CUDA driver (libcuda.so.1), found none; install NVIDIA's driver";
        return Err(unusable(asked, what));
    };
    if version.cuda.0 < OLDEST_CUDA {
        return Err(unusable(asked, &format!("{version}; expected CUDA {OLDEST_CUDA}.0 or newer (driver 525)")));
    }
    let count = result::init().and_then(|()| result::device::get_count());
    let count = count.map_err(|error| unusable(asked, &format!("{}; {}", describe(error), remedy(error))))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// What to do when the driver does not start.
fn remedy(error: DriverError) -> &'static str {
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => {
            "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; a container needs to be given its GPUs (`--gpus all`)"
        }
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "this libcuda is the toolkit's stub: take its folder out of LD_LIBRARY_PATH"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver was updated under a running kernel module: restart the machine"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => "another process holds the device exclusively",
        _ => "look at `nvidia-smi`",
    }
}

fn unusable(asked: &str, what: &str) -> Error {
    Error::NoDevice(format!("{asked}: {what}"))
}

/// What the driver says of a device.
struct Gpu {
    handle: sys::CUdevice,
    name: String,
    capability: (u32, u32),
    memory: u64,
}

impl Gpu {
    fn get(ordinal: usize) -> Result<Gpu, DriverError> {
        let ordinal = i32::try_from(ordinal).map_err(|_| DriverError(CUresult::CUDA_ERROR_INVALID_DEVICE))?;
        let handle = result::device::get(ordinal)?;
        // SAFETY: the handle comes from the driver.
        let memory = unsafe { result::device::total_mem(handle)? } as u64;
        let mut device = Gpu { handle, name: result::device::get_name(handle)?, capability: (0, 0), memory };
        let major = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        device.capability = (major, device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
        Ok(device)
    }

    fn attribute(&self, attribute: Attribute) -> Result<u32, DriverError> {
        // SAFETY: the handle comes from the driver.
        let value = unsafe { result::device::get_attribute(self.handle, attribute)? };
        Ok(u32::try_from(value).unwrap_or(0))
    }
}

/// Milliseconds from one event to another, both over.
///
/// # Safety
/// Both events are alive, and their context is current.
pub(super) unsafe fn elapsed(from: sys::CUevent, to: sys::CUevent) -> Result<f32, DriverError> {
    type Function = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;
    // SAFETY: the library is NVIDIA's, and both names have this type. Drivers before CUDA 12.8 know only the plain one, of
    // which the bindings for CUDA 13 know nothing.
    unsafe {
        let library = sys::culib();
        let newer = library.get::<Function>(b"cuEventElapsedTime_v2\0");
        let function = newer.or_else(|_| library.get::<Function>(b"cuEventElapsedTime\0"));
        let function = function.map_err(|_| DriverError(CUresult::CUDA_ERROR_NOT_FOUND))?;
        let mut milliseconds = 0.0;
        function(&mut milliseconds, from, to).result()?;
        Ok(milliseconds)
    }
}

/// A device's primary context, released with its owner.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

impl Context {
    /// Device `ordinal`, checked.
    pub(crate) fn open(ordinal: usize) -> Result<(Context, DeviceInfo)> {
        let asked = format!("cuda:{ordinal}");
        let count = initialise(&asked)?;
        if ordinal >= count {
            let found = if count == 1 { "one device, cuda:0".into() } else { format!("{count} devices, from cuda:0") };
            return Err(unusable(&asked, &format!("found {found}")));
        }
        let broken = |error| unusable(&asked, &format!("{}; {}", describe(error), remedy(error)));
        let device = Gpu::get(ordinal).map_err(broken)?;
        let (major, minor) = device.capability;
        let Some(arch) = Arch::of(major) else {
            let expected = "expected 8.0 or newer with kernels of sm_80, sm_90a, sm_100 or sm_120";
            return Err(unusable(&asked, &format!("{}: compute capability {major}.{minor}, {expected}", device.name)));
        };
        let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let info = DeviceInfo {
            name: format!("{asked} {}", device.name),
            arch,
            multiprocessors: device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(broken)?,
            shared_per_block: device.attribute(shared).map_err(broken)?,
            memory: device.memory,
        };
        // SAFETY: the handle comes from the driver.
        let raw = unsafe { result::primary_ctx::retain(device.handle) }.map_err(broken)?;
        Ok((Context { device: device.handle, raw }, info))
    }

    /// Makes it the calling thread's: every call of the driver is about the current context.
    pub(crate) fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.raw) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once. After a fault there is nothing left to do about an error.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_release_is_read() {
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version:  gcc version 12.2.0\n";
        assert_eq!(release(text).as_deref(), Some("550.54.14"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n";
        assert_eq!(release(open).as_deref(), Some("580.82.07"));
        assert_eq!(release(""), None);
    }
}
