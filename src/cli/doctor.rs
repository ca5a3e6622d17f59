//! `ares doctor`: what this machine offers.

use clap::Args;
use serde_json::json;

use super::Session;
use crate::backend::cpu::{processor, second_cache};
use crate::backend::cuda::cache::cache_path;
use crate::backend::cuda::device::{devices, driver_version};
use crate::backend::cuda::nvrtc::Nvrtc;
use crate::backend::cuda::pack;
use crate::backend::cuda::sim::Toolchain;
use crate::error::Result;
use crate::ops::ceilings::{self, Ceilings};
use crate::report::{Align, Table};

/// Look at this machine: devices, driver, compilers, memory, and how fast they are (a GPU with --device cuda)
#[derive(Debug, Args)]
pub(crate) struct Doctor {}

impl Doctor {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        session.detail("measuring memory bandwidth and matrix rate");
        let cache = cache_path();
        let driver = driver_version();
        let gpus = devices();
        let nvrtc = Nvrtc::find(session.kernels().nvrtc.as_deref(), driver.as_ref());
        let cuda = session.device.cuda(session.kernels())?;
        let measured = cuda.as_ref().map(ceilings::measure).transpose()?;
        let rates = ceilings::cpu_rates();
        let (version, cores) = (env!("CARGO_PKG_VERSION"), std::thread::available_parallelism().map_or(1, usize::from));
        let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
        let cpu = processor();
        let memory = ["MemTotal", "MemAvailable"].map(memory);
        let (bandwidth, matrix) = (rates.copy_bytes_per_s / 1e9, rates.matrix_flops_per_s / 1e9);
        let driver = driver.map(|driver| driver.to_string());
        let gpu_fault = gpus.as_ref().err().map(ToString::to_string);
        let gpus = gpus.unwrap_or_default();
        let nvrtc_fault = nvrtc.as_ref().err().map(ToString::to_string);
        let nvrtc = nvrtc.ok().map(|nvrtc| nvrtc.to_string());
        let carried = pack::carried()?;
        let compiler = Toolchain::find().ok().map(|toolchain| toolchain.version);
        let ceilings = measured.filter(|_| cuda.as_ref().is_some_and(|cuda| !cuda.info().is_simulated()));
        let served = cuda.as_ref().map(|cuda| cuda.served_by().to_string());
        let device = cuda.map(|cuda| cuda.info().name.clone());
        // What cannot be known here is null; `device` and `ceilings` are those of a GPU that was named.
        let found = json!({
            "version": version, "system": system, "cpu": cpu, "cores": cores, "second_cache_bytes": second_cache(), "memory_bytes": memory[0],
            "memory_free_bytes": memory[1], "bandwidth_gb_s": bandwidth, "matrix_gflop_s": matrix, "cuda_driver": driver,
            "gpus": gpus, "gpu_fault": gpu_fault, "nvrtc": nvrtc, "nvrtc_fault": nvrtc_fault, "kernels_carried": carried, "device": device, "served_by": served,
            "ceilings": ceilings, "compiler": compiler, "cache": cache, "cache_exists": cache.is_dir(),
        });
        let unknown = || "unknown".to_string();
        let gib =
            |bytes: Option<u64>| bytes.map_or_else(unknown, |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64));
        let or_fault = |found: Option<String>, fault: Option<String>| {
            found.unwrap_or_else(|| format!("none: {}", fault.as_deref().unwrap_or("nobody knows why")))
        };
        let gpus = Some(gpus.join("; ")).filter(|gpus| !gpus.is_empty());
        let gpus = match driver {
            Some(_) => or_fault(gpus, gpu_fault),
            None => "none (needs a CUDA driver)".into(),
        };
        let made = if cache.is_dir() { "" } else { " (not made yet)" };
        let mut rows = vec![
            ("ares", version.to_string()),
            ("system", system),
            ("cpu", cpu),
            ("cores", format!("{cores}, second cache {} KiB each", second_cache() >> 10)),
            ("memory", format!("{}, {} free", gib(memory[0]), gib(memory[1]))),
            ("memory bandwidth", format!("{bandwidth:.1} GB/s (copy, read + write)")),
            ("matrix rate", format!("{matrix:.0} GFLOP/s (f32 multiply-adds, all threads)")),
            ("CUDA driver", driver.unwrap_or_else(|| "none; --device cpu works without".to_string())),
            ("GPUs", gpus),
            ("NVRTC", or_fault(nvrtc, nvrtc_fault)),
            (
                "kernels inside",
                if carried > 0 { format!("{carried} files") } else { "none: a build, no release".into() },
            ),
            ("C++ compiler", compiler.unwrap_or_else(|| "none; only --device sim needs it".to_string())),
            ("cache", format!("{}{made}", cache.display())),
        ];
        rows.extend(device.map(|device| ("runs kernels", device)));
        rows.extend(served.map(|served| ("kernels are", served)));
        rows.extend(ceilings.iter().flat_map(limits));
        let mut table = Table::new(&[("what", Align::Left), ("found", Align::Left)]);
        rows.into_iter().for_each(|(what, found)| table.row(vec![what.into(), found.into()]));
        session.inform(&table, &found)
    }
}

/// What a GPU can do at best.
fn limits(found: &Ceilings) -> Vec<(&'static str, String)> {
    let Ceilings { copy_bytes_per_s, mma_flops_per_s, launch_us, replayed_launch_us, hopper } = found;
    let mut limits = vec![
        ("device copy", format!("{:.0} GB/s (read + write)", copy_bytes_per_s / 1e9)),
        ("mma.sync", format!("{:.1} TFLOP/s (bf16, random operands)", mma_flops_per_s / 1e12)),
        ("launch", format!("{launch_us:.2} µs, replayed {replayed_launch_us:.2} µs")),
    ];
    for rate in hopper.iter().flat_map(|hopper| &hopper.products) {
        let (tera, side) = (rate.flops_per_s / 1e12, if rate.across { "across" } else { "along" });
        let left = if rate.held { ", left operand in registers" } else { "" };
        let found = format!("{tera:.1} TFLOP/s (64 × {} × 16, {side}{left}), {:.1} cycles", rate.n, rate.cycles);
        limits.push(("wgmma", found));
    }
    for rate in hopper.iter().flat_map(|hopper| &hopper.boxes) {
        let tera = rate.bytes_per_s / 1e12;
        limits.push((
            "boxes from L2",
            format!("{tera:.2} TB/s by {}, {:.1} bytes per cycle", rate.cluster, rate.bytes_per_cycle),
        ));
    }
    limits.extend(hopper.iter().map(|hopper| ("2^x", format!("{:.1} per cycle", hopper.exp2_per_cycle))));
    limits
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
