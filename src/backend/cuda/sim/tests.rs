//! Two kernels through their launchers against plain Rust, and what a device must do besides.

use half::bf16;

use super::*;
use crate::backend::cuda::kernels;
use crate::backend::{Backend, Cuda};

/// `None` without a compiler, which is printed.
fn device() -> Option<Cuda> {
    match SimDriver::open(Arch::Sm80) {
        Ok(driver) => Some(Cuda::new(driver)),
        Err(reason) => {
            assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{reason}");
            println!("skipped: no C++ compiler ({reason})");
            None
        }
    }
}

fn numbers(len: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32(((i * 7919) % 1013) as f32 / 506.0 - 1.0)).collect()
}

#[test]
fn norm_forward_is_its_formula() {
    let Some(cuda) = device() else { return };
    let (rows, cols, stride, eps) = (13, 100, 104, 1e-6);
    let mut input = numbers(rows * stride);
    input.chunks_mut(stride).for_each(|row| row[cols..].fill(bf16::ZERO));
    let gains: Vec<bf16> = numbers(stride);
    let (mut x, mut w) = (cuda.alloc(rows * stride).unwrap(), cuda.alloc(stride).unwrap());
    cuda.upload(&mut x, 0, &input).unwrap();
    cuda.upload(&mut w, 0, &gains).unwrap();
    let (mut y, mut rstd) = (cuda.alloc::<bf16>(rows * stride).unwrap(), cuda.alloc::<f32>(rows).unwrap());
    let config = LaunchConfig::linear(4, 128);
    // SAFETY: every row and the four warps' blocks lie within the buffers.
    unsafe {
        kernels::norm_forward(
            &cuda,
            &[("ROWS_PER_BLOCK", 4)],
            config,
            &mut y,
            &mut rstd,
            &x,
            &w,
            rows as u32,
            cols as u32,
            stride as u32,
            eps,
            0.0,
        )
    }
    .unwrap();
    let (mut found, mut scales) = (vec![bf16::ZERO; rows * stride], vec![0.0f32; rows]);
    cuda.download(&mut found, &y, 0).unwrap();
    cuda.download(&mut scales, &rstd, 0).unwrap();
    for r in 0..rows {
        let row = &input[r * stride..][..cols];
        let mean = row.iter().map(|v| v.to_f64().powi(2)).sum::<f64>() / cols as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        assert!((f64::from(scales[r]) / scale - 1.0).abs() <= 1e-6, "rstd[{r}]: {} {scale}", scales[r]);
        for c in 0..cols {
            let expected = row[c].to_f64() * gains[c].to_f64() * scale;
            let limit = expected.abs() / 128.0;
            assert!((found[r * stride + c].to_f64() - expected).abs() <= limit, "y[{r},{c}]");
        }
    }
}

#[test]
fn gather_copies_rows_also_when_replayed() {
    let Some(cuda) = device() else { return };
    let (rows, stride) = (9, 24);
    let input = numbers(rows * stride);
    let chosen = [8u32, 0, 3, 3, 5];
    let (mut x, mut t) = (cuda.alloc(rows * stride).unwrap(), cuda.alloc(chosen.len()).unwrap());
    cuda.upload(&mut x, 0, &input).unwrap();
    cuda.upload(&mut t, 0, &chosen).unwrap();
    let mut y = cuda.alloc::<bf16>(chosen.len() * stride).unwrap();
    let mut graph = Default::default();
    for round in 0..3u32 {
        let now: Vec<u32> = chosen.iter().map(|r| (r + round) % rows as u32).collect();
        cuda.upload(&mut t, 0, &now).unwrap();
        cuda.zero(&mut y, 0, chosen.len() * stride).unwrap();
        // SAFETY: every named row lies within `x`, and `y` has one per block.
        let record = || unsafe {
            let config = LaunchConfig::linear(chosen.len() as u32, 32);
            kernels::gather(&cuda, &[("THREADS", 32)], config, &mut y, &x, &t, stride as u32)
        };
        cuda.replay(&mut graph, record).unwrap();
        let mut found = vec![bf16::ZERO; chosen.len() * stride];
        cuda.download(&mut found, &y, 0).unwrap();
        for (i, &row) in now.iter().enumerate() {
            assert_eq!(
                found[i * stride..][..stride],
                input[row as usize * stride..][..stride],
                "round {round}, row {i}"
            );
        }
    }
}

#[test]
fn memory_is_zeroed_and_given_back() {
    let Some(cuda) = device() else { return };
    let driver = cuda.driver();
    for bytes in [1, 4096, 1 << 20] {
        let address = driver.alloc(bytes).unwrap();
        assert_eq!(address % 256, 0);
        let mut found = vec![1u8; bytes];
        // SAFETY: the allocation is alive and as long as the slices; it is freed once, at the end.
        unsafe {
            driver.download(&mut found, address).unwrap();
            assert!(found.iter().all(|&b| b == 0), "{bytes} bytes");
            driver.upload(address, &vec![7; bytes]).unwrap();
            driver.free(address);
        }
    }
    let error = driver.alloc(1 << 50).unwrap_err().to_string();
    assert!(error.contains("1125899906842624 bytes"), "{error}");
}
