//! One transformer block: attention and feed-forward, each after a norm and added to the residual stream.

use super::adapter::{BlockGrad, BlockLora, Products};
use super::tensors::tensors;
use crate::backend::{Indices, Tensor};
use crate::error::Result;
use crate::ops::{
    AttentionBackward, AttentionForward, AttentionSpec, DecodeAttention, GateUpSpec, KvCache, LinearBackward,
    LinearForward, LinearGradients, LinearWeights, NormBackward, NormForward, NormSpec, Ops, Packing, QkvSpec, Rope,
    Rotation, SlotTable,
};

/// Frozen weights of one block.
pub struct Block<B: Ops> {
    pub input_norm: Tensor<B>,                   // (1, C)
    pub qkv: B::Weight,                          // ((h + 2k)·e, C)
    pub qkv_bias: Option<Tensor<B>>,             // (1, (h + 2k)·e)
    pub qk_norm: Option<(Tensor<B>, Tensor<B>)>, // (1, e) each: q's gain, k's gain
    pub o: B::Weight,                            // (C, h·e)
    pub mid_norm: Tensor<B>,                     // (1, C), before the feed-forward
    pub gate_up: B::Weight,                      // (2F, C)
    pub down: B::Weight,                         // (C, F)
    pub post_norms: Option<[Tensor<B>; 2]>,      // (1, C) each: of what o and down give
    pub spec: BlockSpec,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSpec {
    /// Before attention and the feed-forward.
    pub pre_norm: NormSpec,
    /// After them, where there are such norms.
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
    /// C where o's and down's outputs have norms of their own, else 0.
    pub normed: usize,
    /// LoRA rank; 0 without an adapter.
    pub rank: usize,
}

tensors! {
    /// What backward needs of a block's first half, up to attention: what is expensive to recompute.
    pub struct SavedAttention(rows: usize, w: &Widths) {
        x: B::Act = [rows, w.hidden], // block input
        rstd_in: f32 = [rows, 1],
        n_in: B::Act = [rows, w.hidden],
        qkv: B::Act = [rows, w.qkv], // normed and rotated
        qkv_xa: B::Act = [rows, 3 * w.rank],
        raw: B::Act = [rows, w.raw], // q∣k before norm and rotation
        o: B::Act = [rows, w.heads * w.head_dim],
        lse: f32 = [rows, w.heads], // log-sum-exp of the attention rows
    }
}

tensors! {
    /// Of its second half, in which no row sees another: the last block runs it on the head's rows alone.
    pub struct SavedRest(rows: usize, w: &Widths) {
        o_xa: B::Act = [rows, w.rank],
        mid: B::Act = [rows, w.hidden], // residual stream between the halves
        rstd_post: f32 = [rows, 1],
        n_post: B::Act = [rows, w.hidden],
        gate_up: B::Act = [rows, 2 * w.feed_forward],
        gate_up_xa: B::Act = [rows, 2 * w.rank],
        down_xa: B::Act = [rows, w.rank],
        o_y: B::Act = [rows, w.normed], // before its norm
        rstd_o: f32 = [rows, 1],
        down_y: B::Act = [rows, w.normed],
        rstd_down: f32 = [rows, 1],
    }
}

tensors! {
    /// What lives only within one block's forward, and within its backward where `back` has rows.
    pub struct BlockScratch(rows: usize, back: usize, w: &Widths) {
        act: B::Act = [rows, w.feed_forward], // and its gradient
        d_n: B::Act = [back, w.hidden],
        d_qkv: B::Act = [back, w.qkv],
        d_qkv_xa: B::Act = [back, 3 * w.rank],
        d_gate_up_xa: B::Act = [back, 2 * w.rank],
        d_xa: B::Act = [back, w.rank],
        d_y: B::Act = [back, w.normed],
    }
}

/// Of the norm after a product: its input, which is saved, its rstd, its gain.
type PostNormOut<'a, B> = (&'a mut Tensor<B>, &'a mut Tensor<B, f32>, &'a Tensor<B>);
type PostNormIn<'a, B> = (&'a Tensor<B>, &'a Tensor<B, f32>, &'a Tensor<B>);

/// Which keys a row may see.
pub enum Keys<'a, B: Ops> {
    /// Those of its own sequence in the batch.
    Packed(&'a Packing<B>),
    /// Those of its slot: one new token per slot.
    Cached(&'a mut KvCache<B>, &'a SlotTable<B>),
}

impl<B: Ops> Block<B> {
    /// What the four products read.
    fn products<'a>(&'a self, lora: Option<&'a BlockLora<B>>) -> Products<LinearWeights<'a, B>> {
        let of = |w, lora| LinearWeights { w, bias: None, lora };
        Products {
            qkv: LinearWeights { bias: self.qkv_bias.as_ref(), ..of(&self.qkv, lora.map(|l| &l.qkv)) },
            o: of(&self.o, lora.map(|l| &l.o)),
            gate_up: of(&self.gate_up, lora.map(|l| &l.gate_up)),
            down: of(&self.down, lora.map(|l| &l.down)),
        }
    }

