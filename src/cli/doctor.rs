//! `ares doctor`: what this machine offers.

use std::hint::black_box;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use serde::Serialize;

use super::{Session, device};
use crate::backend::cuda::cache::cache_path;
use crate::error::Result;
use crate::ops::product::{View, ViewMut, product};
use crate::report::{Align, Table};

/// Look at this machine: devices, driver, compilers, memory, and how fast they are
#[derive(Debug, Args)]
pub struct Doctor {}

/// What was found; what cannot be known here is null.
#[derive(Debug, Serialize)]
struct Findings {
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
    nvrtc: bool,
    compiler: Option<String>,
    cache: PathBuf,
    cache_exists: bool,
}

impl Doctor {
    pub fn run(self, session: &Session) -> Result<()> {
        session.detail("measuring memory bandwidth and matrix rate");
        let cache = cache_path();
        let (cuda_driver, gpus) = device::gpus();
        let findings = Findings {
            version: env!("CARGO_PKG_VERSION"),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: first_value("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory("MemTotal"),
            memory_free_bytes: memory("MemAvailable"),
            bandwidth_gb_s: bandwidth() / 1e9,
            matrix_gflop_s: matrix_rate()? / 1e9,
            cuda_driver,
            gpus,
            nvrtc: device::nvrtc_present(),
            compiler: compiler(),
            cache_exists: cache.is_dir(),
            cache,
        };
        session.inform(&findings.table(), &findings)
    }
}

impl Findings {
    fn table(&self) -> Table {
        let unknown = || "unknown".to_string();
        let gib =
            |bytes: Option<u64>| bytes.map_or_else(unknown, |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64));
        let gpus = match (&self.cuda_driver, self.gpus.as_slice()) {
            (None, _) => "none (needs a CUDA driver)".to_string(),
            (Some(_), []) => "none".to_string(),
            (Some(_), gpus) => gpus.join("; "),
        };
        let made = if self.cache_exists { "" } else { " (not made yet)" };
        let cache = format!("{}{made}", self.cache.display());
        let rows = [
            ("ares", self.version.to_string()),
            ("system", self.system.clone()),
            ("cpu", self.cpu.clone().unwrap_or_else(unknown)),
            ("cores", self.cores.to_string()),
            ("memory", format!("{}, {} free", gib(self.memory_bytes), gib(self.memory_free_bytes))),
            ("memory bandwidth", format!("{:.1} GB/s (copy, read + write)", self.bandwidth_gb_s)),
            ("matrix rate", format!("{:.0} GFLOP/s (f32, {SIDE}×{SIDE}×{SIDE})", self.matrix_gflop_s)),
            ("CUDA driver", self.cuda_driver.clone().unwrap_or_else(|| "none; --device cpu works without".to_string())),
            ("GPUs", gpus),
            ("NVRTC", if self.nvrtc { "found" } else { "none; only GPU kernels need it" }.to_string()),
            ("C++ compiler", self.compiler.clone().unwrap_or_else(|| "none; only --device sim needs it".to_string())),
            ("cache", cache),
        ];
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

/// Bytes, where the system tells them as Linux does.
fn memory(key: &str) -> Option<u64> {
    let kilobytes: u64 = first_value("/proc/meminfo", key)?.strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kilobytes)
}

/// The first C++ compiler that answers, and its version.
fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let names = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]);
    names.filter(|name| !name.is_empty()).find_map(|name| {
        let output = Command::new(name).arg("--version").output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_string())
    })
}

/// The best of `n` runs, in seconds: other processes only ever make it slower.
fn best(n: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..n {
        let begin = Instant::now();
        work()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Bytes per second of a copy on all cores, each byte read and each byte written counted once.
fn bandwidth() -> f64 {
    /// Beyond the caches of today's machines.
    const FLOATS: usize = 1 << 25;
    const PART: usize = 1 << 20;
    let from = vec![1f32; FLOATS];
    let mut to = vec![0f32; FLOATS];
    let copy = || {
        to.par_chunks_mut(PART).zip(from.par_chunks(PART)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&to);
        Ok(())
    };
    best(5, copy).map_or(0.0, |seconds| 2.0 * 4.0 * FLOATS as f64 / seconds)
}

const SIDE: usize = 1024;

/// Floating-point operations per second of the engine's own matrix product.
fn matrix_rate() -> Result<f64> {
    let (a, b) = (vec![0.5f32; SIDE * SIDE], vec![0.25f32; SIDE * SIDE]);
    let mut c = vec![0f32; SIDE * SIDE];
    let seconds = best(8, || {
        let view = |data| View::new(data, SIDE, SIDE, SIDE);
        product(ViewMut::new(&mut c, SIDE, SIDE, SIDE), view(&a), view(&b), false);
        black_box(&c);
        Ok(())
    })?;
    Ok(2.0 * (SIDE as f64).powi(3) / seconds)
}
