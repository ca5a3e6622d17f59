//! Every kernel below `tests/faulty/` holds one fault, and the simulator names it: kernel, block, thread, line and what.

use ares::backend::cuda::driver::LaunchConfig;

use crate::harness::{SEEDS, device, download, launch, source, upload};

/// Threads and elements of every faulty kernel.
const N: usize = 64;

/// File and what the message must hold, each part; `|` between choices, where the order of threads decides.
const FAULTS: &[(&str, &[&str])] = &[
    ("missing_barrier", &["of shared memory, which thread", "wrote: expected a barrier|read: expected a barrier"]),
    (
        "missing_barrier_before_reuse",
        &["of shared memory, which", "wrote: expected a barrier|read: expected a barrier"],
    ),
    (
        "missing_warp_barrier",
        &["reads 4 bytes", "of shared memory, which thread", "wrote: expected a barrier in between"],
    ),
    ("divergent_barrier", &["calls block_barrier", "expected its whole block at one call, found others at"]),
    ("barrier_after_exit", &["block_barrier", "left the kernel|leaves the kernel"]),
    ("deadlock", &["deadlock", "waits at block_barrier", "waits at warp_barrier"]),
    ("shuffle_divergence", &["shuffle_xor", "expected its whole warp at one call, found others at shuffle"]),
    ("shuffle_without_lanes", &["shuffle_xor", "left the kernel|leaves the kernel"]),
    ("read_past_the_end", &["reads 4 bytes", "past the end of parameter 2 (256 bytes)"]),
    ("write_past_the_end", &["writes 4 bytes", "4 bytes past the end of parameter 1 (256 bytes)"]),
    ("write_before_the_start", &["writes 4 bytes", "bytes before the start of parameter 1 (256 bytes)"]),
    ("no_tensor", &["reads 4 bytes", "neither a tensor nor shared memory"]),
    ("shared_past_the_end", &["writes 4 bytes", "of shared memory, expected the 256 bytes of the launch"]),
    ("index_past_its_array", &["uses index", "'float [32]'"]),
    (
        "write_race_between_blocks",
        &["writes 4 bytes", "of this launch wrote", "parameter 1", "blocks of a launch have no order"],
    ),
    (
        "read_race_between_blocks",
        &["which block|which several blocks", "of this launch", "parameter 1", "blocks of a launch have no order"],
    ),
    (
        "copy_read_too_early",
        &["reads 4 bytes", "an asynchronous copy of thread", "expected copy_async_wait and a barrier"],
    ),
    (
        "copy_not_waited_for",
        &["reads 4 bytes", "an asynchronous copy of thread", "expected copy_async_wait and a barrier"],
    ),
    ("copy_without_barrier", &["reads 4 bytes", "of shared memory, which", "copy of thread|wrote: expected a barrier"]),
    ("misaligned", &["expected a multiple of 16", "float4x"]),
    ("misaligned_matrix", &["loads a matrix", "expected 16 aligned bytes of the launch", "found offset"]),
    ("shift_too_far", &["shifts by 32", "expected less than the number's bits"]),
    ("division_by_zero", &["divides by zero"]),
];

/// The kernel's lines that are wrong, as choices: of two accesses without order the later one is reported.
fn fault_lines(file: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faulty").join(file);
    let text = std::fs::read_to_string(path).expect("readable");
    let wrong = text.lines().enumerate().filter(|(_, line)| line.ends_with("// FAULT"));
    let places: Vec<String> = wrong.map(|(i, _)| format!("kernels/{file}:{}", i + 1)).collect();
    assert!(!places.is_empty(), "{file}: expected a line that ends with // FAULT");
    places.join("|")
}

#[test]
fn every_fault_is_found_and_named() {
    for seed in SEEDS {
        let Some(driver) = device(seed) else { return };
        for (name, parts) in FAULTS {
            let file = format!("{name}.cu");
            let source = source(&format!("faulty/{file}"));
            let values: Vec<f32> = (0..N).map(|i| i as f32).collect();
            let blocks: u32 = if name.ends_with("between_blocks") { 2 } else { 1 };
            let (y, x) = (upload(&driver, &vec![f32::NAN; N * blocks as usize]), upload(&driver, &values));
            let shared = if name.starts_with("copy_") {
                1024
            } else if *name == "misaligned_matrix" {
                1536
            } else {
                256
            };
            let args = if *name == "no_tensor" { vec![y, x, 0, N as u64] } else { vec![y, x, N as u64] };
            let config = LaunchConfig::linear(blocks, N as u32).with_shared(shared);
            let result = launch(&driver, source, "faulty", config, &args);
            let message = result.expect_err(&format!("{name}, seed {seed}: nothing was found")).to_string();
            println!("{message}");
            let lines = fault_lines(&file);
            let parts = parts.iter().copied().chain(["faulty: block (", "thread (", lines.as_str()]);
            for part in parts {
                let holds = part.split('|').any(|choice| message.contains(choice));
                assert!(holds, "{name}, seed {seed}: expected `{part}` in\n{message}");
            }
            // The device is as good as before.
            let sound = crate::harness::source("faulty/sound.cu");
            launch(&driver, sound, "holes", LaunchConfig::linear(1, N as u32), &[y, x, N as u64])
                .expect("a sound kernel");
        }
    }
}

#[test]
fn every_faulty_kernel_is_tried() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faulty");
    let names = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|n| n.to_string_lossy().trim_end_matches(".cu").to_string()).collect();
    names.sort();
    let mut tried: Vec<&str> = FAULTS.iter().map(|f| f.0).chain(["sound"]).collect();
    tried.sort();
    assert_eq!(names, tried);
}

#[test]
fn what_nobody_wrote_is_nan() {
    let Some(driver) = device(0) else { return };
    let (y, x) = (upload(&driver, &[f32::NAN; N]), upload(&driver, &[1.0f32; N]));
    let config = LaunchConfig::linear(1, N as u32).with_shared(1024);
    let sound = source("faulty/sound.cu");
    launch(&driver, sound, "holes", config, &[y, x, N as u64]).unwrap();
    let found = download::<f32>(&driver, y, N);
    assert!(found.iter().enumerate().all(|(i, v)| v.is_nan() == (i % 3 == 0)), "{found:?}");
    launch(&driver, sound, "unwritten", config, &[y, x, N as u64]).unwrap();
    assert!(download::<f32>(&driver, y, N).iter().all(|v| v.is_nan()));
}

#[test]
fn a_kernel_that_does_not_compile_names_its_line() {
    let Some(driver) = device(0) else { return };
    let sound = source("faulty/sound.cu");
    let text = sound.text.replace("float sum = 0.0f;", "flaot sum = 0.0f;").leak();
    let broken =
        Box::leak(Box::new(ares::backend::cuda::source::Source { text, file: "broken.cu", kernels: sound.kernels }));
    let message = launch(&driver, broken, "holes", LaunchConfig::linear(1, 32), &[0, 0, 0]).unwrap_err().to_string();
    let line =
        1 + std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faulty/sound.cu"))
            .unwrap()
            .lines()
            .position(|l| l.contains("float sum = 0.0f;"))
            .unwrap();
    assert!(message.contains(&format!("kernels/sound.cu:{line}")) && message.contains("flaot"), "{message}");
}
