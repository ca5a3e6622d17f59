//! `ares doctor`: what this machine offers.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::Session;
use super::device::{DeviceSpec, open_cuda, open_sim};
use crate::backend::cuda::cache::cache_path;
use crate::backend::cuda::device::{devices, driver_version};
use crate::backend::cuda::nvrtc::Nvrtc;
use crate::backend::cuda::sim::Toolchain;
use crate::error::Result;
use crate::ops::ceilings::{self, Ceilings};
use crate::report::{Align, Table};

/// Look at this machine: devices, driver, compilers, memory, and how fast they are (a GPU with --device cuda)
#[derive(Debug, Args)]
pub(crate) struct Doctor {}

/// What was found; what cannot be known here is null.
#[derive(Debug, Serialize)]
struct Machine {
    version: &'static str,
    system: String,
    cpu: Option<String>,
    cores: usize,
    memory_bytes: Option<u64>,
    memory_free_bytes: Option<u64>,
    bandwidth_gb_s: f64,
    matrix_gflop_s: f64,
    cuda_driver: Option<String>,
    gpus: Vec<String>,
    /// Why there is none, or none that can be used.
    gpu_fault: Option<String>,
    nvrtc: Option<String>,
    nvrtc_fault: Option<String>,
    /// With a GPU named: what it is and what it can do at best.
    device: Option<String>,
    ceilings: Option<Ceilings>,
    compiler: Option<String>,
    cache: PathBuf,
    cache_exists: bool,
}

impl Doctor {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        session.detail("measuring memory bandwidth and matrix rate");
        let cache = cache_path();
        let driver = driver_version();
        let gpus = devices();
        let nvrtc = Nvrtc::find(session.kernels().nvrtc.as_deref(), driver.as_ref());
        let cuda = match session.device_spec() {
            DeviceSpec::Cuda(ordinal) => Some(open_cuda(ordinal, session.kernels())?),
            DeviceSpec::Sim(arch) => Some(open_sim(arch, &session.kernels())?),
            DeviceSpec::Auto | DeviceSpec::Cpu => None,
        };
        let measured = cuda.as_ref().map(ceilings::measure).transpose()?;
        let rates = ceilings::cpu_rates();
        let findings = Machine {
            version: env!("CARGO_PKG_VERSION"),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: first_value("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory("MemTotal"),
            memory_free_bytes: memory("MemAvailable"),
            bandwidth_gb_s: rates.copy_bytes_per_s / 1e9,
            matrix_gflop_s: rates.matrix_flops_per_s / 1e9,
            cuda_driver: driver.map(|driver| driver.to_string()),
            gpu_fault: gpus.as_ref().err().map(ToString::to_string),
            gpus: gpus.unwrap_or_default(),
            nvrtc_fault: nvrtc.as_ref().err().map(ToString::to_string),
            nvrtc: nvrtc.ok().map(|nvrtc| nvrtc.to_string()),
            ceilings: measured.filter(|_| cuda.as_ref().is_some_and(|cuda| !cuda.info().is_simulated())),
            device: cuda.map(|cuda| cuda.info().name.clone()),
            compiler: Toolchain::find().ok().map(|toolchain| toolchain.version().to_string()),
            cache_exists: cache.is_dir(),
            cache,
        };
        session.inform(&findings.table(), &findings)
    }
}

impl Machine {
    fn table(&self) -> Table {
        let unknown = || "unknown".to_string();
        let gib =
            |bytes: Option<u64>| bytes.map_or_else(unknown, |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64));
        let or_fault = |found: &Option<String>, fault: &Option<String>| match (found, fault) {
            (Some(found), _) => found.clone(),
            (None, fault) => format!("none: {}", fault.as_deref().unwrap_or("nobody knows why")),
        };
        let gpus = Some(self.gpus.join("; ")).filter(|gpus| !gpus.is_empty());
        let made = if self.cache_exists { "" } else { " (not made yet)" };
        let driver = self.cuda_driver.clone();
        let gpus = match driver {
            Some(_) => or_fault(&gpus, &self.gpu_fault),
            None => "none (needs a CUDA driver)".into(),
        };
        let mut rows = vec![
            ("ares", self.version.to_string()),
            ("system", self.system.clone()),
            ("cpu", self.cpu.clone().unwrap_or_else(unknown)),
            ("cores", self.cores.to_string()),
            ("memory", format!("{}, {} free", gib(self.memory_bytes), gib(self.memory_free_bytes))),
            ("memory bandwidth", format!("{:.1} GB/s (copy, read + write)", self.bandwidth_gb_s)),
            ("matrix rate", format!("{:.0} GFLOP/s (f32 multiply-adds, all threads)", self.matrix_gflop_s)),
            ("CUDA driver", driver.unwrap_or_else(|| "none; --device cpu works without".to_string())),
            ("GPUs", gpus),
            ("NVRTC", or_fault(&self.nvrtc, &self.nvrtc_fault)),
            ("C++ compiler", self.compiler.clone().unwrap_or_else(|| "none; only --device sim needs it".to_string())),
            ("cache", format!("{}{made}", self.cache.display())),
        ];
        rows.extend(self.device.clone().map(|device| ("runs kernels", device)));
        if let Some(Ceilings { copy_bytes_per_s, mma_flops_per_s, launch_us, replayed_launch_us }) = self.ceilings {
            rows.push(("device copy", format!("{:.0} GB/s (read + write)", copy_bytes_per_s / 1e9)));
            rows.push(("mma.sync", format!("{:.1} TFLOP/s (bf16, random operands)", mma_flops_per_s / 1e12)));
            rows.push(("launch", format!("{launch_us:.2} µs, replayed {replayed_launch_us:.2} µs")));
        }
        let mut table = Table::new(&[("what", Align::Left), ("found", Align::Left)]);
        rows.into_iter().for_each(|(what, found)| table.row(vec![what.into(), found.into()]));
        table
    }
}

/// The text after the colon of the first line that begins with `key`.
fn first_value(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Bytes, where the system says so as Linux does.
fn memory(key: &str) -> Option<u64> {
    let kilobytes: u64 = first_value("/proc/meminfo", key)?.strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kilobytes)
}
