//! LoRA on a frozen product of one or more parts (q∣k∣v, gate∣up): y_p = x·W_pᵀ + (lora_alpha/r)·(x·A_pᵀ)·B_pᵀ.
//! (arXiv:2106.09685)
//!
//! Backward, with dY the gradient of y: dxa_p = dY_p·sB_p, dx = dY·W + dxa·A, dA += dxaᵀ·x, dB_p += s·dY_pᵀ·xa_p.

mod cpu;
pub(crate) mod cuda;
pub mod naive;

pub(crate) use cpu::{linear_backward, linear_forward};

use super::{Cost, expect};
use crate::backend::{Backend, Matrix, Tensor};
use crate::error::Result;

/// The operands of one product's adapters, as products read them; the masters lie with the optimiser.
pub struct Lora<B: Backend> {
    /// Output features of each part; they sum to N.
    pub parts: Vec<usize>,
    pub rank: usize,
    /// lora_alpha / r.
    pub scale: f32,
    pub a: Tensor<B>, // (P·r, K) the parts one below the other
    pub b: Tensor<B>, // (N, r) already times `scale`; rows of part p read columns p·r.. of xa
}

/// Gradients with respect to the masters A and B; both accumulate.
pub struct LoraGrad<B: Backend> {
    pub da: Tensor<B, f32>, // (P·r, K)
    pub db: Tensor<B, f32>, // (N, r)
}

impl<B: Backend> Lora<B> {
    /// Columns of xa: parts × rank.
    pub fn width(&self) -> usize {
        self.parts.len() * self.rank
    }
}

/// Shapes of a product with its adapter, forward or backward: x (T, K), y (T, N), xa (T, P·r).
pub(crate) fn check<B: Backend>(
    op: &'static str,
    y: &Tensor<B>,
    xa: &Tensor<B>,
    x: &Tensor<B>,
    w: &B::Weight,
    lora: Option<&Lora<B>>,
) -> Result<()> {
    expect(op, "output", y.shape(), (x.rows(), w.rows()))?;
    expect(op, "input columns", x.cols(), w.cols())?;
    if let Some(lora) = lora {
        expect(op, "xa", xa.shape(), (x.rows(), lora.width()))?;
        expect(op, "A", lora.a.shape(), (lora.width(), w.cols()))?;
        expect(op, "B", lora.b.shape(), (w.rows(), lora.rank))?;
        expect(op, "parts", lora.parts.iter().sum::<usize>(), w.rows())?;
    }
    Ok(())
}

/// Forward: each operand read once, y and xa written once. Backward: dx, dA and dB; no dW, since the base is frozen.
pub(crate) fn costs(t: u64, n: u64, k: u64, parts: u64, r: u64, act: u64) -> [Cost; 2] {
    let (p, adapter) = (parts * r, parts * r * k + n * r);
    let weights = act * (n * k + adapter);
    [
        Cost { flops: 2 * t * (n * k + adapter), bytes: act * t * (k + n + p) + weights },
        Cost { flops: 2 * t * (n * k + 2 * adapter), bytes: act * t * (2 * k + n + 2 * p) + weights + 4 * adapter },
    ]
}
