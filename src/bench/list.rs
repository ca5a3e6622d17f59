//! Every operation with its cost and a closure that runs it.

use rayon::prelude::*;

use super::{Workload, tokens};
use crate::backend::Tensor;
use crate::backend::cost::Cost;
use crate::error::Result;
use crate::model::batch::DeviceBatch;
use crate::model::block::BlockSpec;
use crate::model::{AnswerTokens, Batch, Heads, ModelConfig};
use crate::ops::{
    AdamWSpec, HeadRows, Lora, LoraGrad, Ops, Parameter, QkvWeights, Rope, SampleSpec, SampleTable, SlotTable, adamw,
    attention, decode, embed, gate_up, layer_norm, lm_head, lora, norm, qkv, score_head,
};

/// What is run: name, the least that it must do, and how to run it once more.
pub(crate) type Visit<'a> = dyn FnMut(&'static str, Cost, &mut dyn FnMut() -> Result<()>) -> Result<()> + 'a;

/// A model's layer, and a batch for it.
#[derive(Debug, Clone)]
pub struct Shape {
    pub config: ModelConfig,
    pub rank: usize,
    /// Packed sequences, each of `length` tokens, the first half of them prompt.
    pub groups: usize,
    pub length: usize,
    /// That decode at once, `length` tokens each in their caches.
    pub sequences: usize,
}

impl Shape {
    pub(crate) fn new(config: &ModelConfig, load: &Workload) -> Shape {
        let groups = (load.tokens / load.length).max(1);
        let (config, rank) = (config.clone(), load.rank);
        Shape { config, rank, groups, length: load.length, sequences: load.sequences }
    }

    fn batch(&self) -> Batch {
        let mut batch = Batch::default();
        for group in 0..self.groups {
            let ids = tokens(&self.config, group, self.length);
            let (prompt, answer) = ids.split_at(self.length / 2);
            batch.push(prompt, &[AnswerTokens::new(answer)], Heads::Targets);
        }
        batch
    }
}

/// Bytes of a stored activation.
fn act_bytes<B: Ops>() -> u64 {
    size_of::<B::Act>() as u64
}

/// Makes operands, each with numbers of its own.
struct Operands<'a, B: Ops> {
    ops: &'a B,
    rank: usize,
    made: u64,
}

