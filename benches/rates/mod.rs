//! What this machine can do, measured beside what is judged by it.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Numbers that are neither zero nor alike: nothing is timed on zeros.
fn filled(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

/// FLOP/s of f32 products of 1024 × 512 × 2816 on all threads.
pub fn matrix_rate() -> f64 {
    let (m, k, n) = (1024, 512, 2816);
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

/// Bytes per second of a copy on all threads that moves `bytes` in all: what fits a cache is copied within it.
pub fn copy_rate(bytes: u64) -> f64 {
    let half = (bytes as usize / 8).clamp(1 << 12, 1 << 26);
    let (from, mut to) = (filled(half), vec![0.0f32; half]);
    // What fits a core's own cache is copied by one thread: waking another would cost more than the copy.
    let chunk = if half < 1 << 17 { half } else { half.div_ceil(rayon::current_num_threads()) };
    let seconds = best(20, || {
        if chunk == half {
            to.copy_from_slice(&from);
        } else {
            to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
        }
        black_box(&mut to);
    });
    (8 * half) as f64 / seconds
}

/// The shortest of `tries` runs, in seconds.
pub fn best(tries: usize, mut run: impl FnMut()) -> f64 {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..tries).map(|_| time(&mut run)).fold(f64::INFINITY, f64::min)
}
