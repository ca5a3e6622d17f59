//! `--device`: what was asked for, and what there is. Never another device than the one that was named.

use std::fmt;
use std::str::FromStr;

use crate::backend::Cpu;
use crate::error::{Error, Result};
use crate::ops::Ops;

/// `--device` as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSpec {
    Auto,
    Cpu,
    Cuda(usize),
    Sim(Arch),
}

/// The architecture whose kernels the simulator runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    Sm80,
    Sm90a,
}

/// A device that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu { threads: usize },
}

/// Work that is written once for all devices.
pub trait OnDevice {
    type Output;

    fn run<B: Ops>(self, ops: &B) -> Result<Self::Output>;
}

impl Device {
    /// The program's one choice of a backend.
    pub fn run<W: OnDevice>(self, work: W) -> Result<W::Output> {
        match self {
            Device::Cpu { .. } => work.run(&Cpu::new()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu { threads } => write!(f, "cpu ({threads} threads)"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceSpec, String> {
        let (name, detail) = text.split_once(':').map_or((text, None), |(name, detail)| (name, Some(detail)));
        match (name, detail) {
            ("auto", None) => Ok(DeviceSpec::Auto),
            ("cpu", None) => Ok(DeviceSpec::Cpu),
            ("cuda", None) => Ok(DeviceSpec::Cuda(0)),
            ("cuda", Some(n)) => n.parse().map(DeviceSpec::Cuda).map_err(|_| format!("{n:?} is no device number")),
            ("sim", None | Some("sm_80")) => Ok(DeviceSpec::Sim(Arch::Sm80)),
            ("sim", Some("sm_90a")) => Ok(DeviceSpec::Sim(Arch::Sm90a)),
            _ => Err("expected auto, cpu, cuda, cuda:N, sim, sim:sm_80 or sim:sm_90a".to_string()),
        }
    }
}

impl DeviceSpec {
    /// The device, and for `auto` the reason why this one.
    pub fn resolve(self) -> Result<(Device, &'static str)> {
        join_pool();
        let cpu = Device::Cpu { threads: rayon::current_num_threads() };
        match self {
            DeviceSpec::Cpu => Ok((cpu, "as asked")),
            DeviceSpec::Auto if driver_present() => Ok((cpu, "this version computes on the CPU only")),
            DeviceSpec::Auto => Ok((cpu, "no CUDA driver found")),
            DeviceSpec::Cuda(n) if !driver_present() => {
                Err(Error::NoDevice(format!("cuda:{n}: expected a CUDA driver (libcuda), found none")))
            }
            DeviceSpec::Cuda(n) => Err(Error::NoDevice(format!("cuda:{n}: this version computes on the CPU only"))),
            DeviceSpec::Sim(_) => Err(Error::NoDevice("sim: this version computes on the CPU only".to_string())),
        }
    }
}

/// Makes the thread that calls one of the pool's workers: an operation then begins at once, where it would otherwise wake a worker
/// and sleep until that one has finished, which for a small model costs as much as the work.
fn join_pool() {
    // An error says that the pool is there already; it serves as it is.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
}

/// Whether the CUDA driver's library can be loaded. Asked before any other call to it, which would panic without.
pub fn driver_present() -> bool {
    // SAFETY: loads libcuda, whose initialisation has no precondition.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Whether NVRTC's library can be loaded; see [`driver_present`].
pub fn nvrtc_present() -> bool {
    // SAFETY: loads libnvrtc, whose initialisation has no precondition.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// The driver's version and its devices, as people read them; `None` without a driver.
pub fn gpus() -> (Option<String>, Vec<String>) {
    if !driver_present() {
        return (None, Vec::new());
    }
    let mut version = 0;
    // SAFETY: the library was loaded; the call writes one integer and needs no initialisation.
    let known = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    let version = if known { format!("CUDA {}.{}", version / 1000, version % 1000 / 10) } else { "found".to_string() };
    (Some(version), list_gpus().unwrap_or_default())
}

fn list_gpus() -> Result<Vec<String>, cudarc::driver::DriverError> {
    use cudarc::driver::result::{device, init};
    init()?;
    let describe = |number| {
        let handle = device::get(number)?;
        // SAFETY: the handle comes from the driver.
        let bytes = unsafe { device::total_mem(handle)? };
        Ok(format!("cuda:{number} {} ({:.1} GiB)", device::get_name(handle)?, bytes as f64 / (1u64 << 30) as f64))
    };
    (0..device::get_count()?).map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_typed() {
        let parsed = |text: &str| text.parse::<DeviceSpec>();
        assert_eq!(parsed("auto"), Ok(DeviceSpec::Auto));
        assert_eq!(parsed("cuda"), Ok(DeviceSpec::Cuda(0)));
        assert_eq!(parsed("cuda:3"), Ok(DeviceSpec::Cuda(3)));
        assert_eq!(parsed("sim:sm_90a"), Ok(DeviceSpec::Sim(Arch::Sm90a)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "sim:sm_75", "auto:1"] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_named_device_is_never_replaced() {
        assert!(DeviceSpec::Sim(Arch::Sm80).resolve().is_err());
        let error = DeviceSpec::Cuda(0).resolve().unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("--device cpu"), "{error}");
    }
}