impl<B: Ops> Operands<'_, B> {
    /// Never zeros: they are faster. Between -1 and 1.
    fn noise(&mut self, len: usize) -> Vec<f32> {
        self.made += 1;
        let seed = self.made << 40;
        let hash = |i: u64| (seed ^ i).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40;
        (0..len as u64).into_par_iter().map(|i| hash(i) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn act(&mut self, rows: usize, cols: usize) -> Result<Tensor<B>> {
        let values = self.noise(rows * cols);
        Tensor::from_host(self.ops, rows, cols, &self.ops.activations(&values))
    }

    fn numbers(&mut self, rows: usize, cols: usize) -> Result<Tensor<B, f32>> {
        let values = self.noise(rows * cols);
        Tensor::from_host(self.ops, rows, cols, &values)
    }

    /// Scaled so that outputs are as large as inputs.
    fn weight(&mut self, rows: usize, cols: usize) -> Result<B::Weight> {
        let (mut values, size) = (self.noise(rows * cols), (3.0 / cols as f32).sqrt());
        values.iter_mut().for_each(|value| *value *= size);
        self.ops.weight(rows, cols, values)
    }

    fn out(&self, rows: usize, cols: usize) -> Result<Tensor<B>> {
        Tensor::zeros(self.ops, rows, cols)
    }

    /// A product of `inputs` with an adapter on each of `parts`.
    fn product(&mut self, rows: usize, parts: &[usize], inputs: usize) -> Result<Product<B>> {
        let (outputs, rank, width) = (parts.iter().sum(), self.rank, parts.len() * self.rank);
        let (a, b) = (self.act(width, inputs)?, self.act(outputs, rank)?);
        Ok(Product {
            x: self.act(rows, inputs)?,
            y: self.out(rows, outputs)?,
            dy: self.act(rows, outputs)?,
            dx: self.out(rows, inputs)?,
            xa: self.out(rows, width)?,
            dxa: self.out(rows, width)?,
            w: self.weight(outputs, inputs)?,
            lora: Lora { parts: parts.to_vec(), rank, scale: 2.0, a, b },
            grad: LoraGrad { da: self.numbers(width, inputs)?, db: self.numbers(outputs, rank)? },
        })
    }
}

/// What a product with its adapter reads and writes, both ways.
struct Product<B: Ops> {
    x: Tensor<B>,   // (T, K)
    y: Tensor<B>,   // (T, N)
    dy: Tensor<B>,  // (T, N)
    dx: Tensor<B>,  // (T, K)
    xa: Tensor<B>,  // (T, P·r)
    dxa: Tensor<B>, // (T, P·r)
    w: B::Weight,   // (N, K)
    lora: Lora<B>,
    grad: LoraGrad<B>,
}

impl<B: Ops> Product<B> {
    /// Forward and backward.
    fn costs(&self) -> [Cost; 2] {
        let [t, n, k] = [self.x.rows(), self.y.cols(), self.x.cols()].map(|n| n as u64);
        let (parts, rank) = (self.lora.parts.len() as u64, self.lora.rank as u64);
        [lora::forward_cost, lora::backward_cost].map(|cost| cost(t, n, k, parts, rank, act_bytes::<B>()))
    }
}

/// Runs `visit` with each operation in the order of a step, then with those of generation. Operands are made and freed one
/// operation at a time.
pub fn each<B: Ops>(ops: &B, shape: &Shape, visit: &mut Visit) -> Result<()> {
    let operands = &mut Operands { ops, rank: shape.rank, made: 0 };
    let (config, spec) = (&shape.config, shape.config.block_spec(0));
    let batch = shape.batch();
    let mut tables = DeviceBatch::with_capacity(ops, batch.len())?;
    tables.set(ops, &batch)?;
    embedding(operands, config, &tables, visit)?;
    norms(operands, config, &spec, batch.len(), visit)?;
    qkv_both(operands, config, &spec, &tables, visit)?;
    attention_both(operands, &spec, &tables, visit)?;
    project_both(
        operands,
        ["project o, forward", "project o, backward"],
        [config.hidden_size, spec.attention.heads * spec.attention.head_dim],
        batch.len(),
        visit,
    )?;
    gate_up_both(operands, config, &spec, batch.len(), visit)?;
    project_both(
        operands,
        ["project down, forward", "project down, backward"],
        [config.hidden_size, config.intermediate_size],
        batch.len(),
        visit,
    )?;
    heads(operands, config, &tables, visit)?;
    optimiser(operands, config, visit)?;
    generation(ops, shape, visit)
}

fn embedding<B: Ops>(
    make: &mut Operands<B>,
    config: &ModelConfig,
    tables: &DeviceBatch<B>,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, rows, cols) = (make.ops, tables.tokens.rows(), config.hidden_size);
    let (table, mut x) = (make.weight(config.vocab_size, cols)?, make.out(rows, cols)?);
    let cost = embed::cost(rows as u64, cols as u64, act_bytes::<B>());
    visit("embed", cost, &mut || ops.embed(&mut x, &tables.tokens, &table))
}

