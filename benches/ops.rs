//! Each operation as a share of its bound: the time that the operation's own `cost` needs at rates measured here, on this
//! machine and beside it (f32 products for FLOPs; a copy of as many bytes for bytes), divided by the time it took.
//!
//! `cargo bench --bench ops -- attention` runs those whose name holds `attention`. The shares are printed at the end. The list of
//! operations is that of `ares bench ops`, which times them on any device.

mod rates;

use std::path::Path;
use std::time::Duration;

use ares::backend::Cpu;
use ares::bench::ops::{Shape, each, generation};
use ares::model::ModelConfig;
use criterion::{Criterion, criterion_group, criterion_main};
use rates::Bench;

/// Qwen2.5-0.5B.
const HALF_A_BILLION: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": true, "eos_token_id": 151645}"#;

/// Of prompt and answer.
const LENGTH: usize = 56;

fn ops(criterion: &mut Criterion) {
    let mut bench = Bench::new(criterion);
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

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    targets = ops
}
criterion_main!(benches);
