//! Every kernel compiles for every architecture without spills, and fits a multiprocessor as often as its plan relies on.
//!
//! Needs libnvrtc, no GPU; without it these tests are skipped, unless ARES_REQUIRE_NVRTC=1.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ares::backend::cuda::cache::Cache;
use ares::backend::cuda::compiler::{Compiler, KernelOptions, Origin};
use ares::backend::cuda::driver::{Arch, Define};
use ares::backend::cuda::kernels::{NORM, SOURCES};
use ares::backend::cuda::pack;
use ares::backend::cuda::source::Source;
use ares::backend::cuda::usage::{Build, parse};
use ares::ops::builds;
use rayon::prelude::*;

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

/// Kept from run to run: an entry's key holds all that it is made from.
fn kept() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels")
}

const DEFINES: &[Define] = &[("ROWS_PER_BLOCK", 8)];

#[test]
fn all_fit_every_architecture() {
    let Some(compiler) = compiler(&kept()) else { return };
    let builds = builds();
    for arch in Arch::ALL {
        let begin = Instant::now();
        let checked: Vec<(usize, bool, Vec<String>)> =
            builds.par_iter().map(|build| check(&compiler, build, arch)).collect();
        let kernels: usize = checked.iter().map(|(kernels, ..)| kernels).sum();
        let anew = checked.iter().filter(|(_, anew, _)| *anew).count();
        println!("{arch}: {kernels} kernels of {} builds, {anew} compiled anew, {:.1?}", builds.len(), begin.elapsed());
        let faults: Vec<&String> = checked.iter().flat_map(|(.., faults)| faults).collect();
        assert!(faults.is_empty(), "{faults:#?}");
    }
}

/// Kernels, whether they were compiled anew, and what is wrong with them.
fn check(compiler: &Compiler, build: &Build, arch: Arch) -> (usize, bool, Vec<String>) {
    let (_, cubin, origin) = match compiler.compile(build.source, &build.defines, arch) {
        Ok(compiled) => compiled,
        Err(error) => return (0, true, vec![error.to_string()]),
    };
    let usages = parse(&cubin.log);
    let mut faults = Vec::new();
    for budget in &build.budgets {
        let name = format!("{arch} {} {:?}", budget.kernel, build.defines);
        let Some(usage) = usages.iter().find(|usage| usage.kernel == budget.kernel) else {
            faults.push(format!("{name}: not in the compiler's report"));
            continue;
        };
        let blocks = usage.blocks(budget, arch);
        if !usage.is_clean() {
            faults.push(format!("{name}: {usage:?}"));
        }
        if !(blocks >= budget.blocks && blocks > 0) {
            faults.push(format!("{name}: {blocks} blocks fit, planned {}: {usage:?} {budget:?}", budget.blocks));
        }
    }
    (usages.len(), matches!(origin, Origin::Compiled(_)), faults)
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

#[test]
fn what_is_kept_is_used_and_damage_is_repaired() {
    let folder = tempfile::tempdir().unwrap();
    let compile = |compiler: &Compiler| compiler.compile(&NORM, DEFINES, Arch::Sm80).unwrap();
    let Some(first) = compiler(folder.path()) else { return };
    let (key, made, origin) = compile(&first);
    assert!(matches!(origin, Origin::Compiled(_)));
    let second = compiler(folder.path()).unwrap();
    assert_eq!(compile(&second), (key, made.clone(), Origin::Cache));
    let entry = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let cubin = entry.join("kernel.cubin");
    let mut bytes = fs::read(&cubin).unwrap();
    bytes[1000] ^= 1;
    fs::write(&cubin, bytes).unwrap();
    let (_, again, origin) = compile(&second);
    assert!(matches!(origin, Origin::Compiled(_)));
    assert_eq!(again.image, made.image);
    assert_eq!(fs::read(&cubin).unwrap(), made.image);
}

#[test]
fn a_pack_needs_no_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let Some(first) = compiler(&kept()) else { return };
    let (key, made, _) = first.compile(&NORM, DEFINES, Arch::Sm90a).unwrap();
    let path = folder.path().join("norm.kernels");
    fs::write(&path, pack::encode(&[(key.clone(), made.clone())])).unwrap();
    let nowhere = Some(folder.path().join("none"));
    let options = KernelOptions { nvrtc: nowhere, kernels: Some(path), sync: false };
    let packed = Compiler::new(options, None, Cache::at(folder.path().join("cache"))).unwrap();
    packed.check().unwrap();
    assert_eq!(packed.compile(&NORM, DEFINES, Arch::Sm90a).unwrap(), (key, made, Origin::Pack));
    let error = packed.compile(&NORM, DEFINES, Arch::Sm80).unwrap_err().to_string();
    assert!(error.contains("expected norm.cu for sm_80 with ROWS_PER_BLOCK=8"), "{error}");
    assert!(error.contains("ares kernels --arch sm_80 --pack"), "{error}");
}
