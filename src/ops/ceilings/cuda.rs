mod hopper;

use serde::Serialize;

use self::hopper::Hopper;

use super::{Measured, Rates};
use crate::backend::cost::KernelRun;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Backend, Cuda};
use crate::error::Result;

const THREADS: u32 = 256;
const DEFINES: &[Define] = &[("THREADS", THREADS as u64)];
/// Of `mma_rate`, per warp and step: 16 products of 16 × 8 × 16.
const FLOPS_PER_STEP: u64 = 16 * 2 * 16 * 8 * 16;

/// The best of several runs, each after one to warm up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Ceilings {
    /// Bytes per second of a copy in device memory, those read and those written counted each.
    pub(crate) copy_bytes_per_s: f64,
    /// bf16 `mma.sync` on random numbers in registers.
    pub(crate) mma_flops_per_s: f64,
    /// Of a launch among many in the stream, microseconds.
    pub(crate) launch_us: f64,
    /// The same, replayed from a captured sequence.
    pub(crate) replayed_launch_us: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hopper: Option<Hopper>,
}

/// How much to do: enough for a GPU to be timed, little enough for the simulator to finish.
struct Size {
    floats: usize,
    copy_blocks: u32,
    mma_blocks: u32,
    steps: u32,
    launches: usize,
    repeats: usize,
}

pub(crate) fn builds() -> Vec<Build> {
    let all =
        Build::new(&kernels::CEILINGS, DEFINES, THREADS).with("mma_rate", THREADS, 0, 2).with("nothing", 32, 0, 1);
    std::iter::once(all).chain(hopper::builds()).collect()
}

/// Runs some tenths of a second on a GPU. On the simulator the figures mean nothing; that it ends shows that kernels run.
pub(crate) fn measure(cuda: &Cuda) -> Result<Ceilings> {
    Ok(Ceilings { hopper: hopper::measure(cuda)?, ..every_device(cuda)? })
}

fn every_device(cuda: &Cuda) -> Result<Ceilings> {
    let info = cuda.info();
    let size = if info.is_simulated() {
        Size { floats: 1 << 12, copy_blocks: 2, mma_blocks: 2, steps: 2, launches: 4, repeats: 1 }
    } else {
        let all = 2 * info.multiprocessors;
        // Well beyond the caches: 512 MiB each way.
        Size { floats: 1 << 27, copy_blocks: 8 * all, mma_blocks: all, steps: 20_000, launches: 2000, repeats: 5 }
    };
    let x = noise(cuda, size.floats)?;
    let mut y = cuda.alloc::<f32>(size.floats)?;
    let (copy, floats) = (LaunchConfig::linear(size.copy_blocks, THREADS), size.floats as u64);
    // SAFETY: both buffers hold `floats` values, a multiple of 4.
    let copied = best(cuda, size.repeats, || unsafe { kernels::copy_rate(cuda, DEFINES, copy, &mut y, &x, floats) })?;
    let mut sums = cuda.alloc::<f32>((size.mma_blocks * THREADS) as usize)?;
    let (mma, steps) = (LaunchConfig::linear(size.mma_blocks, THREADS), size.steps as usize);
    // SAFETY: there is one sum per thread.
    let multiplied = best(cuda, size.repeats, || unsafe { kernels::mma_rate(cuda, DEFINES, mma, &mut sums, steps) })?;
    let mma_flops = u64::from(size.mma_blocks * (THREADS / 32)) * u64::from(size.steps) * FLOPS_PER_STEP;
    // SAFETY: the kernel touches no memory.
    let one = || unsafe { kernels::nothing(cuda, DEFINES, LaunchConfig::linear(1, 32), 0) };
    let launches = || (0..size.launches).try_for_each(|_| one());
    let launched = best(cuda, size.repeats, launches)?;
    let mut graph = <Cuda as Backend>::Graph::default();
    // Runs plainly and records.
    cuda.replay(&mut graph, launches)?;
    let replayed = best(cuda, size.repeats, || cuda.replay(&mut graph, launches))?;
    let launch_us = |seconds: f64| 1e6 * seconds / size.launches as f64;
    Ok(Ceilings {
        copy_bytes_per_s: (8 * size.floats) as f64 / copied,
        mma_flops_per_s: mma_flops as f64 / multiplied,
        launch_us: launch_us(launched),
        replayed_launch_us: launch_us(replayed),
        hopper: None,
    })
}

impl Measured for Cuda {
    fn rates(&self) -> Result<Option<Rates>> {
        if self.info().is_simulated() {
            return Ok(None);
        }
        let Ceilings { mma_flops_per_s, copy_bytes_per_s, .. } = every_device(self)?;
        Ok(Some(Rates { matrix_flops_per_s: mma_flops_per_s, copy_bytes_per_s }))
    }

    fn profile_begin(&self) -> Result<()> {
        self.profile().begin(&**self.driver())
    }

