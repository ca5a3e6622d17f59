//! `--device`: what was asked for, and what there is. Never another device than the one that was named.

use std::fmt;
use std::str::FromStr;

use crate::backend::cuda::compiler::KernelOptions;
use crate::backend::cuda::device::{GpuDriver, driver_present};
use crate::backend::cuda::driver::Arch;
use crate::backend::cuda::sim::SimDriver;
use crate::backend::{Backend, Cpu, Cuda};
use crate::error::{Error, Result};

/// `--device` as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceSpec {
    Auto,
    Cpu,
    Cuda(usize),
    Sim(Arch),
}

/// A device that can be used: opened.
#[derive(Clone)]
pub(crate) enum Device {
    Cpu,
    Cuda(Cuda),
}

/// Evaluates `$work` with the backend of a device as `$ops`: the program's one choice of a backend.
macro_rules! on_device {
    ($device:expr, |$ops:ident| $work:expr) => {
        match $device {
            $crate::cli::device::Device::Cpu => {
                let $ops = &$crate::backend::Cpu::new();
                $work
            }
            $crate::cli::device::Device::Cuda(cuda) => {
                let $ops = &cuda;
                $work
            }
        }
    };
}

pub(crate) use on_device;

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str(&Cpu::new().describe()),
            Device::Cuda(cuda) => f.write_str(&cuda.info().name),
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
    pub(crate) fn resolve(self, options: KernelOptions) -> Result<(Device, String)> {
        let cpu = Device::Cpu;
        match self {
            DeviceSpec::Auto if !driver_present() => Ok((cpu, "no CUDA driver found".to_string())),
            DeviceSpec::Auto => Ok(match GpuDriver::open(0, options.clone()) {
                Ok(driver) => {
                    (Device::Cuda(Cuda::with_tier(driver, options.tier.as_deref())?), "the first GPU".to_string())
                }
                Err(error) => (cpu, format!("the GPU cannot be used: {error}")),
            }),
            named => Ok((named.cuda(options)?.map_or(cpu, Device::Cuda), "as asked".to_string())),
        }
    }

    /// The GPU or simulator that was named, if one was.
    pub(crate) fn cuda(self, options: KernelOptions) -> Result<Option<Cuda>> {
        let driver = match self {
            DeviceSpec::Cuda(n) => GpuDriver::open(n, options.clone())?,
            DeviceSpec::Sim(arch) => SimDriver::open(arch, &options, None)?,
            DeviceSpec::Auto | DeviceSpec::Cpu => return Ok(None),
        };
        Cuda::with_tier(driver, options.tier.as_deref()).map(Some)
    }
}

/// Makes the thread that calls one of the pool's workers: an operation then begins at once, where it would otherwise wake a worker
/// and sleep until that one has finished, which for a small model costs as much as the work. Fails where the system starts no
/// threads, and where the pool was used before, which would start it without this thread.
pub(crate) fn join_pool() -> Result<()> {
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().map_err(Error::threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_the_device_has_not_is_refused() {
        let open = |arch, tier: Option<&str>| {
            let options = KernelOptions { tier: tier.map(str::to_string), ..KernelOptions::default() };
            DeviceSpec::Sim(arch).cuda(options)
        };
        let Ok(plain) = open(Arch::Sm90a, None) else { return };
        assert_eq!(plain.unwrap().info().name, "sim:sm_90a");
        assert_eq!(open(Arch::Sm90a, Some("sm_90a")).unwrap().unwrap().info().name, "sim:sm_90a, tier sm_90a");
        for (arch, tier) in
            [(Arch::Sm80, "sm_90a"), (Arch::Sm100, "sm_90a"), (Arch::Sm90a, "sm_100"), (Arch::Sm90a, "hopper")]
        {
            let expected = format!("expected sm_80, or sm_90a on a device of sm_90a, found {tier} on sim:{arch}");
            crate::error::refused(open(arch, Some(tier)), &expected);
        }
    }

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
}
