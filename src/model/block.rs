//! One transformer block: attention and feed-forward, each after a norm and added to the residual stream.

use super::adapter::{BlockGrad, BlockLora};
use super::tensors::tensors;
use crate::backend::{Indices, Tensor};
use crate::error::Result;
use crate::ops::{
    AttentionSpec, Decode, GateUpSpec, KvCache, NormSpec, Ops, Packing, QkvSpec, QkvWeights, Rope, SlotTable,
};

/// Frozen weights of one block.
pub struct Block<B: Ops> {
    pub input_norm: Tensor<B>, // (1, C)
    pub qkv: QkvWeights<B>,
    pub o: B::Weight,         // (C, h·e)
    pub post_norm: Tensor<B>, // (1, C)
    pub gate_up: B::Weight,   // (2F, C)
    pub down: B::Weight,      // (C, F)
    pub spec: BlockSpec,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSpec {
    pub norm: NormSpec,
    pub qkv: QkvSpec,
    pub attention: AttentionSpec,
    pub gate_up: GateUpSpec,
}

/// Columns of a block's tensors.
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    pub hidden: usize,
    pub qkv: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// q∣k where a q/k norm needs them raw, else 0.
    pub raw: usize,
    pub feed_forward: usize,
    /// LoRA rank; 0 without an adapter.
    pub rank: usize,
}

tensors! {
    /// What backward needs of one block's forward: what is expensive to recompute.
    pub struct Saved(rows: usize, w: &Widths) {
        x: B::Act = [rows, w.hidden], // block input
        rstd_in: f32 = [rows, 1],
        n_in: B::Act = [rows, w.hidden],
        qkv: B::Act = [rows, w.qkv], // normed and rotated
        qkv_xa: B::Act = [rows, 3 * w.rank],
        raw: B::Act = [rows, w.raw], // q∣k before norm and rotation
        o: B::Act = [rows, w.heads * w.head_dim],
        lse: f32 = [rows, w.heads], // log-sum-exp of the attention rows
        o_xa: B::Act = [rows, w.rank],
        mid: B::Act = [rows, w.hidden], // residual stream between the halves
        rstd_post: f32 = [rows, 1],
        n_post: B::Act = [rows, w.hidden],
        gate_up: B::Act = [rows, 2 * w.feed_forward],
        gate_up_xa: B::Act = [rows, 2 * w.rank],
        down_xa: B::Act = [rows, w.rank],
    }
}

tensors! {
    /// What lives only within one block's forward, and within its backward where `back` has rows.
    pub struct BlockScratch(rows: usize, back: usize, w: &Widths) {
        act: B::Act = [rows, w.feed_forward],
        d_act: B::Act = [back, w.feed_forward],
        d_n: B::Act = [back, w.hidden],
        d_o: B::Act = [back, w.heads * w.head_dim],
        d_qkv: B::Act = [back, w.qkv],
        d_qkv_xa: B::Act = [back, 3 * w.rank],
        d_gate_up_xa: B::Act = [back, 2 * w.rank],
        d_xa: B::Act = [back, w.rank],
    }
}

impl<B: Ops> Block<B> {
    /// Overwrites `out` (T, C), the next block's input; `s.x` is this one's.
    pub fn forward(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        s: &mut Saved<B>,
        t: &mut BlockScratch<B>,
        lora: Option<&BlockLora<B>>,
        rope: &Rope<B>,
        packing: &Packing<B>,
    ) -> Result<()> {
        let spec = &self.spec;
        self.qkv_forward(ops, s, lora, &packing.positions, rope)?; // 1, 2
        ops.attention_forward(&mut s.o, &mut s.lse, &s.qkv, packing, spec.attention)?; // 3
        self.rest_forward(ops, out, s, t, lora) // 4 to 7
    }

    /// `forward` for one new token per slot, against the cache.
    pub(crate) fn decode(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        s: &mut Saved<B>,
        t: &mut BlockScratch<B>,
        cache: &mut KvCache<B>,
        lora: Option<&BlockLora<B>>,
        rope: &Rope<B>,
        table: &SlotTable<B>,
    ) -> Result<()> {
        let attention = self.spec.attention;
        self.qkv_forward(ops, s, lora, &table.positions, rope)?;
        ops.cache_append(cache, &s.qkv, table, attention)?;
        Decode::decode_attention(ops, &mut s.o, &s.qkv, cache, table, attention)?;
        self.rest_forward(ops, out, s, t, lora)
    }

