//! What is right, however fibers and blocks are ordered: no report, and the formula's numbers.

use ares::backend::cuda::driver::LaunchConfig;

use crate::harness::{SEEDS, device, download, launch, source, upload};

const N: usize = 64;
const BLOCKS: usize = 5;

fn run(kernel: &str, expected: impl Fn(&[f32], usize) -> f32) {
    for seed in SEEDS {
        let Some(driver) = device(seed) else { return };
        let values: Vec<f32> = (0..N).map(|i| ((i * 37) % 64) as f32).collect();
        let (y, x) = (upload(&driver, &[f32::NAN; N * BLOCKS]), upload(&driver, &values));
        let config = LaunchConfig::linear(BLOCKS as u32, N as u32).with_shared(1024);
        launch(&driver, source("simulator/sound.cu"), kernel, config, &[y, x, N as u64]).unwrap();
        let found = download::<f32>(&driver, y, N * BLOCKS);
        for (i, &found) in found.iter().enumerate() {
            assert_eq!(found, expected(&values, i % N), "{kernel}, seed {seed}, element {i}");
        }
    }
}

/// Whole numbers: every order of additions gives the same.
#[test]
fn barriers_of_both_kinds_order_accesses() {
    run("barriers", |x, t| {
        let total: f32 = x.iter().sum();
        let first = |t: usize| x[t / 32 * 32 + (t + 1) % 32] + total;
        first(t) + first(t / 32 * 32 + (t + 5) % 32) + total
    });
}

#[test]
fn copies_in_two_stages_arrive() {
    run("pipeline", |x, t| 3.0 * x[(t + 7) % N]);
}
