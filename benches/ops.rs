//! Each operation as a share of its bound: the time that the operation's own `cost` needs at rates measured here, on this
//! machine and beside it (f32 products for FLOPs; a copy of as many bytes for bytes), divided by the time it took.
//!
//! `cargo bench --bench ops -- attention` runs those whose name holds `attention`. The shares are printed at the end. The list of
//! operations is that of `ares bench ops`, which times them on any device.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use ares::backend::Cpu;
use ares::bench::ops::{Shape, each, generation};
use ares::model::ModelConfig;
use ares::ops::Cost;
use ares::ops::ceilings::{copy_rate, matrix_rate};
use criterion::{Criterion, criterion_group, criterion_main};

/// Qwen2.5-0.5B.
const HALF_A_BILLION: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": true, "eos_token_id": 151645}"#;

/// Of prompt and answer.
const LENGTH: usize = 56;

fn ops(criterion: &mut Criterion) {
    let mut bench = Bench { criterion, matrix_rate: 0.0, results: Vec::new() };
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/framing/policy");
    let half = ModelConfig::parse(Path::new("config.json"), HALF_A_BILLION).unwrap();
    for (model, config, rank, groups) in [("suite", ModelConfig::open(&suite).unwrap(), 8, 32), ("0.5B", half, 16, 8)] {
        let mut shape = Shape { config, rank, groups, length: LENGTH, sequences: 64 };
        each(&Cpu::new(), &shape, &mut |op, cost, run| {
            bench.time(&format!("{model}/{op}"), cost, || run().unwrap());
            Ok(())
        })
        .unwrap();
        for rows in [1, 8] {
            shape.sequences = rows;
            generation(&Cpu::new(), &shape, &mut |op, cost, run| {
                bench.time(&format!("{model}/{op}/{rows} rows"), cost, || run().unwrap());
                Ok(())
            })
            .unwrap();
        }
    }
    bench.print();
}

/// criterion with the bound beside it. The matrix rate is measured again beside every one and the best one counts, so that a
/// busy moment of the machine flatters nobody.
struct Bench<'a> {
    criterion: &'a mut Criterion,
    matrix_rate: f64,
    /// Name, cost, seconds of a copy of as many bytes, seconds of what was timed.
    results: Vec<(String, Cost, f64, f64)>,
}

impl Bench<'_> {
    /// Times `run`, unless the command line names others only.
    fn time(&mut self, name: &str, cost: Cost, mut run: impl FnMut()) {
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
    fn print(&self) {
        println!("\nmatrix rate {:.0} GFLOP/s on {} threads", self.matrix_rate / 1e9, rayon::current_num_threads());
        for (name, cost, copy, seconds) in &self.results {
            let products = cost.flops as f64 / self.matrix_rate;
            let (bound, of) = if products > *copy { (products, "matrix rate") } else { (*copy, "copy bandwidth") };
            println!("{name:40} {:9.1} us {:6.1} % of {of}", 1e6 * seconds, 100.0 * bound / seconds);
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    targets = ops
}
criterion_main!(benches);
