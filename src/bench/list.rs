//! Every operation with its cost and a closure that runs it.

use rayon::prelude::*;

use super::{Workload, tokens};
use crate::backend::cost::Cost;
use crate::backend::{Indices, Tensor};
use crate::error::Result;
use crate::model::batch::DeviceBatch;
use crate::model::{AnswerTokens, Batch, Heads, ModelConfig};
use crate::ops::{
    AdamWSpec, AttentionBackward, AttentionForward, DecodeAttention, HeadRows, LayerNormBackward, LayerNormForward,
    LinearBackward, LinearForward, LinearGradients, LinearWeights, LmHeadForward, Lora, LoraGrad, NormBackward,
    NormForward, Ops, Parameter, Rope, Rotation, SampleSpec, SampleTable, SampleTokens, ScoreBackward, SlotTable,
    adamw, attention, decode, gate_up, layer_norm, lm_head, lora, norm, qkv, rows, score_head,
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

/// What a product with its adapter reads and writes, both ways.
struct ProductOperands<B: Ops> {
    x: Tensor<B>,   // (T, K)
    y: Tensor<B>,   // (T, N)
    dy: Tensor<B>,  // (T, N)
    dx: Tensor<B>,  // (T, K)
    xa: Tensor<B>,  // (T, P·r)
    dxa: Tensor<B>, // (T, P·r)
    w: B::Weight,   // (N, K)
    bias: Option<Tensor<B>>,
    lora: Lora<B>,
    grad: LoraGrad<B>,
}

impl<B: Ops> ProductOperands<B> {
    /// Forward and backward.
    fn costs(&self) -> [Cost; 2] {
        let [t, n, k] = [self.x.rows(), self.y.cols(), self.x.cols()].map(|n| n as u64);
        let (parts, rank) = (self.lora.parts.len() as u64, self.lora.rank as u64);
        lora::costs(t, n, k, parts, rank, size_of::<B::Act>() as u64)
    }

    fn forward(&mut self) -> LinearForward<'_, B> {
        let weights = LinearWeights { w: &self.w, bias: self.bias.as_ref(), lora: Some(&self.lora) };
        LinearForward { y: &mut self.y, xa: &mut self.xa, x: &self.x, weights }
    }

    /// With the gradient that it goes on from.
    fn backward(&mut self) -> (LinearBackward<'_, B>, &mut Tensor<B>) {
        let weights = LinearWeights { w: &self.w, bias: self.bias.as_ref(), lora: Some(&self.lora) };
        (LinearBackward { dx: Some(&mut self.dx), dxa: &mut self.dxa, weights }, &mut self.dy)
    }

    /// What follows backward.
    fn gradients(&mut self, ops: &B) -> Result<()> {
        let (grad, dxa, x, xa, lora) = (&mut self.grad, &self.dxa, &self.x, &self.xa, &self.lora);
        ops.linear_gradients(LinearGradients { grad, dxa, x, xa, lora }, &self.dy)
    }
}

/// The operations of one model's layer. Operands are made and freed one operation at a time, each with numbers of its own.
struct List<'a, 'v, B: Ops> {
    ops: &'a B,
    shape: &'a Shape,
    made: u64,
    visit: &'a mut Visit<'v>,
}

/// Runs `visit` with each operation in the order of a step, then with those of generation.
pub fn each<B: Ops>(ops: &B, shape: &Shape, visit: &mut Visit) -> Result<()> {
    let batch = shape.batch();
    let mut tables = DeviceBatch::with_capacity(ops, batch.len())?;
    tables.set(ops, &batch)?;
    let list = &mut List { ops, shape, made: 0, visit };
    let ModelConfig { hidden_size, intermediate_size, heads, head_dim, .. } = shape.config;
    list.embed(&tables)?;
    list.norm(batch.len())?;
    list.layer_norm(batch.len())?;
    list.qkv(&tables)?;
    list.attention(&tables)?;
    list.project(["project o, forward", "project o, backward"], batch.len(), hidden_size, heads * head_dim)?;
    list.gate_up(batch.len())?;
    list.project(["project down, forward", "project down, backward"], batch.len(), hidden_size, intermediate_size)?;
    list.heads(&tables)?;
    list.adamw()?;
    list.generation()
}

/// One step of generation: attention through the cache, and the draw with its logits.
pub fn generation<B: Ops>(ops: &B, shape: &Shape, visit: &mut Visit) -> Result<()> {
    List { ops, shape, made: 0, visit }.generation()
}

