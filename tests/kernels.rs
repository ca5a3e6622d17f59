//! Every kernel compiles for every architecture without spills, and fits a multiprocessor as often as its plan relies on.
//!
//! Needs libnvrtc, no GPU; without it these tests are skipped, unless ARES_REQUIRE_NVRTC=1.

use std::fs;
use std::path::Path;
use std::process::Command;

use ares::backend::cuda::cache::Cache;
use ares::backend::cuda::compiler::{Compiler, KernelOptions, Origin};
use ares::backend::cuda::driver::Arch;
use ares::backend::cuda::kernels::{NORM, SOURCES};
use ares::backend::cuda::source::Source;
use ares::backend::cuda::usage::parse;
use ares::ops::builds;
use serde_json::Value;

/// A compiler that keeps what it makes in `folder`, if this machine has one.
fn compiler(folder: &Path) -> Option<Compiler> {
    let compiler = Compiler::new(KernelOptions::default().or_environment(), None, Cache::at(folder.into())).unwrap();
    match compiler.check() {
        Ok(()) => Some(compiler),
        Err(error) if std::env::var_os("ARES_REQUIRE_NVRTC").is_none_or(|value| value != "1") => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// By the command that a user has for it. What it compiles is kept from run to run: an entry's key holds all it is made from.
#[test]
fn all_fit_every_architecture() {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let Some(_) = compiler(&kept) else { return };
    let builds = builds().len();
    for arch in Arch::ALL {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ares"));
        command.args(["kernels", "--check", "--json", "--arch", &arch.to_string()]).env("ARES_CACHE", &kept);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{arch}: {}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let (kernels, number) = (found["kernels"].as_array().unwrap(), |v: &Value| v.as_u64().unwrap());
        println!("{arch}: {} kernels of {builds} builds, {} compiled anew", kernels.len(), found["files_compiled"]);
        for kernel in kernels {
            assert_eq!((number(&kernel["spills"]), number(&kernel["stack"])), (0, 0), "{kernel}");
            assert!(number(&kernel["blocks"]) >= number(&kernel["blocks_planned"]).max(1), "{kernel}");
        }
        assert!(kernels.len() >= builds);
    }
}

#[test]
fn every_kernel_is_built() {
    let builds = builds();
    for source in SOURCES {
        assert!(builds.iter().any(|build| build.source == *source), "{} has no build: see ops::builds", source.file);
    }
    for build in &builds {
        let mut budgets: Vec<&str> = build.budgets.iter().map(|budget| budget.kernel).collect();
        let mut kernels = build.source.kernels.to_vec();
        budgets.sort_unstable();
        kernels.sort_unstable();
        assert_eq!(budgets, kernels, "{}", build.source.file);
    }
}

#[test]
fn spills_and_local_memory_are_seen() {
    // 200 sums in 64 registers, and an array indexed by data.
    static SOURCE: Source = Source {
        file: "planted.cu",
        text: "extern \"C\" __global__ void __launch_bounds__(1024) spilling(float* y) {
            float sum[200];
            #pragma unroll
            for (int i = 0; i < 200; i++) sum[i] = y[i];
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < 200; i++) y[i + threadIdx.x] = sum[i] * sum[199 - i];
        }
        extern \"C\" __global__ void stacked(float* y, const int* at) {
            float kept[64];
            for (int i = 0; i < 64; i++) kept[at[i]] = y[i];
            y[0] = kept[at[64]];
        }",
        kernels: &["spilling", "stacked"],
    };
    let folder = tempfile::tempdir().unwrap();
    let Some(compiler) = compiler(folder.path()) else { return };
    for arch in Arch::ALL {
        let (_, cubin, _) = compiler.compile(&SOURCE, &[], arch).unwrap();
        let usages = parse(&cubin.log);
        assert!(usages.len() == 2 && usages[0].spills > 0 && usages[1].stack >= 256, "{arch} {usages:?}");
        assert!(usages.iter().all(|usage| !usage.is_clean()));
    }
}

#[test]
fn an_error_names_file_and_line() {
    static SOURCE: Source =
        Source { file: "wrong.cu", text: "#line 7 \"kernels/wrong.cu\"\nint x = y;\n", kernels: &[] };
    let folder = tempfile::tempdir().unwrap();
    let Some(compiler) = compiler(folder.path()) else { return };
    let error = compiler.compile(&SOURCE, &[("N", 3)], Arch::Sm80).unwrap_err().to_string();
    assert!(error.starts_with("kernels/wrong.cu does not compile for sm_80 with N=3:"), "{error}");
    assert!(error.contains("kernels/wrong.cu:7: error: identifier \"y\" is undefined"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is kept");
}

/// What becomes of a damaged entry is tested beside the cache, and what a pack does by `tests/device.rs`.
#[test]
fn what_is_kept_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let Some(first) = compiler(folder.path()) else { return };
    let compile = |compiler: &Compiler| compiler.compile(&NORM, &[("ROWS_PER_BLOCK", 8)], Arch::Sm80).unwrap();
    let (key, made, origin) = compile(&first);
    assert!(matches!(origin, Origin::Compiled(_)));
    assert_eq!(compile(&compiler(folder.path()).unwrap()), (key, made, Origin::Cache));
}
