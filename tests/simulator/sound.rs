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

#[test]
fn memory_is_zeroed_and_given_back() {
    let Some(driver) = device(0) else { return };
    for bytes in [1, 4096, 1 << 20] {
        let address = driver.alloc(bytes).unwrap();
        assert_eq!(address % 256, 0);
        assert!(download::<u8>(&driver, address, bytes).iter().all(|&byte| byte == 0), "{bytes} bytes");
        // SAFETY: the allocation is alive, as long as the slice, and freed once.
        unsafe {
            driver.upload(address, &vec![7; bytes]).unwrap();
            driver.free(address);
        }
    }
    let error = driver.alloc(1 << 50).unwrap_err().to_string();
    assert!(error.contains("1125899906842624 bytes"), "{error}");
}
