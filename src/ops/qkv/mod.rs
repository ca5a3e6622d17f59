//! Query, key and value: (q ∣ k ∣ v) = x·Wᵀ (+ LoRA, + bias), then q/k norm where the family has it, of each head (Qwen3) or of all of
//! q and all of k (OLMo 2), then the rotation
//! (RoPE, arXiv:2104.09864, the half-split form): for pair i of a head, angle θ = position·freq_i,
//! (a, b) = (x_i, x_{i+e/2}) → (a·cos θ − b·sin θ, b·cos θ + a·sin θ).

mod cpu;
pub(super) mod cuda;
pub mod naive;

use std::ops::Range;

use super::{Cost, Linear, LinearBackward, LinearForward, NormSpec, expect};
use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkvSpec {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Of the q/k norm, where there is one.
    pub norm: NormSpec,
    /// That norm is of all of q, and of all of k; else of each head.
    pub wide: bool,
}

impl QkvSpec {
    /// Columns of q∣k∣v.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns that one q norm sees, and one k norm.
    pub(crate) fn normed(&self) -> [usize; 2] {
        let heads = if self.wide { [self.heads, self.kv_heads] } else { [1, 1] };
        heads.map(|heads| heads * self.head_dim)
    }

    /// Norms of q, and norms of q and k.
    fn norms(&self) -> [usize; 2] {
        if self.wide { [1, 2] } else { [self.heads, self.heads + self.kv_heads] }
    }

    /// The columns of each norm of q∣k, and whether they are q's.
    fn spans(&self) -> impl Iterator<Item = (Range<usize>, bool)> {
        let ([of_q, of_k], [q, all], first) = (self.normed(), self.norms(), self.heads * self.head_dim);
        let span = move |i: usize| {
            if i < q { i * of_q..(i + 1) * of_q } else { first + (i - q) * of_k..first + (i - q + 1) * of_k }
        };
        (0..all).map(move |i| (span(i), i < q))
    }

    /// Columns of q∣k: what is normed and rotated.
    pub fn rotated(&self) -> usize {
        (self.heads + self.kv_heads) * self.head_dim
    }
}

/// Rotation tables by position, made once per model.
pub struct Rope<B: Backend> {
    pub(crate) cos: Tensor<B, f32>, // (positions, e/2)
    pub(crate) sin: Tensor<B, f32>, // (positions, e/2)
}

impl<B: Backend> Rope<B> {
    /// `inv_freq` (e/2): the angle per position of each pair. Angles are computed in f32, as the framework's are.
    pub fn new(backend: &B, inv_freq: &[f32], positions: usize) -> Result<Rope<B>> {
        Self::scaled(backend, inv_freq, 1.0, positions)
    }

    /// Pairs that turn at all come out `factor` times as large.
    pub(crate) fn scaled(backend: &B, inv_freq: &[f32], factor: f32, positions: usize) -> Result<Rope<B>> {
        let table = |f: fn(f32) -> f32| -> Vec<f32> {
            let turned = move |p: usize, freq: f32| f(p as f32 * freq) * if freq == 0.0 { 1.0 } else { factor };
            (0..positions).flat_map(|p| inv_freq.iter().map(move |freq| turned(p, *freq))).collect()
        };
        Ok(Rope {
            cos: Tensor::from_host(backend, positions, inv_freq.len(), &table(f32::cos))?,
            sin: Tensor::from_host(backend, positions, inv_freq.len(), &table(f32::sin))?,
        })
    }
}

/// What follows the product.
pub struct Rotation<'a, B: Backend> {
    pub qk_norm: Option<&'a (Tensor<B>, Tensor<B>)>, // (1, e) each, wide (1, h·e), (1, k·e): q's gain, k's gain
    pub positions: &'a Indices<B>,                   // (T, 1)
    pub rope: &'a Rope<B>,
    pub spec: QkvSpec,
}

pub trait Qkv: Linear {
    /// Overwrites the product's q∣k∣v (T, (h+2k)·e), normed and rotated, and with a q/k norm `raw` (T, (h+k)·e): q∣k before (zero
    /// columns without one).
    fn qkv_forward(&self, product: LinearForward<Self>, raw: &mut Tensor<Self>, rotation: Rotation<Self>)
    -> Result<()>;

    /// Turns `dqkv` in place into the product's gradient, rotation and norm undone, with which that goes on.
    fn qkv_backward(
        &self,
        product: LinearBackward<Self>,
        dqkv: &mut Tensor<Self>,
        raw: &Tensor<Self>,
        rotation: Rotation<Self>,
    ) -> Result<()>;
}

fn check<B: Backend>(qkv: &Tensor<B>, raw: &Tensor<B>, rotation: &Rotation<B>) -> Result<()> {
    let Rotation { qk_norm, positions, rope, spec } = rotation;
    let rows = qkv.rows();
    expect("qkv", "columns", qkv.cols(), spec.width())?;
    expect("qkv", "positions", positions.rows(), rows)?;
    let known = rope.cos.rows().min(rope.sin.rows());
    expect("qkv", "positions within the rotation tables", positions.bound() <= known, true)?;
    expect("qkv", "rotation", (rope.cos.cols(), rope.sin.cols()), (spec.head_dim / 2, spec.head_dim / 2))?;
    if let Some((q, k)) = qk_norm {
        let [of_q, of_k] = spec.normed();
        expect("qkv", "q and k norm", (q.shape(), k.shape()), ((1, of_q), (1, of_k)))?;
        expect("qkv", "raw", raw.shape(), (rows, spec.rotated()))?;
    }
    Ok(())
}

/// Norm and rotation alone, beside the product's cost: q and k in and out.
pub(crate) fn rotate_cost(rows: u64, rotated: u64, act: u64) -> Cost {
    Cost { flops: 3 * rows * rotated, bytes: 2 * act * rows * rotated }
}
