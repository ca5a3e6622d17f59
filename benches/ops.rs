//! Each operation as a share of its bound: the time that the operation's own `cost` needs at rates measured here, on this
//! machine and beside it (f32 products for FLOPs; a copy of as many bytes for bytes), divided by the time it took.
//!
//! `cargo bench --bench ops -- attention` runs those whose name holds `attention`. The shares are printed at the end.

#[path = "../tests/common/mod.rs"]
mod common;
mod rates;

use std::time::Duration;

use ares::backend::{Cpu, Tensor};
use ares::ops::*;
use common::*;
use criterion::{Criterion, criterion_group, criterion_main};
use rates::Bench;

/// A model's layer and a batch for it.
struct Shape {
    name: &'static str,
    rows: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    features: usize,
    vocab: usize,
    rank: usize,
    groups: usize,
}

const SHAPES: &[Shape] = &[
    // The suite's models, 32 sequences of 31 + 25 tokens.
    Shape {
        name: "suite",
        rows: 1792,
        hidden: 128,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        features: 352,
        vocab: 1024,
        rank: 8,
        groups: 32,
    },
    // A model of half a billion parameters (Qwen2.5-0.5B), 8 sequences of 31 + 25 tokens.
    Shape {
        name: "0.5B",
        rows: 448,
        hidden: 896,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        features: 4864,
        vocab: 151_936,
        rank: 16,
        groups: 8,
    },
];

const ACT: u64 = size_of::<f32>() as u64;

fn ops(criterion: &mut Criterion) {
    let mut bench = Bench::new(criterion);
    for shape in SHAPES {
        norm(&mut bench, shape);
        layer_norm(&mut bench, shape);
        products(&mut bench, shape);
        attention(&mut bench, shape);
        lm_head(&mut bench, shape);
        adamw(&mut bench, shape);
        for rows in [1, 8, 64] {
            decode(&mut bench, shape, rows);
        }
    }
    bench.print();
}

fn matrix(seed: u64, rows: usize, cols: usize) -> Tensor<Cpu> {
    tensor(cols, &noise(seed, rows * cols))
}

fn norm(bench: &mut Bench, shape: &Shape) {
    let (cpu, t, c) = (Cpu::new(), shape.rows, shape.hidden);
    let (x, w, dy) = (matrix(1, t, c), matrix(2, 1, c), matrix(3, t, c));
    let (mut y, mut rstd, mut dx) = (nans(t, c), nans(t, 1), matrix(4, t, c));
    let spec = NormSpec { eps: 1e-5, unit_offset: false };
    let name = |direction| format!("{}/norm/{direction}", shape.name);
    bench.time(&name("forward"), norm::forward_cost(t as u64, c as u64, ACT), || {
        cpu.norm_forward(&mut y, &mut rstd, &x, &w, spec).unwrap();
    });
    bench.time(&name("backward"), norm::backward_cost(t as u64, c as u64, ACT), || {
        cpu.norm_backward(&mut dx, &dy, &x, &rstd, &w, spec).unwrap();
    });
}

fn layer_norm(bench: &mut Bench, shape: &Shape) {
    let (cpu, t, c) = (Cpu::new(), shape.rows, shape.hidden);
    let (x, w, bias, dy) = (matrix(1, t, c), matrix(2, 1, c), matrix(3, 1, c), matrix(4, t, c));
    let (mut y, mut mean, mut rstd, mut dx) = (nans(t, c), nans(t, 1), nans(t, 1), matrix(5, t, c));
    let name = |direction| format!("{}/layer_norm/{direction}", shape.name);
    bench.time(&name("forward"), layer_norm::forward_cost(t as u64, c as u64, ACT), || {
        cpu.layer_norm_forward(&mut y, &mut mean, &mut rstd, &x, &w, Some(&bias), 1e-5).unwrap();
    });
    bench.time(&name("backward"), layer_norm::backward_cost(t as u64, c as u64, ACT), || {
        cpu.layer_norm_backward(&mut dx, &dy, &x, &mean, &rstd, &w).unwrap();
    });
}

