//! A decoder-only transformer with its head: weights by mmap, forward and backward over packed batches.

use std::path::Path;

use super::adapter::{Adapter, AdapterGrad, AdapterInit};
use super::adapter_file::AdapterFile;
use super::batch::Batch;
use super::block::{Block, BlockSpec, Keys};
use super::checkpoint::{Checkpoint, EMBEDDING, WeightSource};
use super::config::{Head, ModelConfig, RopeConfig};
use super::projection::{Projection, Turning};
use super::readout::Readout;
use super::workspace::{Stream, Workspace};
use crate::backend::Tensor;
use crate::error::{Error, Result};
use crate::ops::{
    AttentionSpec, GateUpSpec, LmHeadForward, LmHeadKl, NormBackward, NormForward, NormSpec, Ops, QkvSpec, Rope,
    ScoreBackward,
};

/// A frozen model on its device.
pub struct Transformer<B: Ops> {
    pub ops: B,
    pub config: ModelConfig,
    pub(super) embed: B::Weight, // (V, C)
    pub(super) blocks: Vec<Block<B>>,
    pub(super) norm: Tensor<B>, // (1, C)
    pub(super) head: HeadWeight<B>,
    /// The kinds of rotation; `config.ropes` says which layer has which.
    pub(super) ropes: Vec<Rope<B>>,
}

/// What stands on top.
pub(super) enum HeadWeight<B: Ops> {
    /// The embedding serves as head too.
    Tied,
    Untied(B::Weight), // (V, C)
    /// Its first layer on the device, the rest on the host.
    Score(Tensor<B, f32>, Readout), // (units, C)
}

/// What the host reads after a policy's forward, one number per target row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TargetLogprobs {
    pub logprob: Vec<f32>,
    /// log(1 − p)
    pub log_rest: Vec<f32>,
}

impl<B: Ops> Transformer<B> {
    /// Reads a checkpoint folder; every name, dtype and shape is checked before the first byte is uploaded.
    pub fn open(ops: &B, dir: &Path) -> Result<Self> {
        let config = ModelConfig::open(dir)?;
        let checkpoint = Checkpoint::open(dir, &config)?;
        Self::load(ops, config, &checkpoint)
    }

    /// Uploads the weights of `checkpoint`, which fits `config`.
    pub(crate) fn load(ops: &B, mut config: ModelConfig, checkpoint: &impl WeightSource) -> Result<Self> {
        config.settle_head(checkpoint)?;
        let read = |names: &[String]| -> Result<Vec<f32>> {
            let mut values = Vec::new();
            names.iter().try_for_each(|name| checkpoint.read(name, &mut values))?;
            Ok(values)
        };
        let matrix = |names: &[String]| -> Result<B::Weight> {
            let (values, cols) = (read(names)?, checkpoint.shape(&names[0])?[1]);
            ops.weight(values.len() / cols, cols, values)
        };
        let fused = |layer: usize, parts: &[Projection]| -> Result<B::Weight> {
            let (mut values, cols) = (Vec::new(), parts[0].shape(&config).1);
            for part in parts {
                let from = values.len();
                checkpoint.read(&format!("model.layers.{layer}.{}.weight", part.path()), &mut values)?;
                part.order_channels(Turning::of(&config), &mut values[from..], cols, false);
            }
            ops.weight(values.len() / cols, cols, values)
        };
        let vector = |names: &[String]| -> Result<Tensor<B>> {
            let values = read(names)?;
            Tensor::from_host(ops, 1, values.len(), &ops.activations(&values))
        };
        let head = match config.head {
            Head::Causal if config.tie_word_embeddings => HeadWeight::Tied,
            Head::Causal => HeadWeight::Untied(matrix(&["lm_head.weight".into()])?),
            Head::Classification { .. } => {
                let (w, readout) = Readout::load(&config, checkpoint)?;
                let w = Tensor::from_host(ops, config.score_units(), config.hidden_size, &w)?;
                HeadWeight::Score(w, readout)
            }
        };
        let mut blocks = Vec::with_capacity(config.layers);
        let [before, after] = config.norm_names();
        for layer in 0..config.layers {
            let name = |rest: &str| [format!("model.layers.{layer}.{rest}")];
            let biases = |parts: &[Projection]| -> Vec<String> {
                parts.iter().flat_map(|p| name(&format!("{}.bias", p.path()))).collect()
            };
            let [qkv, o, gate_up, down] = Projection::FUSED;
            let product = |parts| fused(layer, parts);
            let norm = |which: &str| vector(&name(&format!("{which}.weight")));
            // In the place of a norm that the family lacks stands one that leaves everything as it is.
            let pre_norm = |which: usize| match before {
                Some(names) => norm(names[which]),
                None => Tensor::from_host(
                    ops,
                    1,
                    config.hidden_size,
                    &ops.activations(&vec![IDENTITY_GAIN; config.hidden_size]),
                ),
            };
            let head_norm = |which: &str| vector(&name(&format!("self_attn.{which}_norm.weight")));
            blocks.push(Block {
                input_norm: pre_norm(0)?,
                qkv: product(qkv)?,
                qkv_bias: config.traits.qkv_bias.then(|| vector(&biases(qkv))).transpose()?,
                qk_norm: config.traits.qk_norm.then(|| Ok((head_norm("q")?, head_norm("k")?))).transpose()?,
                o: product(o)?,
                mid_norm: pre_norm(1)?,
                gate_up: product(gate_up)?,
                down: product(down)?,
                post_norms: after.map(|[o, down]| Ok([norm(o)?, norm(down)?])).transpose()?,
                spec: config.block_spec(layer),
            });
        }
        let rope = |kind: &RopeConfig| {
            let (freq, factor) = (kind.inv_freq(config.head_dim), kind.attention_factor());
            Rope::scaled(ops, &freq, factor, config.max_position_embeddings)
        };
        Ok(Transformer {
            ops: ops.clone(),
            embed: matrix(&[EMBEDDING.into()])?,
            blocks,
            norm: {
                let mut gains = read(&["model.norm.weight".into()])?;
                gains.iter_mut().for_each(|gain| *gain *= config.logit_scale);
                Tensor::from_host(ops, 1, gains.len(), &ops.activations(&gains))?
            },
            head,
            ropes: config.ropes.kinds.iter().map(rope).collect::<Result<_>>()?,
            config,
        })
    }

