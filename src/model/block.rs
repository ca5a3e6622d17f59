//! One transformer block: attention and feed-forward, each behind a norm and added to the residual stream.

use super::adapter::{BlockGrad, BlockLora};
use crate::backend::Tensor;
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

/// What backward needs of one block's forward: what is dear to recompute.
pub struct Saved<B: Ops> {
    pub x: Tensor<B>,                     // (T, C) block input
    pub(crate) rstd_in: Tensor<B, f32>,   // (T, 1)
    pub(crate) n_in: Tensor<B>,           // (T, C)
    pub(crate) qkv: Tensor<B>,            // (T, (h+2k)·e) normed and rotated
    pub(crate) qkv_xa: Tensor<B>,         // (T, 3r)
    pub(crate) raw: Tensor<B>,            // (T, (h+k)·e) before norm and rotation; no columns without a q/k norm
    pub(crate) o: Tensor<B>,              // (T, h·e)
    pub(crate) lse: Tensor<B, f32>,       // (T, h) log-sum-exp of the attention rows
    pub(crate) o_xa: Tensor<B>,           // (T, r)
    pub(crate) mid: Tensor<B>,            // (T, C) residual stream between the halves
    pub(crate) rstd_post: Tensor<B, f32>, // (T, 1)
    pub(crate) n_post: Tensor<B>,         // (T, C)
    pub(crate) gate_up: Tensor<B>,        // (T, 2F)
    pub(crate) gate_up_xa: Tensor<B>,     // (T, 2r)
    pub(crate) down_xa: Tensor<B>,        // (T, r)
}

/// What lives only within one block's forward or backward.
pub struct Scratch<B: Ops> {
    pub(crate) act: Tensor<B>,          // (T, F)
    pub(crate) d_act: Tensor<B>,        // (T, F)
    pub(crate) d_n: Tensor<B>,          // (T, C)
    pub(crate) d_o: Tensor<B>,          // (T, h·e)
    pub(crate) d_qkv: Tensor<B>,        // (T, (h+2k)·e)
    pub(crate) d_qkv_xa: Tensor<B>,     // (T, 3r)
    pub(crate) d_gate_up_xa: Tensor<B>, // (T, 2r)
    pub(crate) d_xa: Tensor<B>,         // (T, r)
}