    fn profile_end(&self) -> Result<Vec<KernelRun>> {
        self.profile().end(&**self.driver())
    }
}

/// Numbers that compress badly, made on the host once and doubled on the device.
fn noise(cuda: &Cuda, len: usize) -> Result<crate::backend::cuda::DeviceBuffer<f32>> {
    let part: Vec<f32> = (0..len.min(1 << 20) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32).collect();
    let mut x = cuda.alloc::<f32>(len)?;
    for at in (0..len).step_by(part.len()) {
        cuda.upload(&mut x, at, &part[..part.len().min(len - at)])?;
    }
    Ok(x)
}

/// Seconds of the fastest of `repeats` runs, between two events; one run before them warms up.
fn best(cuda: &Cuda, repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let driver = cuda.driver();
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let from = driver.event()?;
        let to = work().and_then(|()| driver.event());
        let seconds = to.and_then(|to| {
            let elapsed = driver.elapsed(&from, &to);
            driver.event_free(to);
            elapsed
        });
        driver.event_free(from);
        best = best.min(f64::from(seconds?) / 1e3);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::cuda::compiler::KernelOptions;
    use crate::backend::cuda::driver::Arch;
    use crate::backend::cuda::sim::SimDriver;

    fn sim() -> Option<Cuda> {
        match SimDriver::open(Arch::Sm80, &KernelOptions::default().or_environment(), None) {
            Ok(driver) => Some(Cuda::new(driver)),
            Err(error) => {
                assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{error}");
                println!("skipped: {error}");
                None
            }
        }
    }

    #[test]
    fn the_copy_copies() {
        let Some(cuda) = sim() else { return };
        let x = noise(&cuda, 5000).unwrap();
        let mut y = cuda.alloc::<f32>(5000).unwrap();
        let config = LaunchConfig::linear(3, THREADS);
        // SAFETY: both hold 5000 values.
        unsafe { kernels::copy_rate(&cuda, DEFINES, config, &mut y, &x, 5000).unwrap() };
        let (mut from, mut to) = (vec![0.0; 5000], vec![1.0; 5000]);
        cuda.download(&mut from, &x, 0).unwrap();
        cuda.download(&mut to, &y, 0).unwrap();
        assert!(from == to && from[17] != from[4999]);
    }

    /// `noise` of the kernel.
    fn pair(seed: u32) -> [f32; 2] {
        let seed = (seed ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
        let seed = (seed ^ (seed >> 13)).wrapping_mul(0xc2b2_ae35);
        let bits = ((seed ^ (seed >> 16)) & 0x807f_807f) | 0x3f80_3f80;
        [bf16::from_bits(bits as u16).to_f32(), bf16::from_bits((bits >> 16) as u16).to_f32()]
    }

    #[test]
    fn every_product_counts() {
        let Some(cuda) = sim() else { return };
        let mut y = cuda.alloc::<f32>(THREADS as usize).unwrap();
        // SAFETY: y holds one value per thread.
        unsafe { kernels::mma_rate(&cuda, DEFINES, LaunchConfig::linear(1, THREADS), &mut y, 3).unwrap() };
        let mut found = vec![0.0; THREADS as usize];
        cuda.download(&mut found, &y, 0).unwrap();
        for (warp, found) in found.chunks(32).enumerate() {
            // Σ over m, n of Σ_k a[m][k] b[k][n] = Σ_k (Σ_m a[m][k]) (Σ_n b[k][n]); fragments as the PTX ISA draws them.
            let (mut a, mut b) = ([0.0f64; 16], [0.0f64; 16]);
            for lane in 0..32u32 {
                let thread = 32 * warp as u32 + lane;
                let column = 2 * (lane % 4) as usize;
                for i in 0..4 {
                    for k in 0..4 {
                        let pair = pair(thread * 32 + i * 4 + k);
                        let column = column + if k >= 2 { 8 } else { 0 };
                        (0..2).for_each(|half| a[column + half] += f64::from(pair[half]));
                    }
                    for k in 0..2 {
                        let pair = pair(thread * 32 + 16 + i * 2 + k);
                        (0..2).for_each(|half| b[column + 8 * k as usize + half] += f64::from(pair[half]));
                    }
                }
            }
            let expected: f64 = 3.0 * a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let sum: f64 = found.iter().map(|&v| f64::from(v)).sum();
            assert!((sum - expected).abs() <= 0.01 * expected.abs().max(100.0), "warp {warp}: {sum}, {expected}");
        }
    }

    #[test]
    fn the_simulator_finishes() {
        let Some(cuda) = sim() else { return };
        let found = measure(&cuda).unwrap();
        assert!(found.copy_bytes_per_s > 0.0 && found.mma_flops_per_s > 0.0, "{found:?}");
        assert!(found.launch_us > 0.0 && found.replayed_launch_us > 0.0, "{found:?}");
    }
}