    /// Overwrites `s.qkv`; `s.x` is the input.
    pub(crate) fn qkv_forward(
        &self,
        ops: &B,
        s: &mut Saved<B>,
        lora: Option<&BlockLora<B>>,
        positions: &Indices<B>,
        rope: &Rope<B>,
    ) -> Result<()> {
        let spec = &self.spec;
        let lora = lora.map(|l| &l.qkv);
        ops.norm_forward(&mut s.n_in, &mut s.rstd_in, &s.x, &self.input_norm, spec.norm)?; // 1
        ops.qkv_forward(&mut s.qkv, &mut s.qkv_xa, &mut s.raw, &s.n_in, &self.qkv, lora, positions, rope, spec.qkv) // 2
    }

    fn rest_forward(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        s: &mut Saved<B>,
        t: &mut BlockScratch<B>,
        lora: Option<&BlockLora<B>>,
    ) -> Result<()> {
        let spec = &self.spec;
        let [o, gate_up, down] = [lora.map(|l| &l.o), lora.map(|l| &l.gate_up), lora.map(|l| &l.down)];
        ops.project_forward(&mut s.mid, &mut s.o_xa, &s.o, &s.x, &self.o, None, o)?; // 4
        ops.norm_forward(&mut s.n_post, &mut s.rstd_post, &s.mid, &self.post_norm, spec.norm)?; // 5
        let (act, n) = (&mut t.act, &s.n_post);
        ops.gate_up_forward(act, &mut s.gate_up, &mut s.gate_up_xa, n, &self.gate_up, None, gate_up, spec.gate_up)?; // 6
        ops.project_forward(out, &mut s.down_xa, &t.act, &s.mid, &self.down, None, down) // 7
    }

    /// `dx` (T, C) holds the gradient of this block's output and leaves as that of its input; adds to `grad`; uses up
    /// `s.gate_up`.
    pub fn backward(
        &self,
        ops: &B,
        dx: &mut Tensor<B>,
        grad: &mut BlockGrad<B>,
        s: &mut Saved<B>,
        t: &mut BlockScratch<B>,
        lora: &BlockLora<B>,
        rope: &Rope<B>,
        packing: &Packing<B>,
    ) -> Result<()> {
        let spec = &self.spec;
        let [gq, go, gu, gd] = grad.each_mut().map(Some);
        let [qkv, o, gate_up, down] = lora.each().map(Some);
        ops.activate(&mut t.act, &s.gate_up, spec.gate_up)?; // 6, again
        ops.project_backward(&mut t.d_act, gd, &mut t.d_xa, dx, &t.act, &s.down_xa, &self.down, down)?; // 7
        let (d_xa, n, xa, w) = (&mut t.d_gate_up_xa, &s.n_post, &s.gate_up_xa, &self.gate_up);
        ops.gate_up_backward(&mut t.d_n, gu, &mut s.gate_up, d_xa, &t.d_act, n, xa, w, gate_up, spec.gate_up)?; // 6
        ops.norm_backward(dx, &t.d_n, &s.mid, &s.rstd_post, &self.post_norm, spec.norm)?; // 5
        ops.project_backward(&mut t.d_o, go, &mut t.d_xa, dx, &s.o, &s.o_xa, &self.o, o)?; // 4
        ops.attention_backward(&mut t.d_qkv, &t.d_o, &s.o, &s.lse, &s.qkv, packing, spec.attention)?; // 3
        let (d_xa, n, xa, p) = (&mut t.d_qkv_xa, &s.n_in, &s.qkv_xa, &packing.positions);
        ops.qkv_backward(&mut t.d_n, gq, &mut t.d_qkv, d_xa, n, xa, &s.raw, &self.qkv, qkv, p, rope, spec.qkv)?; // 2
        ops.norm_backward(dx, &t.d_n, &s.x, &s.rstd_in, &self.input_norm, spec.norm) // 1
    }
}
