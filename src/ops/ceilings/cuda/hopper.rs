//! What only sm_90a has: products of warpgroups, and the copy engine on its way from L2.

use half::bf16;
use serde::Serialize;

use super::best;
use crate::backend::cuda::driver::{Arch, Define, LaunchConfig, MapSpec};
use crate::backend::cuda::{Build, DeviceBuffer, kernels};
use crate::backend::{Backend, Cuda, Tensor};
use crate::error::Result;

const THREADS: u32 = 256;
const STAGES: u32 = 4;
/// Of `exp2_rate`, numbers of a thread.
const CHAINS: u32 = 8;
/// Rows of a box, whose rows are 128 bytes.
const BOX_ROWS: usize = 128;
const BOX_BYTES: u64 = 128 * BOX_ROWS as u64;
/// 16 MiB: in L2 after it was read once.
const ROWS: usize = 1 << 17;

/// Products of 64 × n × 16.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct ProductRate {
    pub(crate) n: u32,
    /// Whether the right operand lies (16, n).
    pub(crate) across: bool,
    /// Whether the left operand is in registers.
    pub(crate) held: bool,
    pub(crate) flops_per_s: f64,
    /// Of one product, two warpgroups at work on a multiprocessor; the fastest block's.
    pub(crate) cycles: f64,
}

/// Boxes that come from L2.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct BoxRate {
    /// Blocks that bring parts for each other.
    pub(crate) cluster: u32,
    /// That come to all blocks.
    pub(crate) bytes_per_s: f64,
    /// That come to one block; the fastest one's.
    pub(crate) bytes_per_cycle: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Hopper {
    pub(crate) products: Vec<ProductRate>,
    pub(crate) boxes: Vec<BoxRate>,
    /// 2^x of a multiprocessor; the fastest block's.
    pub(crate) exp2_per_cycle: f64,
}

fn defines(n: u32, across: bool) -> [Define; 3] {
    [("BLOCK_N", n.into()), ("W_ACROSS", across.into()), ("CLUSTER", 1 + u64::from(across))]
}

fn shared(n: u32) -> [u32; 2] {
    [(128 + n) * 128, STAGES * (BOX_BYTES as u32 + 16)]
}

fn variants() -> impl Iterator<Item = (u32, bool)> {
    [128, 192, 256].into_iter().flat_map(|n| [false, true].map(|across| (n, across)))
}

/// Each with the left operand in shared memory, and in registers.
fn forms() -> impl Iterator<Item = (u32, bool, bool)> {
    variants().flat_map(|(n, across)| [false, true].map(|held| (n, across, held)))
}

pub(super) fn builds() -> Vec<Build> {
    let build = |(n, across)| {
        let [products, boxes] = shared(n);
        let build = Build::new(&kernels::CEILINGS90, &defines(n, across), THREADS).only(Arch::Sm90a);
        let build = build.with("wgmma_rate", THREADS, products, 1).with("wgmma_held_rate", THREADS, products, 1);
        build.with("box_rate", THREADS, boxes, 1).with("exp2_rate", THREADS, 0, 1)
    };
    variants().map(build).collect()
}

