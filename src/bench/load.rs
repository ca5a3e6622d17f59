//! Loading: a checkpoint's headers, its weights onto the device, and compiled kernels.

use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::Workload;
use super::timing::{Spread, repeated};
use crate::backend::cuda::cache::Cache;
use crate::backend::cuda::compiler::{Compiler, KernelOptions};
use crate::backend::cuda::device::driver_version;
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::model::{Checkpoint, ModelConfig, Transformer};
use crate::ops::{Ops, builds};

/// One checkpoint's.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CheckpointLoad {
    pub(crate) model: String,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    /// Until every name, dtype and shape was checked: headers alone are read.
    pub(crate) open_seconds: Spread,
    /// From then until all weights lie on the device as it multiplies them.
    pub(crate) upload_seconds: Spread,
    pub(crate) upload_bytes_per_second: f64,
}

/// Of all compiled kernels, by a device whose context exists.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct KernelLoad {
    pub(crate) files: usize,
    pub(crate) kernels: usize,
    pub(crate) seconds: f64,
}

/// Opens and uploads the checkpoint in `dir`, again and again; nothing drops it from the system's cache of files in between.
pub(crate) fn checkpoint<B: Ops>(ops: &B, dir: &Path, load: &Workload) -> Result<CheckpointLoad> {
    let last = Tensor::<B, f32>::zeros(ops, 1, 1)?;
    let runs = repeated(load, |_| {
        let begin = Instant::now();
        let config = ModelConfig::open(dir)?;
        let checkpoint = Checkpoint::open(dir, &config)?;
        let open = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let model = Transformer::load(ops, config, &checkpoint)?;
        // Waits for what was queued.
        last.read(ops)?;
        let upload = begin.elapsed().as_secs_f64();
        drop(model);
        Ok(([open, upload], checkpoint.files().count(), checkpoint.bytes()))
    })?;
    let spread = |part: usize| Spread::of(runs.iter().map(|(seconds, ..)| seconds[part]).collect());
    let ((_, files, bytes), upload_seconds) = (&runs[0], spread(1));
    Ok(CheckpointLoad {
        model: dir.display().to_string(),
        files: *files,
        bytes: *bytes,
        open_seconds: spread(0),
        upload_seconds,
        upload_bytes_per_second: *bytes as f64 / upload_seconds.median,
    })
}

/// Loads every kernel with the constants of typical models; those that are not in the cache or the pack are compiled before the
/// clock starts. `None` on the simulator. To be asked of a device that has loaded none.
pub(crate) fn kernels(cuda: &Cuda, options: KernelOptions) -> Result<Option<KernelLoad>> {
    if cuda.info().is_simulated() {
        return Ok(None);
    }
    let arch = cuda.info().arch;
    let builds: Vec<_> = builds().into_iter().filter(|build| build.serves(arch)).collect();
    let compiler = Compiler::new(options, driver_version(), Cache::user()?)?;
    builds.par_iter().try_for_each(|build| compiler.compile(build.source, &build.defines, arch).map(drop))?;
    let begin = Instant::now();
    let mut kernels = 0;
    for build in &builds {
        for kernel in build.source.kernels {
            cuda.driver().load(build.source, &build.defines, kernel)?;
            kernels += 1;
        }
    }
    Ok(Some(KernelLoad { files: builds.len(), kernels, seconds: begin.elapsed().as_secs_f64() }))
}
