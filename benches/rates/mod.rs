//! What this machine can do, measured beside what is judged by it.

use std::cell::Cell;
use std::time::Instant;

use ares::ops::Cost;
use ares::ops::ceilings::{copy_rate, matrix_rate};
use criterion::Criterion;

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