impl<B: Ops> List<'_, '_, B> {
    /// Bytes of a stored activation.
    const ACT: u64 = size_of::<B::Act>() as u64;

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
    fn product(&mut self, rows: usize, parts: &[usize], inputs: usize) -> Result<ProductOperands<B>> {
        let (outputs, rank) = (parts.iter().sum(), self.shape.rank);
        let width = parts.len() * rank;
        let (a, b) = (self.act(width, inputs)?, self.act(outputs, rank)?);
        Ok(ProductOperands {
            x: self.act(rows, inputs)?,
            y: self.out(rows, outputs)?,
            dy: self.act(rows, outputs)?,
            dx: self.out(rows, inputs)?,
            xa: self.out(rows, width)?,
            dxa: self.out(rows, width)?,
            w: self.weight(outputs, inputs)?,
            bias: None,
            lora: Lora { parts: parts.to_vec(), rank, scale: 2.0, a, b },
            grad: LoraGrad { da: self.numbers(width, inputs)?, db: self.numbers(outputs, rank)? },
        })
    }

    fn embed(&mut self, tables: &DeviceBatch<B>) -> Result<()> {
        let (ops, rows, config) = (self.ops, tables.tokens.rows(), &self.shape.config);
        let table = self.weight(config.vocab_size, config.hidden_size)?;
        let mut x = self.out(rows, config.hidden_size)?;
        let cost = rows::cost(rows as u64, config.hidden_size as u64, Self::ACT);
        (self.visit)("embed", cost, &mut || ops.embed(&mut x, &tables.tokens, &table, 1.0))
    }

    fn norm(&mut self, t: usize) -> Result<()> {
        let (ops, c, spec) = (self.ops, self.shape.config.hidden_size, self.shape.config.block_spec(0).norm);
        let [x, w, dy] = &[self.act(t, c)?, self.act(1, c)?, self.act(t, c)?];
        let (mut y, mut rstd, mut dx) = (self.out(t, c)?, Tensor::zeros(ops, t, 1)?, self.act(t, c)?);
        let costs = norm::costs(t as u64, c as u64, Self::ACT);
        (self.visit)("norm, forward", costs[0], &mut || {
            ops.norm_forward(NormForward { y: &mut y, rstd: &mut rstd, x, w, residual: None, spec })
        })?;
        (self.visit)("norm, backward", costs[1], &mut || {
            ops.norm_backward(NormBackward { dx: &mut dx, dy, x, rstd: &rstd, w, spec })
        })
    }

    fn layer_norm(&mut self, t: usize) -> Result<()> {
        let (ops, c, eps) = (self.ops, self.shape.config.hidden_size, self.shape.config.block_spec(0).norm.eps);
        let [x, w, bias, dy] = &[self.act(t, c)?, self.act(1, c)?, self.act(1, c)?, self.act(t, c)?];
        let (bias, [mut mean, mut rstd]) = (Some(bias), [Tensor::zeros(ops, t, 1)?, Tensor::zeros(ops, t, 1)?]);
        let (mut y, mut dx) = (self.out(t, c)?, self.act(t, c)?);
        let costs = layer_norm::costs(t as u64, c as u64, Self::ACT);
        (self.visit)("layer_norm, forward", costs[0], &mut || {
            ops.layer_norm_forward(LayerNormForward { y: &mut y, mean: &mut mean, rstd: &mut rstd, x, w, bias, eps })
        })?;
        (self.visit)("layer_norm, backward", costs[1], &mut || {
            ops.layer_norm_backward(LayerNormBackward { dx: &mut dx, dy, x, mean: &mean, rstd: &rstd, w })
        })
    }

    fn qkv(&mut self, tables: &DeviceBatch<B>) -> Result<()> {
        let (ops, t, config) = (self.ops, tables.tokens.rows(), &self.shape.config);
        let spec = config.block_spec(0).qkv;
        let (e, positions) = (spec.head_dim, &tables.packing.positions);
        let parts = [spec.heads * e, spec.kv_heads * e, spec.kv_heads * e];
        let mut p = self.product(t, &parts, config.hidden_size)?;
        let rotate = qkv::rotate_cost(t as u64, spec.rotated() as u64, Self::ACT);
        let costs = p.costs().map(|cost| cost + rotate);
        p.bias = config.traits.qkv_bias.then(|| self.act(1, spec.width())).transpose()?;
        let [of_q, of_k] = spec.normed();
        let qk_norm = if config.traits.qk_norm { Some((self.act(1, of_q)?, self.act(1, of_k)?)) } else { None };
        let mut raw = self.out(t, if config.traits.qk_norm { spec.rotated() } else { 0 })?;
        let rope = Rope::new(ops, &config.ropes.kinds[0].inv_freq(e), t)?;
        let rotation = || Rotation { qk_norm: qk_norm.as_ref(), positions, rope: &rope, spec };
        (self.visit)("qkv, forward", costs[0], &mut || ops.qkv_forward(p.forward(), &mut raw, rotation()))?;
        (self.visit)("qkv, backward", costs[1], &mut || {
            let (product, dqkv) = p.backward();
            ops.qkv_backward(product, dqkv, &raw, rotation())?;
            p.gradients(ops)
        })
    }