    /// A fresh adapter, with a classifier's own head.
    pub fn new_adapter(&self, rank: usize, lora_alpha: f64, init: AdapterInit) -> Result<Adapter<B>> {
        Adapter::new(&self.ops, &self.config, rank, lora_alpha, init, self.score_weights()?.as_deref())
    }

    /// Reads an adapter's folder, score head included; fails unless it fits this model.
    pub fn open_adapter(&self, dir: &Path) -> Result<Adapter<B>> {
        self.load_adapter(&AdapterFile::open(dir, &self.config)?)
    }

    /// Makes an adapter of a file that fits this model.
    pub(crate) fn load_adapter(&self, file: &AdapterFile) -> Result<Adapter<B>> {
        Adapter::load(&self.ops, &self.config, file, self.score_weights()?.as_deref())
    }

    /// The classifier's original head (labels, C), where an adapter may carry one.
    fn score_weights(&self) -> Result<Option<Vec<f32>>> {
        match &self.head {
            HeadWeight::Score(w, _) if self.config.has_plain_head() => w.read(&self.ops).map(Some),
            _ => Ok(None),
        }
    }

    pub(super) fn lm_weight(&self) -> Result<&B::Weight> {
        match &self.head {
            HeadWeight::Tied => Ok(&self.embed),
            HeadWeight::Untied(w) => Ok(w),
            HeadWeight::Score(..) => Err(wrong_head("a language-model head", "a score head")),
        }
    }

