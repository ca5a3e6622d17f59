//! The feed-forward's first half: (gate ∣ up) = x·Wᵀ (+ bias) (+ LoRA), act = f(gate)·up (SwiGLU, GeGLU: arXiv:2002.05202).
//! Ungated, as BERT has it, there is no up: gate = x·Wᵀ + bias, act = f(gate).

mod cpu;
pub(super) mod cuda;
mod curve;
pub mod naive;

use super::{Cost, Linear, LinearBackward, LinearForward, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

/// f. (GELU: arXiv:1606.08415)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// g·σ(g)
    Silu,
    /// g·Φ(g), Φ = (1 + erf(g/√2))/2; configurations say `gelu`.
    Gelu,
    /// g/2·(1 + tanh(√(2/π)·(g + 0.044715·g³))); configurations say `gelu_new` or `gelu_pytorch_tanh`.
    GeluTanh,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateUpSpec {
    pub activation: Activation,
    /// Whether the product has a second half that act is multiplied with.
    pub gated: bool,
}

impl GateUpSpec {
    /// Columns of the product for `features` activations: F or 2F.
    pub fn width(&self, features: usize) -> usize {
        if self.gated { 2 * features } else { features }
    }
}

/// `gate_up` (T, N) holds gate∣up, N = 2F, or where ungated the gate alone, N = F.
pub trait GateUp: Linear {
    /// Overwrites `act` (T, F) and the product's gate_up. The caller saves gate_up; act is cheap to have again.
    fn gate_up_forward(&self, act: &mut Tensor<Self>, product: LinearForward<Self>, spec: GateUpSpec) -> Result<()>;

    /// Turns `gate_up` in place into its own gradient, with which the product goes on, and act's gradient (T, F) into `act`, which the
    /// next product's gradients need: the curve is there, and nothing is read again.
    fn gate_up_backward(
        &self,
        product: LinearBackward<Self>,
        gate_up: &mut Tensor<Self>,
        act: &mut Tensor<Self>,
        spec: GateUpSpec,
    ) -> Result<()>;
}

/// Rows and columns of act.
fn check<B: Backend>(act: &Tensor<B>, gate_up: &Tensor<B>, spec: GateUpSpec) -> Result<(usize, usize)> {
    expect("gate_up", "gate_up", gate_up.shape(), (act.rows(), spec.width(act.cols())))?;
    Ok(act.shape())
}

/// The activation alone: gate and up in, act out. Its gradient alone: act, gate and up in and out.
pub(crate) fn activate_costs(rows: u64, cols: u64, spec: GateUpSpec, act: u64) -> [Cost; 2] {
    let width = spec.width(cols as usize) as u64;
    [
        Cost { flops: 6 * rows * cols, bytes: act * rows * (width + cols) },
        Cost { flops: 12 * rows * cols, bytes: 2 * act * rows * (width + cols) },
    ]
}