fn norms<B: Ops>(
    make: &mut Operands<B>,
    config: &ModelConfig,
    spec: &BlockSpec,
    t: usize,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, c, act) = (make.ops, config.hidden_size, act_bytes::<B>());
    let (x, w, dy) = (make.act(t, c)?, make.act(1, c)?, make.act(t, c)?);
    let (mut y, mut rstd, mut dx) = (make.out(t, c)?, Tensor::zeros(ops, t, 1)?, make.act(t, c)?);
    let [forward, backward] = [norm::forward_cost, norm::backward_cost].map(|cost| cost(t as u64, c as u64, act));
    visit("norm, forward", forward, &mut || ops.norm_forward(&mut y, &mut rstd, &x, &w, spec.norm))?;
    visit("norm, backward", backward, &mut || ops.norm_backward(&mut dx, &dy, &x, &rstd, &w, spec.norm))?;
    let (bias, mut mean) = (make.act(1, c)?, Tensor::zeros(ops, t, 1)?);
    let costs = [layer_norm::forward_cost, layer_norm::backward_cost].map(|cost| cost(t as u64, c as u64, act));
    visit("layer_norm, forward", costs[0], &mut || {
        ops.layer_norm_forward(&mut y, &mut mean, &mut rstd, &x, &w, Some(&bias), spec.norm.eps)
    })?;
    visit("layer_norm, backward", costs[1], &mut || ops.layer_norm_backward(&mut dx, &dy, &x, &mean, &rstd, &w))
}

fn qkv_both<B: Ops>(
    make: &mut Operands<B>,
    config: &ModelConfig,
    spec: &BlockSpec,
    tables: &DeviceBatch<B>,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, t, spec) = (make.ops, tables.tokens.rows(), spec.qkv);
    let (e, positions) = (spec.head_dim, &tables.packing.positions);
    let parts = [spec.heads * e, spec.kv_heads * e, spec.kv_heads * e];
    let mut p = make.product(t, &parts, config.hidden_size)?;
    let rotate = qkv::rotate_cost(t as u64, spec.rotated() as u64, act_bytes::<B>());
    let costs = p.costs().map(|cost| cost + rotate);
    let bias = config.qkv_bias.then(|| make.act(1, spec.width())).transpose()?;
    let qk_norm = if config.qk_norm { Some((make.act(1, e)?, make.act(1, e)?)) } else { None };
    let mut raw = make.out(t, if config.qk_norm { spec.rotated() } else { 0 })?;
    let rope = Rope::new(ops, &config.rope.inv_freq(e), t)?;
    let weights = QkvWeights { w: p.w, bias, qk_norm };
    let lora = Some(&p.lora);
    visit("qkv, forward", costs[0], &mut || {
        ops.qkv_forward(&mut p.y, &mut p.xa, &mut raw, &p.x, &weights, lora, positions, &rope, spec)
    })?;
    visit("qkv, backward", costs[1], &mut || {
        let (dx, grad, dqkv, dxa) = (&mut p.dx, Some(&mut p.grad), &mut p.dy, &mut p.dxa);
        ops.qkv_backward(dx, grad, dqkv, dxa, &p.x, &p.xa, &raw, &weights, lora, positions, &rope, spec)
    })
}

fn attention_both<B: Ops>(
    make: &mut Operands<B>,
    spec: &BlockSpec,
    tables: &DeviceBatch<B>,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, packing, spec) = (make.ops, &tables.packing, spec.attention);
    let (t, columns) = (packing.rows(), spec.heads * spec.head_dim);
    let (qkv, d_o) = (make.act(t, spec.width())?, make.act(t, columns)?);
    let (mut o, mut dqkv) = (make.out(t, columns)?, make.out(t, spec.width())?);
    let mut lse = Tensor::zeros(ops, t, spec.heads)?;
    let [h, kv, e] = [spec.heads, spec.kv_heads, spec.head_dim].map(|n| n as u64);
    let [forward, backward] = [attention::forward_cost, attention::backward_cost]
        .map(|cost| cost(t as u64, packing.pairs(&spec), h, kv, e, act_bytes::<B>()));
    visit("attention, forward", forward, &mut || ops.attention_forward(&mut o, &mut lse, &qkv, packing, spec))?;
    visit("attention, backward", backward, &mut || {
        ops.attention_backward(&mut dqkv, &d_o, &o, &lse, &qkv, packing, spec)
    })
}

