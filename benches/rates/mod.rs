//! What this machine can do, measured beside what is judged by it.

use std::cell::Cell;
use std::hint::black_box;
use std::time::Instant;

use ares::ops::Cost;
use criterion::Criterion;
use rayon::prelude::*;

/// criterion with the bound beside it. The matrix rate is measured again beside every one and the best one counts, so that a
/// busy moment of the machine flatters nobody.
pub struct Bench<'a> {
    criterion: &'a mut Criterion,
    matrix_rate: f64,
    /// Name, cost, seconds of a copy of as many bytes, seconds of what was timed.
    results: Vec<(String, Cost, f64, f64)>,
}

impl<'a> Bench<'a> {
    pub fn new(criterion: &'a mut Criterion) -> Self {
        Bench { criterion, matrix_rate: 0.0, results: Vec::new() }
    }

    /// Times `run`, unless the command line names others only.
    pub fn time(&mut self, name: &str, cost: Cost, mut run: impl FnMut()) {
        let fastest = Cell::new(f64::INFINITY);
        self.criterion.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let start = Instant::now();
                (0..count).for_each(|_| run());
                let all = start.elapsed();
                fastest.set(fastest.get().min(all.as_secs_f64() / count as f64));
                all
            });
        });
        if fastest.get().is_finite() {
            self.matrix_rate = self.matrix_rate.max(matrix_rate());
            let copy = cost.bytes as f64 / copy_rate(cost.bytes);
            self.results.push((name.to_string(), cost, copy, fastest.get()));
        }
    }

    /// Every share, and the rate that it is a share of.
    pub fn print(&self) {
        println!("\nmatrix rate {:.0} GFLOP/s on {} threads", self.matrix_rate / 1e9, rayon::current_num_threads());
        for (name, cost, copy, seconds) in &self.results {
            let products = cost.flops as f64 / self.matrix_rate;
            let (bound, of) = if products > *copy { (products, "matrix rate") } else { (*copy, "copy bandwidth") };
            println!("{name:40} {:9.1} us {:6.1} % of {of}", 1e6 * seconds, 100.0 * bound / seconds);
        }
    }
}

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