    fn score_weight<'a>(&'a self, adapter: Option<&'a Adapter<B>>) -> Result<(&'a Tensor<B, f32>, &'a Readout)> {
        let HeadWeight::Score(w, readout) = &self.head else {
            return Err(wrong_head("a score head", "a language-model head"));
        };
        Ok((adapter.and_then(|a| a.score.as_ref()).unwrap_or(w), readout))
    }

    /// Log-probability of every target row. With `rows` the head also writes ∂log p/∂h, which `backward_targets` starts from.
    pub fn forward_targets(
        &self,
        ws: &mut Workspace<B>,
        batch: &Batch,
        adapter: Option<&Adapter<B>>,
        rows: bool,
    ) -> Result<TargetLogprobs> {
        let _stage = crate::backend::stage(c"policy forward");
        let w = self.lm_weight()?;
        self.forward(ws, batch, adapter)?;
        let Workspace { batch, head, head_rows: out, chunk, .. } = ws;
        let (dh, softcap) = (if rows { Some(&mut head.dh) } else { None }, self.config.logit_cap);
        self.ops.lm_head_forward(LmHeadForward { out, dh, chunk, h: &head.h, targets: &batch.targets, w, softcap })?;
        Ok(TargetLogprobs { logprob: out.logprob.read(&self.ops)?, log_rest: out.log_rest.read(&self.ops)? })
    }

    /// Backward of Σ `weights[i]`·log p_i, one weight per target row of the batch just run; adds to `grad`.
    pub fn backward_targets(
        &self,
        ws: &mut Workspace<B>,
        weights: &[f32],
        adapter: &Adapter<B>,
        grad: &mut AdapterGrad<B>,
    ) -> Result<()> {
        let _stage = crate::backend::stage(c"policy backward");
        ws.head.weights.write(&self.ops, weights)?;
        self.ops.scale_rows(&mut ws.head.dh, &ws.head.weights)?;
        self.backward(ws, adapter, grad)
    }

    /// Keeps π_0's normed head rows of `batch` for `kl_targets`. Overwrites the batch in `ws`.
    pub fn keep_start_rows(&self, ws: &mut Workspace<B>, batch: &Batch) -> Result<()> {
        self.forward(ws, batch, None)?;
        ws.set_kl_rows(&self.ops, &self.config, batch.rows.len())?;
        let Workspace { head, kl: Some((kl, _)), .. } = ws else { return Ok(()) };
        self.ops.copy(&mut kl.h0.buffer, 0, &head.h.buffer, 0, batch.rows.len() * head.h.stride())
    }

    /// Returns KL(π_0‖π_θ) of each head row from `first` on, after `keep_start_rows` of these and `forward_targets` of all;
    /// overwrites their gradient rows with ∂KL/∂h, so that `backward_targets` weighs them like any other.
    pub fn kl_targets(&self, ws: &mut Workspace<B>, first: usize) -> Result<Vec<f32>> {
        let _stage = crate::backend::stage(c"policy divergence");
        let w = self.lm_weight()?;
        let Workspace { head, chunk, kl: Some((kl, chunk0)), .. } = ws else { return Ok(Vec::new()) };
        let (count, stride) = (kl.h0.rows(), head.h.stride());
        self.ops.copy(&mut kl.h.buffer, 0, &head.h.buffer, first * stride, count * stride)?;
        let (value, dh, softcap) = (&mut kl.kl, &mut kl.dh, self.config.logit_cap);
        self.ops.lm_head_kl(LmHeadKl { kl: value, dh, chunk, chunk0, h: &kl.h, h0: &kl.h0, w, softcap })?;
        self.ops.copy(&mut head.dh.buffer, first * stride, &kl.dh.buffer, 0, count * stride)?;
        kl.kl.read(&self.ops)
    }

    /// Scores of every sequence (labels each), read at its last row. Fails for a model without a score head.
    pub fn forward_scores(
        &self,
        ws: &mut Workspace<B>,
        batch: &Batch,
        adapter: Option<&Adapter<B>>,
    ) -> Result<Vec<f32>> {
        let _stage = crate::backend::stage(c"reward forward");
        let (w, readout) = self.score_weight(adapter)?;
        self.forward(ws, batch, adapter)?;
        self.ops.score_forward(&mut ws.head.units, &ws.head.h, w)?;
        Ok(readout.forward(ws.head.units.read(&self.ops)?))
    }

    /// Backward of Σ d_scores·scores of the batch just run; adds to `grad`.
    pub fn backward_scores(
        &self,
        ws: &mut Workspace<B>,
        d_scores: &[f32],
        adapter: &Adapter<B>,
        grad: &mut AdapterGrad<B>,
    ) -> Result<()> {
        let _stage = crate::backend::stage(c"reward backward");
        let (w, readout) = self.score_weight(Some(adapter))?;
        let head = &mut ws.head;
        head.d_units.write(&self.ops, &readout.backward(d_scores, || head.units.read(&self.ops))?)?;
        let dr = &head.d_units;
        self.ops.score_backward(ScoreBackward { dh: &mut head.dh, dw: grad.score.as_mut(), dr, h: &head.h, w })?;
        self.backward(ws, adapter, grad)
    }

    /// Up to the normed rows that a head reads.
    fn forward(&self, ws: &mut Workspace<B>, batch: &Batch, adapter: Option<&Adapter<B>>) -> Result<()> {
        ws.load(&self.ops, batch)?;
        self.blocks_forward(ws, adapter)?;
        let head = &mut ws.head;
        let (y, rstd, spec) = (&mut head.h, &mut head.rstd, self.config.norm_spec());
        self.ops.norm_forward(NormForward { y, rstd, x: &head.x, w: &self.norm, residual: None, spec })
    }

    pub(super) fn rope(&self, layer: usize) -> &Rope<B> {
        &self.ropes[self.config.ropes.of_layer[layer]]
    }

    /// Embedding and blocks, the last of which goes on from its attention with the head's rows alone: nobody reads the others.
    /// Without backward all blocks share one set of activations.
    fn blocks_forward(&self, ws: &mut Workspace<B>, adapter: Option<&Adapter<B>>) -> Result<()> {
        let Workspace { batch, saved, blocks, inputs, scratch, stream: Stream { out, .. }, head, .. } = ws;
        let saved = &mut saved[..*blocks];
        let (ops, keys) = (&self.ops, || Keys::Packed(&batch.packing));
        ops.embed(&mut saved[0].0.x, &batch.tokens, &self.embed, self.config.embedding_scale)?;
        let last = self.blocks.len() - 1;
        for (l, block) in self.blocks[..last].iter().enumerate() {
            let (lora, rope) = (adapter.map(|a| &a.blocks[l]), self.rope(l));
            if let [(s, rest)] = saved {
                block.forward(ops, out, (s, rest), scratch, lora, rope, keys())?;
                inputs.get_mut(l).into_iter().for_each(|kept| std::mem::swap(&mut kept.x, &mut s.x));
                std::mem::swap(out, &mut s.x);
            } else if let [(s, rest), (next, _), ..] = &mut saved[l..] {
                block.forward(ops, &mut next.x, (s, rest), scratch, lora, rope, keys())?;
            }
        }
        let (block, lora, at) = (&self.blocks[last], adapter.map(|a| &a.blocks[last]), saved.len() - 1);
        let (s, rest) = &mut saved[at];
        block.attend(ops, s, lora, self.rope(last), keys())?;
        ops.gather(&mut head.x_in, &s.x, &batch.rows)?;
        ops.gather(&mut head.o, &s.o, &batch.rows)?;
        rest.set_rows(head.x.rows())?;
        scratch.set_rows(head.x.rows())?;
        block.rest_forward(ops, &mut head.x, (&head.x_in, &head.o), rest, scratch, lora)
    }

    /// From the head's gradient rows down to the adapters. Where forward kept a block's input alone it is run once more; the last
    /// block's activations are there in any case.
    fn backward(&self, ws: &mut Workspace<B>, adapter: &Adapter<B>, grad: &mut AdapterGrad<B>) -> Result<()> {
        let Workspace { batch, saved, blocks, inputs, scratch, stream: Stream { out, dx, d_o }, head, .. } = ws;
        let (ops, last) = (&self.ops, self.blocks.len() - 1);
        head.dx.clear(ops)?;
        let (dy, rstd, spec) = (&head.dh, &head.rstd, self.config.norm_spec());
        ops.norm_backward(NormBackward { dx: &mut head.dx, dy, x: &head.x, rstd, w: &self.norm, spec })?;
        for (l, block) in self.blocks.iter().enumerate().rev() {
            let (lora, grad, (s, rest)) = (&adapter.blocks[l], &mut grad.blocks[l], &mut saved[l.min(*blocks - 1)]);
            if l == last {
                scratch.set_rows(head.x.rows())?;
                block.rest_backward(ops, &mut head.dx, &mut head.d_o, grad, &head.o, rest, scratch, lora)?;
                ops.scatter(dx, &head.dx, &batch.rows)?;
                ops.scatter(d_o, &head.d_o, &batch.rows)?;
                scratch.set_rows(dx.rows())?;
            } else {
                if let Some(kept) = inputs.get_mut(l) {
                    std::mem::swap(&mut s.x, &mut kept.x);
                    rest.set_rows(dx.rows())?;
                    let keys = Keys::Packed(&batch.packing);
                    block.forward(ops, out, (s, rest), scratch, Some(lora), self.rope(l), keys)?;
                }
                block.rest_backward(ops, dx, d_o, grad, &s.o, rest, scratch, lora)?;
            }
            let below = if l > 0 { Some(&mut *dx) } else { None };
            block.attend_backward(ops, below, d_o, grad, s, scratch, lora, self.rope(l), &batch.packing)?;
        }
        Ok(())
    }
}