    fn rotation<'a>(&'a self, positions: &'a Indices<B>, rope: &'a Rope<B>) -> Rotation<'a, B> {
        Rotation { qk_norm: self.qk_norm.as_ref(), positions, rope, spec: self.spec.qkv }
    }

    /// Overwrites `out` (T, C), the next block's input; `s.x` is this one's.
    pub fn forward(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        (s, rest): (&mut SavedAttention<B>, &mut SavedRest<B>),
        t: &mut BlockScratch<B>,
        lora: Option<&BlockLora<B>>,
        rope: &Rope<B>,
        keys: Keys<B>,
    ) -> Result<()> {
        self.attend(ops, s, lora, rope, keys)?; // 1 to 3
        self.rest_forward(ops, out, (&s.x, &s.o), rest, t, lora) // 4 to 7
    }

    /// Overwrites `s.o`; `s.x` is the input.
    pub fn attend(
        &self,
        ops: &B,
        s: &mut SavedAttention<B>,
        lora: Option<&BlockLora<B>>,
        rope: &Rope<B>,
        keys: Keys<B>,
    ) -> Result<()> {
        let spec = self.spec.attention;
        let positions = match &keys {
            Keys::Packed(packing) => &packing.positions,
            Keys::Cached(_, table) => &table.positions,
        };
        self.qkv_forward(ops, s, lora, positions, rope)?; // 1, 2
        match keys {
            Keys::Packed(packing) => {
                let (o, lse, qkv) = (&mut s.o, &mut s.lse, &s.qkv);
                ops.attention_forward(AttentionForward { o, lse, qkv, packing, spec }) // 3
            }
            Keys::Cached(cache, table) => {
                ops.cache_append(cache, &s.qkv, table)?;
                ops.decode_attention(DecodeAttention { o: &mut s.o, qkv: &s.qkv, cache, table })
            }
        }
    }

    /// Overwrites `out` (R, C) from `x` (R, C), the block's input, and `o` (R, h·e), what attention made of it.
    pub fn rest_forward(
        &self,
        ops: &B,
        out: &mut Tensor<B>,
        (x, o): (&Tensor<B>, &Tensor<B>),
        s: &mut SavedRest<B>,
        t: &mut BlockScratch<B>,
        lora: Option<&BlockLora<B>>,
    ) -> Result<()> {
        let (spec, weights, norms) = (&self.spec, self.products(lora), self.post_norms());
        let product = LinearForward { y: &mut s.mid, xa: &mut s.o_xa, x: o, weights: weights.o };
        self.add(ops, product, x, norms.map(|[w, _]| (&mut s.o_y, &mut s.rstd_o, w)))?; // 4
        let (y, rstd) = (&mut s.n_post, &mut s.rstd_post);
        ops.norm_forward(NormForward { y, rstd, x: &s.mid, w: &self.mid_norm, residual: None, spec: spec.pre_norm })?; // 5
        let (y, xa) = (&mut s.gate_up, &mut s.gate_up_xa);
        let product = LinearForward { y, xa, x: &s.n_post, weights: weights.gate_up };
        ops.gate_up_forward(&mut t.act, product, spec.gate_up)?; // 6
        let product = LinearForward { y: out, xa: &mut s.down_xa, x: &t.act, weights: weights.down };
        self.add(ops, product, &s.mid, norms.map(|[_, w]| (&mut s.down_y, &mut s.rstd_down, w))) // 7
    }

    fn post_norms(&self) -> Option<[&Tensor<B>; 2]> {
        self.post_norms.as_ref().map(|[o, down]| [o, down])
    }

    /// Overwrites `product.y` with the residual stream plus the product, by way of `norm` where that is given.
    fn add(
        &self,
        ops: &B,
        product: LinearForward<B>,
        residual: &Tensor<B>,
        norm: Option<PostNormOut<B>>,
    ) -> Result<()> {
        let Some((x, rstd, w)) = norm else { return ops.linear_forward(product, Some(residual)) };
        let LinearForward { y, .. } = product;
        ops.linear_forward(LinearForward { y: x, ..product }, None)?;
        ops.norm_forward(NormForward { y, rstd, x, w, residual: Some(residual), spec: self.spec.norm })
    }

    /// The gradient of a product's output: `dy`, the residual stream's, or where a norm stands between what becomes of that, in
    /// `d_y`.
    fn before_norm<'a>(
        &self,
        ops: &B,
        d_y: &'a mut Tensor<B>,
        dy: &'a Tensor<B>,
        norm: Option<PostNormIn<B>>,
    ) -> Result<&'a Tensor<B>> {
        let Some((x, rstd, w)) = norm else { return Ok(dy) };
        d_y.clear(ops)?;
        ops.norm_backward(NormBackward { dx: d_y, dy, x, rstd, w, spec: self.spec.norm })?;
        Ok(d_y)
    }

    /// Overwrites `s.qkv`; `s.x` is the input.
    pub(crate) fn qkv_forward(
        &self,
        ops: &B,
        s: &mut SavedAttention<B>,
        lora: Option<&BlockLora<B>>,
        positions: &Indices<B>,
        rope: &Rope<B>,
    ) -> Result<()> {
        let weights = self.products(lora).qkv;
        let (y, rstd) = (&mut s.n_in, &mut s.rstd_in);
        ops.norm_forward(NormForward {
            y,
            rstd,
            x: &s.x,
            w: &self.input_norm,
            residual: None,
            spec: self.spec.pre_norm,
        })?; // 1
        let product = LinearForward { y: &mut s.qkv, xa: &mut s.qkv_xa, x: &s.n_in, weights };
        ops.qkv_forward(product, &mut s.raw, self.rotation(positions, rope)) // 2
    }

    /// `dx` (R, C) holds the gradient of this block's output and leaves as what reaches its input past attention; overwrites
    /// `d_o` (R, h·e); adds to `grad`; uses up `s.gate_up`.
    pub fn rest_backward(
        &self,
        ops: &B,
        dx: &mut Tensor<B>,
        d_o: &mut Tensor<B>,
        grad: &mut BlockGrad<B>,
        o: &Tensor<B>,
        s: &mut SavedRest<B>,
        t: &mut BlockScratch<B>,
        lora: &BlockLora<B>,
    ) -> Result<()> {
        let (spec, weights, norms) = (&self.spec, self.products(Some(lora)), self.post_norms());
        let dy = self.before_norm(ops, &mut t.d_y, dx, norms.map(|[_, w]| (&s.down_y, &s.rstd_down, w)))?;
        let product = LinearBackward { dx: Some(&mut t.act), dxa: &mut t.d_xa, weights: weights.down };
        ops.linear_backward(product, dy)?; // 7
        let product = LinearBackward { dx: Some(&mut t.d_n), dxa: &mut t.d_gate_up_xa, weights: weights.gate_up };
        ops.gate_up_backward(product, &mut s.gate_up, &mut t.act, spec.gate_up)?; // 6
        let (grads, dxa, x, xa) = (&mut grad.gate_up, &t.d_gate_up_xa, &s.n_post, &s.gate_up_xa);
        ops.linear_gradients(LinearGradients { grad: grads, dxa, x, xa, lora: &lora.gate_up }, &s.gate_up)?;
        let (grads, dxa, x, xa) = (&mut grad.down, &t.d_xa, &t.act, &s.down_xa);
        ops.linear_gradients(LinearGradients { grad: grads, dxa, x, xa, lora: &lora.down }, dy)?;
        let (dy, rstd, w) = (&t.d_n, &s.rstd_post, &self.mid_norm);
        ops.norm_backward(NormBackward { dx, dy, x: &s.mid, rstd, w, spec: spec.pre_norm })?; // 5
        let dy = self.before_norm(ops, &mut t.d_y, dx, norms.map(|[w, _]| (&s.o_y, &s.rstd_o, w)))?;
        ops.linear_backward(LinearBackward { dx: Some(d_o), dxa: &mut t.d_xa, weights: weights.o }, dy)?; // 4
        let (grad, dxa, xa) = (&mut grad.o, &t.d_xa, &s.o_xa);
        ops.linear_gradients(LinearGradients { grad, dxa, x: o, xa, lora: &lora.o }, dy)
    }

    /// Adds to `dx` (T, C), as `rest_backward` left it, what comes by way of attention, whose gradient is `d_o` (T, h·e), and to
    /// `grad`. Without `dx` (of the first block: nothing below it is trained) only the latter.
    pub fn attend_backward(
        &self,
        ops: &B,
        dx: Option<&mut Tensor<B>>,
        d_o: &Tensor<B>,
        grad: &mut BlockGrad<B>,
        s: &SavedAttention<B>,
        t: &mut BlockScratch<B>,
        lora: &BlockLora<B>,
        rope: &Rope<B>,
        packing: &Packing<B>,
    ) -> Result<()> {
        let (spec, weights) = (&self.spec, self.products(Some(lora)).qkv);
        let (dqkv, o, lse, qkv) = (&mut t.d_qkv, &s.o, &s.lse, &s.qkv);
        ops.attention_backward(AttentionBackward { dqkv, d_o, o, lse, qkv, packing, spec: spec.attention })?; // 3
        let product = LinearBackward { dx: dx.is_some().then_some(&mut t.d_n), dxa: &mut t.d_qkv_xa, weights };
        ops.qkv_backward(product, &mut t.d_qkv, &s.raw, self.rotation(&packing.positions, rope))?; // 2
        let (grad, dxa, x, xa) = (&mut grad.qkv, &t.d_qkv_xa, &s.n_in, &s.qkv_xa);
        ops.linear_gradients(LinearGradients { grad, dxa, x, xa, lora: &lora.qkv }, &t.d_qkv)?;
        let Some(dx) = dx else { return Ok(()) };
        let (dy, rstd, w) = (&t.d_n, &s.rstd_in, &self.input_norm);
        ops.norm_backward(NormBackward { dx, dy, x: &s.x, rstd, w, spec: spec.pre_norm }) // 1
    }
}