    fn attention(&mut self, tables: &DeviceBatch<B>) -> Result<()> {
        let (ops, packing, spec) = (self.ops, &tables.packing, self.shape.config.block_spec(0).attention);
        let (t, columns) = (packing.rows(), spec.heads * spec.head_dim);
        let [qkv, d_o] = &[self.act(t, spec.width())?, self.act(t, columns)?];
        let (mut o, mut dqkv) = (self.out(t, columns)?, self.out(t, spec.width())?);
        let mut lse = Tensor::zeros(ops, t, spec.heads)?;
        let [h, kv, e] = [spec.heads, spec.kv_heads, spec.head_dim].map(|n| n as u64);
        let [forward, backward] = attention::costs(t as u64, packing.pairs(&spec), h, kv, e, Self::ACT);
        (self.visit)("attention, forward", forward, &mut || {
            ops.attention_forward(AttentionForward { o: &mut o, lse: &mut lse, qkv, packing, spec })
        })?;
        (self.visit)("attention, backward", backward, &mut || {
            ops.attention_backward(AttentionBackward { dqkv: &mut dqkv, d_o, o: &o, lse: &lse, qkv, packing, spec })
        })
    }

    fn project(&mut self, names: [&'static str; 2], t: usize, outputs: usize, inputs: usize) -> Result<()> {
        let (ops, mut p) = (self.ops, self.product(t, &[outputs], inputs)?);
        let (residual, costs) = (self.act(t, outputs)?, p.costs());
        let read = Cost { flops: 0, bytes: Self::ACT * (t * outputs) as u64 };
        (self.visit)(names[0], costs[0] + read, &mut || ops.linear_forward(p.forward(), Some(&residual)))?;
        (self.visit)(names[1], costs[1], &mut || {
            let (product, dy) = p.backward();
            ops.linear_backward(product, dy)?;
            p.gradients(ops)
        })
    }

    fn gate_up(&mut self, t: usize) -> Result<()> {
        let (ops, config) = (self.ops, &self.shape.config);
        let (f, spec) = (config.intermediate_size, config.block_spec(0).gate_up);
        let mut p = self.product(t, &[f, f], config.hidden_size)?;
        let (mut a, dact, costs) = (self.out(t, f)?, self.act(t, f)?, p.costs());
        let [activate, back] = gate_up::activate_costs(t as u64, f as u64, spec, Self::ACT);
        (self.visit)("gate_up, forward", costs[0] + activate, &mut || ops.gate_up_forward(&mut a, p.forward(), spec))?;
        // Backward turns gate, up and act's gradient in place; they are put back first, which is charged.
        let [both, len] = [p.y.stride(), a.stride()].map(|stride| t * stride);
        let copy = Cost { flops: 0, bytes: Self::ACT * 2 * (both + len) as u64 };
        (self.visit)("gate_up, backward", costs[1] + back + copy, &mut || {
            ops.copy(&mut p.dy.buffer, 0, &p.y.buffer, 0, both)?;
            ops.copy(&mut a.buffer, 0, &dact.buffer, 0, len)?;
            let (product, gate_up) = p.backward();
            ops.gate_up_backward(product, gate_up, &mut a, spec)?;
            p.gradients(ops)
        })
    }

    /// Both heads, whatever the model's own: a policy's over every target, a reward model's over as many rows.
    fn heads(&mut self, tables: &DeviceBatch<B>) -> Result<()> {
        let (ops, rows, targets, config) = (self.ops, tables.rows.rows(), &tables.targets, &self.shape.config);
        let (vocab, c, act) = (config.vocab_size, config.hidden_size, Self::ACT);
        let (h, mut dh, w) = (&self.act(rows, c)?, self.out(rows, c)?, &self.weight(vocab, c)?);
        let softcap = config.logit_cap;
        let (mut out, mut chunk) = (HeadRows::with_capacity(ops, rows)?, self.out(B::lm_head_chunk(vocab), vocab)?);
        let sizes = [rows, vocab, c].map(|n| n as u64);
        let [forward, both] = lm_head::costs(sizes[0], sizes[1], sizes[2], act);
        (self.visit)("lm_head, forward", forward, &mut || {
            ops.lm_head_forward(LmHeadForward { out: &mut out, dh: None, chunk: &mut chunk, h, targets, w, softcap })
        })?;
        (self.visit)("lm_head, both ways", both, &mut || {
            ops.lm_head_forward(LmHeadForward {
                out: &mut out,
                dh: Some(&mut dh),
                chunk: &mut chunk,
                h,
                targets,
                w,
                softcap,
            })
        })?;
        let (w, mut r, dr) = (&self.numbers(1, c)?, self.numbers(rows, 1)?, &self.numbers(rows, 1)?);
        let mut dw = self.numbers(1, c)?;
        let [forward, backward] = score_head::costs(sizes[0], 1, sizes[2], act);
        (self.visit)("score_head, forward", forward, &mut || ops.score_forward(&mut r, h, w))?;
        (self.visit)("score_head, backward", backward, &mut || {
            ops.score_backward(ScoreBackward { dh: &mut dh, dw: Some(&mut dw), dr, h, w })
        })
    }

    /// One adapter of the feed-forward's width.
    fn adamw(&mut self) -> Result<()> {
        let (ops, rows, config) = (self.ops, 2 * self.shape.rank, &self.shape.config);
        let cols = config.hidden_size.max(config.intermediate_size);
        let (mut master, mut m, grad) =
            (self.numbers(rows, cols)?, self.numbers(rows, cols)?, self.numbers(rows, cols)?);
        let squares: Vec<f32> = self.noise(rows * cols).into_iter().map(f32::abs).collect();
        let (mut v, mut operand) = (Tensor::from_host(ops, rows, cols, &squares)?, self.out(rows, cols)?);
        let mut norm = Tensor::zeros(ops, 1, 1)?;
        let spec = AdamWSpec { lr: 1e-9, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.0, clip: 1.0, step: 9 };
        (self.visit)("adamw", adamw::cost((rows * cols) as u64, Self::ACT), &mut || {
            let operand = Some((&mut operand, 2.0));
            let parameter = Parameter { master: &mut master, m: &mut m, v: &mut v, grad: &grad, operand };
            ops.adamw(&mut norm, &mut [parameter], spec)
        })
    }

    fn generation(&mut self) -> Result<()> {
        let (ops, shape) = (self.ops, self.shape);
        let (rows, spec, act) = (shape.sequences, shape.config.block_spec(0).attention, Self::ACT);
        let (vocab, c, length) = (shape.config.vocab_size, shape.config.hidden_size, shape.length);
        let softcap = shape.config.logit_cap;
        let mut cache = ops.kv_cache(rows, length, spec)?;
        let mut table = SlotTable::with_capacity(ops, rows)?;
        let (y, mut o) = (self.act(rows, spec.width())?, self.out(rows, spec.heads * spec.head_dim)?);
        for at in 0..length {
            table.set(ops, &(0..rows as u32).collect::<Vec<_>>(), &vec![at as u32; rows])?;
            ops.cache_append(&mut cache, &y, &table)?;
        }
        let seen = (rows * length.min(spec.window.unwrap_or(length))) as u64;
        let cost = decode::cost(rows as u64, [seen; 2], &spec, act);
        (self.visit)("decode", cost, &mut || {
            ops.cache_append(&mut cache, &y, &table)?;
            ops.decode_attention(DecodeAttention { o: &mut o, qkv: &y, cache: &cache, table: &table })
        })?;
        let (h, w, mut logits) = (self.act(rows, c)?, self.weight(vocab, c)?, Tensor::zeros(ops, rows, vocab)?);
        let mut keys = SampleTable::with_capacity(ops, rows)?;
        keys.set(ops, &(0..rows as u64).collect::<Vec<_>>(), &vec![length as u32; rows])?;
        let mut next = Indices::from_host(ops, &vec![0; rows], vocab + 1)?;
        let written = Cost { flops: 0, bytes: 8 * (rows * vocab) as u64 };
        let [product, _] = lm_head::costs(rows as u64, vocab as u64, c as u64, act);
        for (name, temperature, top_k, top_p) in
            [("sample, greedy", 0.0, 0, 1.0), ("sample, top-k top-p", 1.0, 50, 0.95)]
        {
            let spec = SampleSpec { temperature, top_k, top_p, seed: 1 };
            (self.visit)(name, product + written, &mut || {
                let (tokens, logits) = (&mut next, &mut logits);
                ops.sample(SampleTokens { tokens, logits, h: &h, table: &keys, w: &w, softcap, spec })
            })?;
        }
        Ok(())
    }
}