fn project_both<B: Ops>(
    make: &mut Operands<B>,
    names: [&'static str; 2],
    [outputs, inputs]: [usize; 2],
    t: usize,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, mut p) = (make.ops, make.product(t, &[outputs], inputs)?);
    let (residual, costs) = (make.act(t, outputs)?, p.costs());
    let (w, lora) = (&p.w, Some(&p.lora));
    let read = Cost { flops: 0, bytes: act_bytes::<B>() * (t * outputs) as u64 };
    visit(names[0], costs[0] + read, &mut || ops.project_forward(&mut p.y, &mut p.xa, &p.x, &residual, w, None, lora))?;
    visit(names[1], costs[1], &mut || {
        ops.project_backward(&mut p.dx, Some(&mut p.grad), &mut p.dxa, &p.dy, &p.x, &p.xa, w, lora)
    })
}

fn gate_up_both<B: Ops>(
    make: &mut Operands<B>,
    config: &ModelConfig,
    spec: &BlockSpec,
    t: usize,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, f, spec, act) = (make.ops, config.intermediate_size, spec.gate_up, act_bytes::<B>());
    let mut p = make.product(t, &[f, f], config.hidden_size)?;
    let (mut a, dact, costs) = (make.out(t, f)?, make.act(t, f)?, p.costs());
    let (w, lora) = (&p.w, Some(&p.lora));
    let activate = gate_up::activate_cost(t as u64, f as u64, spec, act);
    visit("gate_up, forward", costs[0] + activate, &mut || {
        ops.gate_up_forward(&mut a, &mut p.y, &mut p.xa, &p.x, w, None, lora, spec)
    })?;
    visit("gate_up, activation", activate, &mut || ops.activate(&mut a, &p.y, spec))?;
    // Backward turns gate and up into their gradients in place; they are put back first, which is charged.
    let len = t * p.y.stride();
    let copy = Cost { flops: 0, bytes: act * 2 * len as u64 };
    let back = gate_up::activate_backward_cost(t as u64, f as u64, spec, act) + copy;
    visit("gate_up, backward", costs[1] + back, &mut || {
        ops.copy(&mut p.dy.buffer, 0, &p.y.buffer, 0, len)?;
        ops.gate_up_backward(&mut p.dx, Some(&mut p.grad), &mut p.dy, &mut p.dxa, &dact, &p.x, &p.xa, w, lora, spec)
    })
}

/// Both heads, whatever the model's own: a policy's over every target, a reward model's over as many rows.
fn heads<B: Ops>(
    make: &mut Operands<B>,
    config: &ModelConfig,
    tables: &DeviceBatch<B>,
    visit: &mut Visit,
) -> Result<()> {
    let (ops, rows, vocab, c, act) =
        (make.ops, tables.rows.rows(), config.vocab_size, config.hidden_size, act_bytes::<B>());
    let (h, mut dh, w) = (make.act(rows, c)?, make.out(rows, c)?, make.weight(vocab, c)?);
    let (mut out, mut chunk) = (HeadRows::with_capacity(ops, rows)?, make.out(B::lm_head_chunk(vocab), vocab)?);
    let sizes = [rows, vocab, c].map(|n| n as u64);
    let [forward, both] = [lm_head::forward_cost, lm_head::cost].map(|cost| cost(sizes[0], sizes[1], sizes[2], act));
    visit("lm_head, forward", forward, &mut || {
        ops.lm_head_forward(&mut out, None, &mut chunk, &h, &tables.targets, &w)
    })?;
    visit("lm_head, both ways", both, &mut || {
        ops.lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &h, &tables.targets, &w)
    })?;
    let (w, mut r, dr) = (make.numbers(1, c)?, make.numbers(rows, 1)?, make.numbers(rows, 1)?);
    let mut dw = make.numbers(1, c)?;
    let [forward, backward] =
        [score_head::forward_cost, score_head::backward_cost].map(|cost| cost(sizes[0], 1, sizes[2], act));
    visit("score_head, forward", forward, &mut || ops.score_forward(&mut r, &h, &w))?;
    visit("score_head, backward", backward, &mut || ops.score_backward(&mut dh, Some(&mut dw), &dr, &h, &w))
}

