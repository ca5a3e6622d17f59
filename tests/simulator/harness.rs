//! Kernels of the tests' own, and launches without launchers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use crate::memory::{download, upload};
use ares::Result;
use ares::backend::cuda::compiler::KernelOptions;
use ares::backend::cuda::driver::{Arch, Driver, LaunchConfig};
use ares::backend::cuda::sim::SimDriver;
use ares::backend::cuda::source::{Source, inline, signatures, trampolines};

/// Orders of fibers and blocks that everything is tried with.
pub const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// A simulated GPU, or `None` without a compiler; printed, or refused with ARES_REQUIRE_SIM=1.
pub fn device(seed: u64) -> Option<Arc<dyn Driver>> {
    device_of(Arch::Sm80, seed)
}

pub fn device_of(arch: Arch, seed: u64) -> Option<Arc<dyn Driver>> {
    match SimDriver::open(arch, &KernelOptions::default(), Some(seed)) {
        Ok(driver) => Some(driver),
        Err(reason) => {
            assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{reason}");
            println!("skipped: no C++ compiler ({reason})");
            None
        }
    }
}

/// A file below `tests/`.
pub fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file)
}

/// The same, as `build.rs` embeds those of `kernels/`.
pub fn source(name: &str) -> &'static Source {
    let body = fs::read_to_string(path(name)).expect("readable");
    source_of(name.rsplit('/').next().expect("a name"), &body)
}

/// Of a text.
pub fn source_of(file: &str, body: &str) -> &'static Source {
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()));
    let header = |header: &str| read(path("../kernels").join(header));
    let inlined = inline(file, body, &mut Vec::new(), &header).expect("headers");
    let found = signatures(file, body).expect("kernels");
    let kernels: Vec<&'static str> = found.iter().map(|s| &*s.name.clone().leak()).collect();
    let text = inlined + &trampolines(&found);
    Box::leak(Box::new(Source { file: file.to_string().leak(), text: text.leak(), kernels: kernels.leak() }))
}

/// Launches one kernel of a source.
pub fn launch(
    driver: &Arc<dyn Driver>,
    source: &'static Source,
    kernel: &str,
    config: LaunchConfig,
    args: &[u64],
) -> Result<()> {
    let args: Vec<&[u8]> = args.iter().map(bytemuck::bytes_of).collect();
    launch_bytes(driver, source, kernel, config, &args)
}

/// With arguments that are not all words.
pub fn launch_bytes(
    driver: &Arc<dyn Driver>,
    source: &'static Source,
    kernel: &str,
    config: LaunchConfig,
    args: &[&[u8]],
) -> Result<()> {
    let name = source.kernels.iter().find(|k| **k == kernel).expect("a kernel of this file");
    let function = driver.load(source, &[], name)?;
    // SAFETY: memory is the simulator's, which looks at every access.
    unsafe { driver.launch(function, config, args) }
}

/// Different numbers, in no order.
pub fn scrambled(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i.wrapping_add(seed)).wrapping_mul(0x9e37_79b1) ^ (i << 7)).collect()
}