/// A product with LoRA: x, its output's gradient, and all that forward and backward write.
struct Product {
    parts: Vec<usize>,
    x: Tensor<Cpu>,
    y: Tensor<Cpu>,
    dy: Tensor<Cpu>,
    dx: Tensor<Cpu>,
    xa: Tensor<Cpu>,
    dxa: Tensor<Cpu>,
    lora: Lora<Cpu>,
    grad: LoraGrad<Cpu>,
    w: Vec<f32>,
}

impl Product {
    fn new(rows: usize, parts: &[usize], inputs: usize, rank: usize) -> Product {
        let (outputs, masters) = (parts.iter().sum::<usize>(), Masters::noise(10, parts, inputs, rank));
        let width = masters.width();
        Product {
            parts: parts.to_vec(),
            x: matrix(11, rows, inputs),
            y: nans(rows, outputs),
            dy: matrix(12, rows, outputs),
            dx: nans(rows, inputs),
            xa: nans(rows, width),
            dxa: nans(rows, width),
            lora: masters.lora(),
            grad: masters.grad(13),
            w: noise(14, outputs * inputs),
        }
    }

    /// Rows, outputs, inputs, parts, rank.
    fn sizes(&self) -> (u64, u64, u64, u64, u64) {
        let (t, k) = self.x.shape();
        (t as u64, self.y.cols() as u64, k as u64, self.parts.len() as u64, self.lora.rank as u64)
    }

    fn forward_cost(&self) -> Cost {
        let (t, n, k, parts, r) = self.sizes();
        lora::forward_cost(t, n, k, parts, r, ACT)
    }

    fn backward_cost(&self) -> Cost {
        let (t, n, k, parts, r) = self.sizes();
        lora::backward_cost(t, n, k, parts, r, ACT)
    }
}

struct QkvBench {
    product: Product,
    spec: QkvSpec,
    weights: QkvWeights<Cpu>,
    rope: Rope<Cpu>,
    positions: Tensor<Cpu, u32>,
    raw: Tensor<Cpu>,
}

