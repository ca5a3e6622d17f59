//! Every kernel of `faulty.cu` holds one fault, and the simulator names it: kernel, block, thread, line and what.

use ares::backend::cuda::driver::LaunchConfig;
use ares::backend::cuda::source::Source;

use crate::harness::{SEEDS, device, download, launch, path, source, upload};

/// Threads and elements of every faulty kernel.
const N: usize = 64;

/// A kernel's name, and what the message must hold: each of these parts, in one of its choices.
struct Fault {
    kernel: String,
    parts: Vec<Vec<String>>,
}

/// Of two accesses without order the later one is reported: a kernel's faulty lines are choices.
fn faults() -> Vec<Fault> {
    let text = std::fs::read_to_string(path("simulator/faulty.cu")).expect("readable");
    let (mut found, mut parts) = (Vec::<Fault>::new(), Vec::new());
    for (i, line) in text.lines().enumerate() {
        if let Some(expected) = line.strip_prefix("// EXPECT ") {
            let choices = |part: &str| part.split('|').map(|choice| choice.trim().to_string()).collect();
            parts = expected.split(';').map(choices).collect();
        } else if let Some(signature) = line.strip_prefix("KERNEL ") {
            let kernel = signature.split('(').next().unwrap().to_string();
            parts.extend([vec![format!("{kernel}: block (")], vec!["thread (".into()], Vec::new()]);
            found.push(Fault { kernel, parts: std::mem::take(&mut parts) });
        } else if line.ends_with("// FAULT") {
            let lines = found.last_mut().and_then(|fault| fault.parts.last_mut()).expect("inside a kernel");
            lines.push(format!("kernels/faulty.cu:{}", i + 1));
        }
    }
    assert!(found.len() >= 23, "{}", found.len());
    found
}

#[test]
fn every_fault_is_found_and_named() {
    let (faulty, sound) = (source("simulator/faulty.cu"), source("simulator/sound.cu"));
    for seed in SEEDS {
        let Some(driver) = device(seed) else { return };
        for Fault { kernel, parts } in faults() {
            let values: Vec<f32> = (0..N).map(|i| i as f32).collect();
            let blocks: u32 = if kernel.ends_with("between_blocks") { 2 } else { 1 };
            let (y, x) = (upload(&driver, &vec![f32::NAN; N * blocks as usize]), upload(&driver, &values));
            let shared = if kernel == "shared_past_the_end" { 256 } else { 1536 };
            let optional = if kernel == "no_tensor" { &[0][..] } else { &[] };
            let config = LaunchConfig::linear(blocks, N as u32).with_shared(shared);
            let result = launch(&driver, faulty, &kernel, config, &[&[y, x, N as u64], optional].concat());
            let message = result.expect_err(&format!("{kernel}, seed {seed}: nothing was found")).to_string();
            println!("{message}");
            for part in parts {
                let holds = part.iter().any(|choice| message.contains(choice));
                assert!(holds, "{kernel}, seed {seed}: expected {part:?} in\n{message}");
            }
            // The device is as good as before.
            launch(&driver, sound, "holes", LaunchConfig::linear(1, N as u32), &[y, x, N as u64])
                .expect("a sound kernel");
        }
    }
}

#[test]
fn what_nobody_wrote_is_nan() {
    let Some(driver) = device(0) else { return };
    let (y, x) = (upload(&driver, &[f32::NAN; N]), upload(&driver, &[1.0f32; N]));
    let config = LaunchConfig::linear(1, N as u32).with_shared(1024);
    let sound = source("simulator/sound.cu");
    launch(&driver, sound, "holes", config, &[y, x, N as u64]).unwrap();
    let found = download::<f32>(&driver, y, N);
    assert!(found.iter().enumerate().all(|(i, v)| v.is_nan() == (i % 3 == 0)), "{found:?}");
    launch(&driver, sound, "unwritten", config, &[y, x, N as u64]).unwrap();
    assert!(download::<f32>(&driver, y, N).iter().all(|v| v.is_nan()));
}

#[test]
fn a_kernel_that_does_not_compile_names_its_line() {
    let Some(driver) = device(0) else { return };
    let sound = source("simulator/sound.cu");
    let text = sound.text.replace("float sum = 0.0f;", "flaot sum = 0.0f;").leak();
    let broken = Box::leak(Box::new(Source { text, file: "broken.cu", kernels: sound.kernels }));
    let message = launch(&driver, broken, "holes", LaunchConfig::linear(1, 32), &[0, 0, 0]).unwrap_err().to_string();
    let text = std::fs::read_to_string(path("simulator/sound.cu")).unwrap();
    let line = 1 + text.lines().position(|line| line.contains("float sum = 0.0f;")).unwrap();
    assert!(message.contains(&format!("kernels/sound.cu:{line}")) && message.contains("flaot"), "{message}");
}
