//! Devices, random operands, and comparisons that fail closed.

use std::sync::Arc;

use ares::backend::cuda::compiler::KernelOptions;
use ares::backend::cuda::device::GpuDriver;
use ares::backend::cuda::driver::{Arch, Driver};
use ares::backend::cuda::sim::SimDriver;
use ares::backend::{Backend, Cpu, Cuda, Element, Real, Tensor};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The device under test, a stream of its own for each test; `None` where it cannot be had, and the reason is printed.
pub fn device() -> Option<Cuda> {
    driver().map(Cuda::new)
}

pub fn driver() -> Option<Arc<dyn Driver>> {
    let default = if std::env::var_os("ARES_REQUIRE_GPU").is_some() { "cuda" } else { "sim" };
    let wanted = std::env::var("ARES_PARITY_DEVICE").unwrap_or_else(|_| default.to_string());
    let driver = match wanted.as_str() {
        "sim" => SimDriver::open(Arch::Sm80),
        "cuda" => GpuDriver::open(0, KernelOptions::default().or_environment()),
        other => panic!("ARES_PARITY_DEVICE: expected sim or cuda, found {other}"),
    };
    match driver {
        Ok(driver) => Some(driver),
        Err(reason) => {
            let required = ["ARES_REQUIRE_GPU", "ARES_REQUIRE_SIM"].iter().any(|name| std::env::var(name).is_ok());
            assert!(!required, "{reason}");
            println!("skipped: {reason}");
            None
        }
    }
}

/// Normal-looking numbers of the given scale, as bf16 holds them.
pub fn random(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one = || (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * scale * 0.87;
    (0..len).map(|_| bf16::from_f32(one()).to_f32()).collect()
}

/// Activations from f32 values.
pub fn act<B: Backend>(ops: &B, rows: usize, cols: usize, values: &[f32]) -> Tensor<B> {
    Tensor::from_host(ops, rows, cols, &ops.activations(values)).unwrap()
}

/// An output that nobody has written yet.
pub fn unwritten<B: Backend>(ops: &B, rows: usize, cols: usize) -> Tensor<B> {
    act(ops, rows, cols, &vec![f32::NAN; rows * cols])
}

pub fn numbers<B: Backend, T: Element>(ops: &B, rows: usize, cols: usize, values: &[T]) -> Tensor<B, T> {
    Tensor::from_host(ops, rows, cols, values).unwrap()
}

/// Activations as f32.
pub fn read<B: Backend>(ops: &B, tensor: &Tensor<B>) -> Vec<f32> {
    tensor.read(ops).unwrap().into_iter().map(Real::to_f32).collect()
}

/// The reference.
pub fn reference() -> Cpu {
    Cpu::rounded()
}

/// One unit in the last place of a bf16 as large as `value`.
pub fn ulp(value: f32) -> f32 {
    let exponent = (value.abs().to_bits() >> 23).max(1);
    f32::from_bits(exponent << 23) / 128.0
}

/// Each element within `ulps` bf16 ulps of the expected one, plus `absolute`: what a reordered f32 sum may differ by.
pub fn close(what: &str, found: &[f32], expected: &[f32], ulps: f32, absolute: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let limit = ulps * ulp(expected.abs().max(found.abs())) + absolute;
        assert!((found - expected).abs() <= limit, "{what}[{i}]: expected {expected}, found {found}, limit {limit}");
    }
}

/// f32 results: within `relative` of the expected one plus `absolute`.
pub fn near(what: &str, found: &[f32], expected: &[f32], relative: f32, absolute: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let limit = relative * expected.abs() + absolute;
        assert!((found - expected).abs() <= limit, "{what}[{i}]: expected {expected}, found {found}, limit {limit}");
    }
}