impl QkvBench {
    fn new(shape: &Shape, rows: usize) -> QkvBench {
        let norm = NormSpec { eps: 1e-5, unit_offset: false };
        let spec = QkvSpec { heads: shape.heads, kv_heads: shape.kv_heads, head_dim: shape.head_dim, norm };
        let kv = spec.kv_heads * spec.head_dim;
        let product = Product::new(rows, &[spec.heads * spec.head_dim, kv, kv], shape.hidden, shape.rank);
        let freqs: Vec<f32> = (0..spec.head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
        let weights = QkvWeights { w: weight(spec.width(), &product.w), bias: None, qk_norm: None };
        let positions = indices(&(0..rows as u32).map(|t| t % 56).collect::<Vec<_>>());
        QkvBench {
            spec,
            weights,
            rope: Rope::new(&Cpu::new(), &freqs, 64).unwrap(),
            positions,
            raw: nans(rows, 0),
            product,
        }
    }

    fn cost(&self, product: Cost) -> Cost {
        product + qkv::rotate_cost(self.product.x.rows() as u64, self.spec.rotated() as u64, ACT)
    }

    fn forward(&mut self) {
        let (p, cpu) = (&mut self.product, Cpu::new());
        #[rustfmt::skip]
        cpu.qkv_forward(
            &mut p.y, &mut p.xa, &mut self.raw,
            &p.x, &self.weights, Some(&p.lora), &self.positions, &self.rope, self.spec,
        ).unwrap();
    }

    fn backward(&mut self) {
        let (p, cpu) = (&mut self.product, Cpu::new());
        #[rustfmt::skip]
        cpu.qkv_backward(
            &mut p.dx, Some(&mut p.grad), &mut p.dy, &mut p.dxa,
            &p.x, &p.xa, &self.raw, &self.weights, Some(&p.lora), &self.positions, &self.rope, self.spec,
        ).unwrap();
    }
}

fn products(bench: &mut Bench, shape: &Shape) {
    let (cpu, t) = (Cpu::new(), shape.rows);
    let name = |op: &str| format!("{}/{op}", shape.name);
    let mut qkv = QkvBench::new(shape, t);
    let (forward, backward) = (qkv.cost(qkv.product.forward_cost()), qkv.cost(qkv.product.backward_cost()));
    bench.time(&name("qkv/forward"), forward, || qkv.forward());
    bench.time(&name("qkv/backward"), backward, || qkv.backward());

    let mut p = Product::new(t, &[shape.features; 2], shape.hidden, shape.rank);
    let w = weight(2 * shape.features, &p.w);
    let mut act = nans(t, shape.features);
    let activate = gate_up::activate_cost(t as u64, shape.features as u64, ACT);
    bench.time(&name("gate_up/forward"), p.forward_cost() + activate, || {
        cpu.gate_up_forward(&mut act, &mut p.y, &mut p.xa, &p.x, &w, Some(&p.lora), Activation::Silu).unwrap();
    });
    bench.time(&name("gate_up/activate"), activate, || cpu.activate(&mut act, &p.y, Activation::Silu).unwrap());
    let (dact, saved) = (matrix(15, t, shape.features), p.y.buffer.clone());
    bench.time(&name("gate_up/backward"), p.backward_cost() + activate, || {
        p.y.buffer.copy_from_slice(&saved); // turned into its gradient in place
        let (dx, grad, both, dxa) = (&mut p.dx, Some(&mut p.grad), &mut p.y, &mut p.dxa);
        cpu.gate_up_backward(dx, grad, both, dxa, &dact, &p.x, &p.xa, &w, Some(&p.lora), Activation::Silu).unwrap();
    });

    let mut p = Product::new(t, &[shape.hidden], shape.features, shape.rank);
    let w = weight(shape.hidden, &p.w);
    let residual = matrix(16, t, shape.hidden);
    bench.time(&name("project/forward"), p.forward_cost(), || {
        cpu.project_forward(&mut p.y, &mut p.xa, &p.x, &residual, &w, Some(&p.lora)).unwrap();
    });
    bench.time(&name("project/backward"), p.backward_cost(), || {
        let (dx, grad, dxa) = (&mut p.dx, Some(&mut p.grad), &mut p.dxa);
        cpu.project_backward(dx, grad, dxa, &p.dy, &p.x, &p.xa, &w, Some(&p.lora)).unwrap();
    });
}

fn attention_spec(shape: &Shape) -> AttentionSpec {
    let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window: None,
        softcap: None,
        causal: true,
    }
}

fn attention(bench: &mut Bench, shape: &Shape) {
    let (cpu, spec) = (Cpu::new(), attention_spec(shape));
    let packing = packing(&vec![(31, &[25][..]); shape.groups]);
    let (rows, columns) = (packing.rows(), shape.heads * shape.head_dim);
    let (qkv, d_o) = (matrix(20, rows, spec.width()), matrix(21, rows, columns));
    let (mut o, mut lse, mut dqkv) = (nans(rows, columns), nans(rows, shape.heads), nans(rows, spec.width()));
    let pairs = (shape.groups * 56 * 57 / 2) as u64;
    let sizes = [shape.heads, shape.kv_heads, shape.head_dim].map(|n| n as u64);
    let [h, kv, e] = sizes;
    let name = |direction| format!("{}/attention/{direction}", shape.name);
    bench.time(&name("forward"), attention::forward_cost(rows as u64, pairs, h, kv, e, ACT), || {
        cpu.attention_forward(&mut o, &mut lse, &qkv, &packing, spec).unwrap();
    });
    bench.time(&name("backward"), attention::backward_cost(rows as u64, pairs, h, kv, e, ACT), || {
        cpu.attention_backward(&mut dqkv, &d_o, &o, &lse, &qkv, &packing, spec).unwrap();
    });
}