fn wrong_head(expected: &str, found: &str) -> Error {
    Error::Shape { op: "head", expected: expected.into(), found: found.into() }
}

/// x·g/√(mean x² + ε) with g = √ε and an ε that x² vanishes beside: x itself, bit for bit, and its gradient to 1 part in 10⁹. A pass over
/// the stream is what a block without norms before its halves costs; nothing else knows of it.
const IDENTITY_NORM: NormSpec = NormSpec { eps: (1u64 << 40) as f32, unit_offset: false };
const IDENTITY_GAIN: f32 = (1 << 20) as f32;

impl ModelConfig {
    pub(super) fn norm_spec(&self) -> NormSpec {
        NormSpec { eps: self.rms_norm_eps, unit_offset: self.traits.unit_offset }
    }

    pub(crate) fn block_spec(&self, layer: usize) -> BlockSpec {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        let norm = self.norm_spec();
        let pre_norm = if self.traits.pre_norms { norm } else { IDENTITY_NORM };
        let wide = self.traits.wide_qk_norm;
        let attention = AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            scale: self.attention_scale,
            window: self.window(layer),
            softcap: self.attention_cap,
            causal: true,
        };
        let gate_up = GateUpSpec { activation: self.activation, gated: true };
        BlockSpec { pre_norm, norm, qkv: QkvSpec { heads, kv_heads, head_dim, norm, wide }, attention, gate_up }
    }
}