/// One adapter of the feed-forward's width.
fn optimiser<B: Ops>(make: &mut Operands<B>, config: &ModelConfig, visit: &mut Visit) -> Result<()> {
    let (ops, rows, cols) = (make.ops, 2 * make.rank, config.hidden_size.max(config.intermediate_size));
    let (mut master, mut m, grad) = (make.numbers(rows, cols)?, make.numbers(rows, cols)?, make.numbers(rows, cols)?);
    let squares: Vec<f32> = make.noise(rows * cols).into_iter().map(f32::abs).collect();
    let (mut v, mut operand) = (Tensor::from_host(ops, rows, cols, &squares)?, make.out(rows, cols)?);
    let mut norm = Tensor::zeros(ops, 1, 1)?;
    let spec = AdamWSpec { lr: 1e-9, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.0, clip: 1.0, step: 9 };
    visit("adamw", adamw::cost((rows * cols) as u64, act_bytes::<B>()), &mut || {
        let operand = Some((&mut operand, 2.0));
        ops.adamw(&mut norm, &mut [Parameter { master: &mut master, m: &mut m, v: &mut v, grad: &grad, operand }], spec)
    })
}

/// One step of generation: attention through the cache, and the draw with its logits.
pub fn generation<B: Ops>(ops: &B, shape: &Shape, visit: &mut Visit) -> Result<()> {
    let make = &mut Operands { ops, rank: 0, made: 0 };
    let (rows, spec, act) = (shape.sequences, shape.config.block_spec(0).attention, act_bytes::<B>());
    let (vocab, c, length) = (shape.config.vocab_size, shape.config.hidden_size, shape.length);
    let mut cache = ops.kv_cache(rows, length, spec)?;
    let mut table = SlotTable::with_capacity(ops, rows)?;
    let (y, mut o) = (make.act(rows, spec.width())?, make.out(rows, spec.heads * spec.head_dim)?);
    for at in 0..length {
        table.set(ops, &(0..rows as u32).collect::<Vec<_>>(), &vec![at as u32; rows])?;
        ops.cache_append(&mut cache, &y, &table, spec)?;
    }
    let cost = decode::cost(rows as u64, (rows * length.min(spec.window.unwrap_or(length))) as u64, &spec, act);
    visit("decode", cost, &mut || {
        ops.cache_append(&mut cache, &y, &table, spec)?;
        ops.decode_attention(&mut o, &y, &cache, &table, spec)
    })?;
    let (h, w, mut logits) = (make.act(rows, c)?, make.weight(vocab, c)?, Tensor::zeros(ops, rows, vocab)?);
    let mut keys = SampleTable::with_capacity(ops, rows)?;
    keys.set(ops, &(0..rows as u64).collect::<Vec<_>>(), &vec![length as u32; rows])?;
    let mut next = Tensor::zeros(ops, rows, 1)?;
    let written = Cost { flops: 0, bytes: 8 * (rows * vocab) as u64 };
    let cost = lm_head::forward_cost(rows as u64, vocab as u64, c as u64, act) + written;
    for (name, temperature, top_k, top_p) in [("sample, greedy", 0.0, 0, 1.0), ("sample, top-k top-p", 1.0, 50, 0.95)] {
        let spec = SampleSpec { temperature, top_k, top_p, seed: 1 };
        visit(name, cost, &mut || ops.sample(&mut next, &mut logits, &h, &keys, &w, spec))?;
    }
    Ok(())
}
