//! LoRA on a frozen product of one or more parts (q∣k∣v, gate∣up): y_p = x·W_pᵀ + (lora_alpha/r)·(x·A_pᵀ)·B_pᵀ (+ bias)
//! (+ residual). (arXiv:2106.09685)
//!
//! Backward, with dY the gradient of y: dxa_p = dY_p·sB_p, dx = dY·W + dxa·A; gradients: dA += dxaᵀ·x, dB_p += s·dY_pᵀ·xa_p. No
//! dW and no dbias: the base is frozen.

pub(super) mod cpu;
pub(crate) mod cuda;
pub mod naive;

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

/// What a product reads in both directions.
pub struct LinearWeights<'a, B: Backend> {
    pub w: &'a B::Weight,            // (N, K)
    pub bias: Option<&'a Tensor<B>>, // (1, N)
    pub lora: Option<&'a Lora<B>>,
}

pub struct LinearForward<'a, B: Backend> {
    pub y: &'a mut Tensor<B>,  // (T, N) overwritten
    pub xa: &'a mut Tensor<B>, // (T, P·r) overwritten, with an adapter
    pub x: &'a Tensor<B>,      // (T, K)
    pub weights: LinearWeights<'a, B>,
}

pub struct LinearBackward<'a, B: Backend> {
    pub dx: Option<&'a mut Tensor<B>>, // (T, K) overwritten, where somebody reads it
    pub dxa: &'a mut Tensor<B>,        // (T, P·r) overwritten, with an adapter
    pub weights: LinearWeights<'a, B>,
}

/// Of the adapter's masters, once dxa is there.
pub struct LinearGradients<'a, B: Backend> {
    pub grad: &'a mut LoraGrad<B>, // added to
    pub dxa: &'a Tensor<B>,        // (T, P·r)
    pub x: &'a Tensor<B>,          // (T, K)
    pub xa: &'a Tensor<B>,         // (T, P·r)
    pub lora: &'a Lora<B>,
}

pub trait Linear: Backend {
    /// Adds `residual` (T, N), so that the next saved input is written at once: nothing is copied.
    fn linear_forward(&self, operands: LinearForward<Self>, residual: Option<&Tensor<Self>>) -> Result<()>;

    /// dx and dxa from `dy` (T, N), which is the residual's gradient, too.
    fn linear_backward(&self, operands: LinearBackward<Self>, dy: &Tensor<Self>) -> Result<()>;

    /// Adds dA and dB, from `dy` (T, N).
    fn linear_gradients(&self, operands: LinearGradients<Self>, dy: &Tensor<Self>) -> Result<()>;
}

/// Shapes of a product with its adapter, forward or backward: x (T, K), where there is one, y (T, N), xa (T, P·r).
pub(super) fn check<B: Backend>(
    y: &Tensor<B>,
    xa: &Tensor<B>,
    x: Option<&Tensor<B>>,
    weights: &LinearWeights<B>,
) -> Result<()> {
    let LinearWeights { w, bias, lora } = weights;
    let rows = y.rows();
    expect("linear", "output columns", y.cols(), w.rows())?;
    if let Some(x) = x {
        expect("linear", "input", x.shape(), (rows, w.cols()))?;
    }
    if let Some(bias) = bias {
        expect("linear", "bias", bias.shape(), (1, w.rows()))?;
    }
    if let Some(lora) = lora {
        expect("linear", "xa", xa.shape(), (rows, lora.width()))?;
        expect("linear", "A", lora.a.shape(), (lora.width(), w.cols()))?;
        expect("linear", "B", lora.b.shape(), (w.rows(), lora.rank))?;
        expect("linear", "parts", lora.parts.iter().sum::<usize>(), w.rows())?;
    }
    Ok(())
}

fn check_gradients<B: Backend>(operands: &LinearGradients<B>, dy: &Tensor<B>) -> Result<()> {
    let LinearGradients { grad, dxa, x, xa, lora } = operands;
    let (rows, (width, k), (n, _)) = (dy.rows(), lora.a.shape(), lora.b.shape());
    expect("linear", "output", dy.shape(), (rows, n))?;
    expect("linear", "input", x.shape(), (rows, k))?;
    expect("linear", "xa and dxa", (xa.shape(), dxa.shape()), ((rows, width), (rows, width)))?;
    expect("linear", "dA and dB", (grad.da.shape(), grad.db.shape()), (lora.a.shape(), lora.b.shape()))
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
