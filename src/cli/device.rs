//! `--device`: what was asked for, and what there is. Never another device than the one that was named.

use std::fmt;
use std::str::FromStr;

use crate::backend::cuda::compiler::KernelOptions;
use crate::backend::cuda::device::{GpuDriver, driver_present};
use crate::backend::cuda::driver::Arch;
use crate::backend::cuda::sim::SimDriver;
use crate::backend::{Cpu, Cuda};
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
            ("sim", None) => Ok(DeviceSpec::Sim(Arch::Sm80)),
            ("sim", Some(arch)) => arch.parse().map(DeviceSpec::Sim),
            _ => Err("expected auto, cpu, cuda, cuda:N, sim or sim:ARCH".to_string()),
        }
    }
}

impl DeviceSpec {
    /// The device, and for `auto` the reason why this one.
    pub fn resolve(self) -> Result<(Device, &'static str)> {
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

/// GPU `ordinal`, ready to compute.
pub fn open_cuda(ordinal: usize, options: KernelOptions) -> Result<Cuda> {
    Ok(Cuda::new(GpuDriver::new(ordinal, options)?))
}

/// The simulator of an architecture, ready to compute.
pub fn open_sim(arch: Arch, options: &KernelOptions) -> Result<Cuda> {
    Ok(Cuda::new(SimDriver::with_options(arch, options)?))
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