/// `None` on other architectures.
pub(super) fn measure(cuda: &Cuda) -> Result<Option<Hopper>> {
    let info = cuda.info();
    if info.arch != Arch::Sm90a {
        return Ok(None);
    }
    let (blocks, steps, boxes, repeats) =
        if info.is_simulated() { (2, 3, 6, 1) } else { (info.multiprocessors, 10_000, 4000, 3) };
    let mut cycles = cuda.alloc::<u32>(blocks as usize)?;
    let mut sums = cuda.alloc::<f32>((blocks * THREADS) as usize)?;
    let mut products = Vec::new();
    for (n, across, held) in forms() {
        let form = (n, across, held);
        let seconds = best(cuda, repeats, || products_of(cuda, form, blocks, steps, &mut sums, &mut cycles))?;
        let count = u64::from(blocks) * u64::from(steps) * 8; // two warpgroups, four products a step
        let flops_per_s = (count * 2 * 64 * u64::from(n) * 16) as f64 / seconds;
        let cycles = fewest(cuda, &cycles)? / f64::from(8 * steps);
        products.push(ProductRate { n, across, held, flops_per_s, cycles });
    }
    let x = Tensor::<Cuda, bf16>::zeros(cuda, ROWS, 64)?;
    let mut rates = Vec::new();
    for across in [false, true] {
        let cluster = 1 + u32::from(across);
        let seconds = best(cuda, repeats, || boxes_of(cuda, &x, across, blocks, boxes, &mut cycles))?;
        let bytes = u64::from(boxes) * BOX_BYTES;
        let bytes_per_s = (u64::from(blocks / cluster * cluster) * bytes) as f64 / seconds;
        rates.push(BoxRate { cluster, bytes_per_s, bytes_per_cycle: bytes as f64 / fewest(cuda, &cycles)? });
    }
    exp2_of(cuda, blocks, steps, &mut sums, &mut cycles)?;
    let exp2_per_cycle = f64::from(steps * CHAINS * THREADS) / fewest(cuda, &cycles)?;
    Ok(Some(Hopper { products, boxes: rates, exp2_per_cycle }))
}

fn exp2_of(
    cuda: &Cuda,
    blocks: u32,
    steps: u32,
    sums: &mut DeviceBuffer<f32>,
    cycles: &mut DeviceBuffer<u32>,
) -> Result<()> {
    let config = LaunchConfig::linear(blocks, THREADS);
    // SAFETY: there is a sum for each thread and a number for each block.
    unsafe { kernels::exp2_rate(cuda, &defines(128, false), config, sums, cycles, steps as usize) }
}

/// `steps` times four products of each of two warpgroups a block.
fn products_of(
    cuda: &Cuda,
    (n, across, held): (u32, bool, bool),
    blocks: u32,
    steps: u32,
    sums: &mut DeviceBuffer<f32>,
    cycles: &mut DeviceBuffer<u32>,
) -> Result<()> {
    let config = LaunchConfig::linear(blocks, THREADS).with_shared(shared(n)[0]);
    // SAFETY: there is a sum for each thread and a number for each block.
    unsafe {
        if held {
            kernels::wgmma_held_rate(cuda, &defines(n, across), config, sums, cycles, steps as usize)
        } else {
            kernels::wgmma_rate(cuda, &defines(n, across), config, sums, cycles, steps as usize)
        }
    }
}

/// Single blocks, or `pairs` of them.
fn boxes_of(
    cuda: &Cuda,
    x: &Tensor<Cuda>,
    pairs: bool,
    blocks: u32,
    boxes: u32,
    cycles: &mut DeviceBuffer<u32>,
) -> Result<()> {
    let cluster = 1 + u32::from(pairs);
    let config = LaunchConfig::linear(blocks / cluster * cluster, THREADS).with_shared(shared(128)[1]);
    let (address, rows, cols) = (x.buffer.address(), x.rows(), x.cols());
    let spec = MapSpec { what: "boxes", address, rows, cols, stride: x.stride(), box_rows: BOX_ROWS as u32 / cluster };
    let map = cuda.driver().tensor_map(&spec)?;
    // SAFETY: the map lies within `x`, whose rows are a multiple of a box's, and there is a number for each block.
    unsafe {
        kernels::box_rate(cuda, &defines(128, pairs), config.with_cluster(cluster), cycles, &map, rows, boxes as usize)
    }
}