fn lm_head(bench: &mut Bench, shape: &Shape) {
    let (cpu, c, vocab) = (Cpu::new(), shape.hidden, shape.vocab);
    let rows = shape.groups * 25;
    let (h, w) = (matrix(30, rows, c), weight(vocab, &noise(31, vocab * c)));
    let targets = indices(&(0..rows as u32).map(|r| r * 37 % vocab as u32).collect::<Vec<_>>());
    let mut out = HeadRows::with_capacity(&cpu, rows).unwrap();
    let (mut chunk, mut dh) = (nans(Cpu::lm_head_chunk(vocab), vocab), nans(rows, c));
    let cost = lm_head::cost(rows as u64, vocab as u64, c as u64, ACT);
    bench.time(&format!("{}/lm_head", shape.name), cost, || {
        cpu.lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &h, &targets, &w).unwrap();
    });
}

/// One adapter of `hidden` × `features` with its four other tensors: seven reads and writes of each number.
fn adamw(bench: &mut Bench, shape: &Shape) {
    let (cpu, cols, rows) = (Cpu::new(), shape.hidden, shape.features);
    let part = |seed| parameter(cols, &noise(seed, rows * cols));
    let (mut master, mut m, mut v, grad, mut operand) = (part(40), part(41), part(42), part(43), part(44));
    v.buffer.iter_mut().for_each(|v| *v = v.abs());
    let mut norm = nans(1, 1);
    let spec = AdamWSpec { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, decay: 0.0, clip: 1.0, step: 3 };
    let cost = Cost { flops: 0, bytes: 8 * ACT * (rows * cols) as u64 };
    bench.time(&format!("{}/adamw", shape.name), cost, || {
        let operand = Some((&mut operand, 2.0));
        let parameter = Parameter { master: &mut master, m: &mut m, v: &mut v, grad: &grad, operand };
        cpu.adamw(&mut norm, &mut [parameter], spec).unwrap();
    });
}

/// One step of generation, `rows` sequences of 56 tokens: q∣k∣v, attention through the cache, the draw.
fn decode(bench: &mut Bench, shape: &Shape, rows: usize) {
    let (cpu, spec) = (Cpu::new(), attention_spec(shape));
    let name = |op: &str| format!("{}/{op}/{rows} rows", shape.name);
    let mut qkv = QkvBench::new(shape, rows);
    let cost = qkv.cost(qkv.product.forward_cost());
    bench.time(&name("qkv"), cost, || qkv.forward());

    let mut cache = cpu.kv_cache(rows, 96, spec).unwrap();
    let mut table = SlotTable::with_capacity(&cpu, rows).unwrap();
    table.set(&cpu, &(0..rows as u32).collect::<Vec<_>>(), &vec![55; rows]).unwrap();
    let mut o = nans(rows, shape.heads * shape.head_dim);
    let y = matrix(50, rows, spec.width());
    let cost = decode::cost(rows as u64, rows as u64 * 56, &spec, ACT);
    bench.time(&name("decode"), cost, || {
        cpu.cache_append(&mut cache, &y, &table, spec).unwrap();
        cpu.decode_attention(&mut o, &y, &cache, &table, spec).unwrap();
    });

    let (h, w) = (matrix(51, rows, shape.hidden), weight(shape.vocab, &noise(52, shape.vocab * shape.hidden)));
    let mut keys = SampleTable::with_capacity(&cpu, rows).unwrap();
    keys.set(&cpu, &(0..rows as u64).collect::<Vec<_>>(), &vec![5; rows]).unwrap();
    let (mut tokens, mut logits) = (indices(&vec![0; rows]), nans(rows, shape.vocab));
    let product = lora::forward_cost(rows as u64, shape.vocab as u64, shape.hidden as u64, 0, 0, ACT);
    for (kind, spec) in [
        ("greedy", SampleSpec { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 }),
        ("temperature", SampleSpec { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1 }),
        ("top-k top-p", SampleSpec { temperature: 1.0, top_k: 50, top_p: 0.95, seed: 1 }),
    ] {
        bench.time(&name(&format!("sample {kind}")), product, || {
            cpu.sample(&mut tokens, &mut logits, &h, &keys, &w, spec).unwrap();
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    targets = ops
}
criterion_main!(benches);
