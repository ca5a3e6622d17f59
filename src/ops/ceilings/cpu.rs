//! The CPU's rates, on all threads of the pool.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::{Rated, Rates};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::Cost;

/// m, k, n of the f32 product that is timed.
pub const PRODUCT: [usize; 3] = [1024, 512, 2816];
/// Bytes in all of a copy beyond the caches of today's machines.
const BEYOND_CACHES: u64 = 1 << 28;

/// Measured now.
pub fn cpu_rates() -> Rates {
    Rates { matrix_flops_per_s: matrix_rate(), copy_bytes_per_s: copy_rate(BEYOND_CACHES) }
}

/// FLOP/s of f32 products as the `gemm` crate makes them, free to choose its blocks.
pub fn matrix_rate() -> f64 {
    let [m, k, n] = PRODUCT;
    let (a, b, mut c) = (filled(m * k), filled(k * n), vec![0.0f32; m * n]);
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    let seconds = best(5, || {
        // SAFETY: the three matrices have the sizes and strides given.
        unsafe {
            #[rustfmt::skip]
            gemm::gemm(
                m, n, k, c.as_mut_ptr(), 1, n as isize, false,
                a.as_ptr(), 1, k as isize, b.as_ptr(), 1, n as isize,
                0.0, 1.0, false, false, false, threads,
            );
        }
        black_box(&mut c);
    });
    (2 * m * k * n) as f64 / seconds
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

impl Rated for Cpu {
    fn rates(&self) -> Result<Option<Rates>> {
        Ok(Some(cpu_rates()))
    }

    /// An operation that fits a cache stays in it from run to run, so bytes count at the rate of a copy of as many.
    fn floor(&self, rates: &Rates, cost: Cost) -> f64 {
        let copied = Rates { copy_bytes_per_s: copy_rate(cost.bytes), ..*rates };
        copied.floor(cost)
    }
}