impl<B: Ops> Block<B> {
    /// Overwrites `out` (T, C), the next block's input; `s.x` is this one's.
    pub fn forward(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        s: &mut Saved<B>,
        t: &mut Scratch<B>,
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
        t: &mut Scratch<B>,
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
        positions: &Tensor<B, u32>,
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
        t: &mut Scratch<B>,
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
        mut grad: Option<&mut BlockGrad<B>>,
        s: &mut Saved<B>,
        t: &mut Scratch<B>,
        lora: Option<&BlockLora<B>>,
        rope: &Rope<B>,
        packing: &Packing<B>,
    ) -> Result<()> {
        let spec = &self.spec;
        let [qkv, o] = [lora.map(|l| &l.qkv), lora.map(|l| &l.o)];
        let [gate_up, down] = [lora.map(|l| &l.gate_up), lora.map(|l| &l.down)];
        ops.activate(&mut t.act, &s.gate_up, spec.gate_up)?; // 6, again
        let g = grad.as_mut().map(|g| &mut g.down);
        ops.project_backward(&mut t.d_act, g, &mut t.d_xa, dx, &t.act, &s.down_xa, &self.down, down)?; // 7
        let g = grad.as_mut().map(|g| &mut g.gate_up);
        let (d_xa, n, xa, w) = (&mut t.d_gate_up_xa, &s.n_post, &s.gate_up_xa, &self.gate_up);
        ops.gate_up_backward(&mut t.d_n, g, &mut s.gate_up, d_xa, &t.d_act, n, xa, w, gate_up, spec.gate_up)?; // 6
        ops.norm_backward(dx, &t.d_n, &s.mid, &s.rstd_post, &self.post_norm, spec.norm)?; // 5
        let g = grad.as_mut().map(|g| &mut g.o);
        ops.project_backward(&mut t.d_o, g, &mut t.d_xa, dx, &s.o, &s.o_xa, &self.o, o)?; // 4
        ops.attention_backward(&mut t.d_qkv, &t.d_o, &s.o, &s.lse, &s.qkv, packing, spec.attention)?; // 3
        let g = grad.as_mut().map(|g| &mut g.qkv);
        let (d_xa, n, xa, p) = (&mut t.d_qkv_xa, &s.n_in, &s.qkv_xa, &packing.positions);
        ops.qkv_backward(&mut t.d_n, g, &mut t.d_qkv, d_xa, n, xa, &s.raw, &self.qkv, qkv, p, rope, spec.qkv)?; // 2
        ops.norm_backward(dx, &t.d_n, &s.x, &s.rstd_in, &self.input_norm, spec.norm) // 1
    }
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

impl<B: Ops> Saved<B> {
    /// Room for `rows` rows.
    pub fn with_capacity(ops: &B, rows: usize, w: &Widths) -> Result<Self> {
        let act = |cols| Tensor::zeros(ops, rows, cols);
        let stat = |cols| Tensor::zeros(ops, rows, cols);
        Ok(Saved {
            x: act(w.hidden)?,
            rstd_in: stat(1)?,
            n_in: act(w.hidden)?,
            qkv: act(w.qkv)?,
            qkv_xa: act(3 * w.rank)?,
            raw: act(w.raw)?,
            o: act(w.heads * w.head_dim)?,
            lse: stat(w.heads)?,
            o_xa: act(w.rank)?,
            mid: act(w.hidden)?,
            rstd_post: stat(1)?,
            n_post: act(w.hidden)?,
            gate_up: act(2 * w.feed_forward)?,
            gate_up_xa: act(2 * w.rank)?,
            down_xa: act(w.rank)?,
        })
    }

    pub(crate) fn set_rows(&mut self, rows: usize) -> Result<()> {
        for tensor in [&mut self.rstd_in, &mut self.lse, &mut self.rstd_post] {
            tensor.set_rows(rows)?;
        }
        let streams = [&mut self.x, &mut self.n_in, &mut self.mid, &mut self.n_post];
        let attention = [&mut self.qkv, &mut self.qkv_xa, &mut self.raw, &mut self.o, &mut self.o_xa];
        let feed_forward = [&mut self.gate_up, &mut self.gate_up_xa, &mut self.down_xa];
        streams.into_iter().chain(attention).chain(feed_forward).try_for_each(|tensor| tensor.set_rows(rows))
    }
}

impl<B: Ops> Scratch<B> {
    /// Room for `rows` rows; without `backward` only what forward uses.
    pub fn with_capacity(ops: &B, rows: usize, w: &Widths, backward: bool) -> Result<Self> {
        let act = |cols| Tensor::zeros(ops, rows, cols);
        let back = |cols| Tensor::zeros(ops, if backward { rows } else { 0 }, cols);
        Ok(Scratch {
            act: act(w.feed_forward)?,
            d_act: back(w.feed_forward)?,
            d_n: back(w.hidden)?,
            d_o: back(w.heads * w.head_dim)?,
            d_qkv: back(w.qkv)?,
            d_qkv_xa: back(3 * w.rank)?,
            d_gate_up_xa: back(2 * w.rank)?,
            d_xa: back(w.rank)?,
        })
    }

    pub(crate) fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.act.set_rows(rows)?;
        let back = [&mut self.d_act, &mut self.d_n, &mut self.d_o, &mut self.d_qkv];
        let thin = [&mut self.d_qkv_xa, &mut self.d_gate_up_xa, &mut self.d_xa];
        back.into_iter().chain(thin).filter(|t| t.capacity() > 0).try_for_each(|tensor| tensor.set_rows(rows))
    }
}
