//! The CPU's rates, on all threads of the pool.

use std::hint::black_box;
use std::time::Instant;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Measured, Rates};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::Cost;

/// Bytes in all of a copy beyond the caches of today's machines.
const BEYOND_CACHES: u64 = 1 << 28;

/// Measured now.
pub fn cpu_rates() -> Rates {
    Rates { matrix_flops_per_s: matrix_rate(), copy_bytes_per_s: copy_rate(BEYOND_CACHES) }
}

/// FLOP/s of f32 multiply-adds alone, numbers in registers, on all threads: no product can be faster.
pub fn matrix_rate() -> f64 {
    let arch = pulp::Arch::new();
    let mut flops = 0;
    let seconds = best(5, || flops = rayon::broadcast(|_| black_box(arch.dispatch(MultiplyAdds)).0).iter().sum());
    flops as f64 / seconds
}

/// Returns what was done, and the result, so that it is.
struct MultiplyAdds;

impl WithSimd for MultiplyAdds {
    type Output = (usize, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (usize, f32) {
        /// Two results a cycle, each after four or five: enough of them under way, and few enough for sixteen registers.
        const CHAINS: usize = 12;
        const ROUNDS: usize = 1 << 20;
        let (factor, term) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(1e-3)));
        let mut sums = [simd.splat_f32s(1.0); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, factor, term);
            }
        }
        let sum = sums.iter().map(|sum| simd.reduce_sum_f32s(*sum)).sum();
        (2 * CHAINS * ROUNDS * S::F32_LANES, sum)
    }
}

/// Bytes per second of a copy that moves `bytes` in all, those read and those written counted each: what fits a cache is copied
/// within it.
pub fn copy_rate(bytes: u64) -> f64 {
    let half = (bytes as usize / 8).clamp(1 << 12, 1 << 26);
    let (from, mut to) = (filled(half), vec![0.0f32; half]);
    // What fits a core's own cache is copied by one thread: waking another would cost more than the copy.
    let chunk = if half < 1 << 17 { half } else { half.div_ceil(rayon::current_num_threads()) };
    let tries = if bytes < BEYOND_CACHES { 20 } else { 5 };
    let seconds = best(tries, || {
        if chunk == half {
            to.copy_from_slice(&from);
        } else {
            to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        black_box(&mut to);
    });
    (8 * half) as f64 / seconds
}

/// Numbers that are neither zero nor alike: nothing is timed on zeros.
fn filled(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

/// The shortest of `tries` runs, in seconds.
fn best(tries: usize, mut run: impl FnMut()) -> f64 {
    let mut time = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..tries).map(|_| time()).fold(f64::INFINITY, f64::min)
}

impl Measured for Cpu {
    fn rates(&self) -> Result<Option<Rates>> {
        Ok(Some(cpu_rates()))
    }

    /// An operation that fits a cache stays in it from run to run, so bytes count at the rate of a copy of as many.
    fn floor(&self, rates: &Rates, cost: Cost) -> f64 {
        let copied = Rates { copy_bytes_per_s: copy_rate(cost.bytes), ..*rates };
        copied.floor(cost)
    }
}
