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
use rayon::prelude::*;
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
    for arch in Arch::ALL {
        let builds = builds().into_iter().filter(|build| build.serves(arch)).count();
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

/// Kernels whose products tensor cores carry out, with operands from shared memory.
const TENSOR: [&str; 8] = [
    "attention_backward_keys",
    "attention_backward_queries",
    "attention_forward",
    "decode_attention",
    "lm_head_kl_logits",
    "lm_head_logits",
    "lora_partial",
    "product",
];
/// Kernels that divide, or take roots, exactly: once for a row, once for what memory takes longer to bring, or to cap a score. Rare
/// numbers then go through a function; in anybody else's inner loop it was not meant.
const DIVIDING: [&str; 12] = [
    "adamw",
    "decode_combine",
    "gradient_norm",
    "layer_norm_",
    "lm_head_combine",
    "lm_head_gradient",
    "lm_head_kl_logits",
    "lm_head_logits",
    "norm_",
    "rotate_",
    "sample_draw",
    "sample_greedy",
];

/// By NVIDIA's disassembler, where ARES_NVDISASM names it.
#[test]
fn the_code_holds_what_was_meant() {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let (Some(compiler), Some(disassembler)) = (compiler(&kept), std::env::var_os("ARES_NVDISASM")) else {
        return println!("skipped: ARES_NVDISASM names no nvdisasm (pip install nvidia-cuda-nvdisasm)");
    };
    let builds = builds();
    let work: Vec<_> = [Arch::Sm80, Arch::Sm90a]
        .into_iter()
        .flat_map(|arch| builds.iter().filter(move |build| build.serves(arch)).map(move |build| (arch, build)))
        .collect();
    work.par_iter().for_each(|(arch, build)| {
        let image = compiler.compile(build.source, &build.defines, *arch).unwrap().1.image;
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, image).unwrap();
        let output = Command::new(&disassembler).arg("-c").arg(file.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let sections: Vec<&str> = text.split("\n.text.").skip(1).collect();
        assert_eq!(sections.len(), build.source.kernels.len(), "{arch} {}", build.source.file);
        for code in sections {
            let kernel = code.split(':').next().unwrap();
            let holds = |name: &str| {
                code.lines().any(|line| {
                    let mut words = line.split_once("*/").map_or("", |(_, words)| words).split_whitespace();
                    words.find(|word| !word.starts_with('@')).is_some_and(|word| word.split('.').next() == Some(name))
                })
            };
            let place = format!("{arch} {kernel} {:?}", build.defines);
            assert!(!holds("LDL") && !holds("STL"), "{place}: local memory");
            let tensor = TENSOR.contains(&kernel);
            let tiles = ["product90", "lm_head90_logits"].contains(&kernel);
            let hopper = tiles || ["wgmma_rate", "wgmma_held_rate"].contains(&kernel);
            let boxes = tiles || kernel == "box_rate";
            for (name, expected) in [
                // Of product90 what is added to the results.
                ("LDSM", tensor || kernel == "product90"),
                ("STSM", tiles),
                ("LDGSTS", tensor),
                ("HMMA", tensor || kernel == "mma_rate"),
                ("HGMMA", hopper),
                ("UTMALDG", boxes),
                ("UTMASTG", tiles),
                // The two halves of after_previous().
                ("ACQBULK", *arch == Arch::Sm90a),
                ("PREEXIT", *arch == Arch::Sm90a),
            ] {
                assert_eq!(holds(name), expected, "{place}: {name}");
            }
            let pairs = boxes && build.defines.contains(&("CLUSTER", 2));
            assert_eq!(code.contains("UTMALDG.2D.MULTICAST"), pairs, "{place}: boxes for two blocks at once");
            let columns = build.defines.iter().find(|(name, _)| hopper && *name == "BLOCK_N");
            let whole = columns.is_none_or(|(_, n)| code.contains(&format!("HGMMA.64x{n}x16.F32.BF16")));
            assert!(whole, "{place}: products of all columns at once");
            let divides = ["_div_", "_rcp_", "_sqrt_", "_rem_"].iter().any(|name| code.contains(name));
            let caps = build.defines.contains(&("SOFTCAP", 1));
            assert!(!divides || caps || DIVIDING.iter().any(|known| kernel.starts_with(known)), "{place}: divides");
            assert_eq!(holds("ATOMS"), kernel == "sample_draw", "{place}: additions to shared memory");
        }
    });
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

/// A kernel around products of a warpgroup, a and b being descriptors of matrices that nobody looks at.
macro_rules! hopper {
    ($body:literal) => {
        Source {
            file: "hopper.cu",
            text: concat!(
                r#"#define FENCE asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
                #define MULTIPLY asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 " \
                    "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;}" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b))
                #define WAIT asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory")
                typedef unsigned long long u64;
                __device__ __noinline__ void called(float (&d)[4], u64 a, u64 b) { MULTIPLY; }
                extern "C" __global__ void __launch_bounds__(128) kernel(float* y, u64 a, u64 b, int n) {
                    float d[4] = {0, 0, 0, 0};"#,
                $body,
                "for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
                }"
            ),
            kernels: &["kernel"],
        }
    };
}

/// What the assembler does of itself to Hopper's products, and a kernel that it leaves as it is.
#[test]
fn advice_of_the_assembler_is_seen() {
    static SOURCES: [(Source, &[&str]); 5] = [
        (hopper!("FENCE; MULTIPLY; WAIT;"), &[]),
        (hopper!("FENCE; called(d, a, b); WAIT;"), &["C7510"]),
        (hopper!("FENCE; MULTIPLY; d[0] += y[0]; MULTIPLY; WAIT;"), &["C7511", "C7517"]),
        (hopper!("for (int i = 0; i < n; i++, a += 2) MULTIPLY; WAIT;"), &["C7515", "C7519"]),
        (
            Source {
                file: "unbounded.cu",
                text: r#"extern "C" __global__ void kernel(float* y) {
                    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
                    y[threadIdx.x] = 1.0f;
                }"#,
                kernels: &["kernel"],
            },
            &["C7508"],
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let Some(compiler) = compiler(folder.path()) else { return };
    for (source, codes) in &SOURCES {
        let usages = parse(&compiler.compile(source, &[], Arch::Sm90a).unwrap().1.log);
        let advice = usages[0].advice.join(" ");
        assert_eq!((usages.len(), usages[0].is_clean()), (1, codes.is_empty()), "{advice}");
        assert!(codes.iter().all(|code| advice.contains(code)), "expected {codes:?}, found {advice}");
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