/// The simulator has no clock, and gives 0: then 1.
fn fewest(cuda: &Cuda, cycles: &DeviceBuffer<u32>) -> Result<f64> {
    let mut found = vec![0; cycles.len()];
    cuda.download(&mut found, cycles, 0)?;
    Ok(found.into_iter().filter(|&cycles| cycles > 0).min().unwrap_or(1).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::compiler::KernelOptions;
    use crate::backend::cuda::sim::SimDriver;

    fn sim() -> Option<Cuda> {
        match SimDriver::open(Arch::Sm90a, &KernelOptions::default().or_environment(), Some(3)) {
            Ok(driver) => Some(Cuda::new(driver)),
            Err(error) => {
                assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{error}");
                println!("skipped: {error}");
                None
            }
        }
    }

    /// `noise` of the kernel.
    fn pair(seed: u32) -> [f64; 2] {
        let seed = (seed ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
        let seed = (seed ^ (seed >> 13)).wrapping_mul(0xc2b2_ae35);
        let bits = ((seed ^ (seed >> 16)) & 0x807f_807f) | 0x3f80_3f80;
        [bf16::from_bits(bits as u16), bf16::from_bits((bits >> 16) as u16)].map(bf16::to_f64)
    }

    /// Σ over m, n of Σ_k a[m][k]·b[n][k] = Σ_k (Σ_m a[m][k])·(Σ_n b[n][k]), operands permuted as they lie.
    #[test]
    fn every_product_counts() {
        let Some(cuda) = sim() else { return };
        for (n, across, held) in forms() {
            let (mut sums, mut cycles) = (cuda.alloc(THREADS as usize).unwrap(), cuda.alloc(1).unwrap());
            products_of(&cuda, (n, across, held), 1, 3, &mut sums, &mut cycles).unwrap();
            let mut found = vec![0.0f32; THREADS as usize];
            cuda.download(&mut found, &sums, 0).unwrap();
            let element = |from: usize, i: usize| {
                let at = i ^ (i >> 6 & 7) << 3;
                pair((from + at / 2) as u32)[at % 2]
            };
            for warpgroup in 0..2 {
                // In registers: of row m, column k, as `warpgroup_multiply` has them.
                let register = |m: usize, k: usize| {
                    let thread = warpgroup * 128 + m / 16 * 32 + m % 8 * 4 + k % 8 / 2;
                    pair((thread * 4 + k % 16 / 8 * 2 + m % 16 / 8) as u32)[k % 2]
                };
                let left =
                    |m: usize, k: usize| if held { register(m, k) } else { element(warpgroup * 64 * 32, m * 64 + k) };
                let a = |k: usize| (0..64).map(|m| left(m, k)).sum::<f64>();
                let b = |k: usize| {
                    let at = |n: usize| if across { n / 64 * 4096 + k * 64 + n % 64 } else { n * 64 + k };
                    (0..n as usize).map(|n| element(128 * 32, at(n))).sum::<f64>()
                };
                let expected: f64 = 3.0 * (0..64).map(|k| a(k) * b(k)).sum::<f64>();
                let sum: f64 = found[warpgroup * 128..][..128].iter().map(|&v| f64::from(v)).sum();
                assert!(
                    (sum - expected).abs() <= 0.01 * expected.abs().max(100.0),
                    "{n}, {across}, {held}: {sum}, {expected}"
                );
            }
        }
    }

    /// Σ of 2^-x of 2^-x of 2^-x.
    #[test]
    fn every_exponential_counts() {
        let Some(cuda) = sim() else { return };
        let (mut sums, mut cycles) = (cuda.alloc(THREADS as usize).unwrap(), cuda.alloc(1).unwrap());
        exp2_of(&cuda, 1, 3, &mut sums, &mut cycles).unwrap();
        let mut found = vec![0.0f32; THREADS as usize];
        cuda.download(&mut found, &sums, 0).unwrap();
        for (thread, found) in found.into_iter().enumerate() {
            let expected: f64 = (0..CHAINS as usize)
                .map(|i| (0..3).fold(pair((thread * CHAINS as usize + i) as u32)[0], |x, _| (-x).exp2()))
                .sum();
            assert!((f64::from(found) - expected).abs() <= 1e-5 * expected, "thread {thread}: {found}, {expected}");
        }
    }

    #[test]
    fn the_simulator_finishes() {
        let Some(cuda) = sim() else { return };
        let found = measure(&cuda).unwrap().unwrap();
        assert_eq!((found.products.len(), found.boxes.len()), (12, 2));
        assert!(found.exp2_per_cycle > 0.0, "{found:?}");
        assert!(found.products.iter().all(|rate| rate.flops_per_s > 0.0), "{found:?}");
        assert!(found.boxes.iter().all(|rate| rate.bytes_per_s > 0.0), "{found:?}");
    }
}
