//! The feed-forward's first half: (gate ∣ up) = x·Wᵀ (+ LoRA), act = f(gate)·up, f = silu (SwiGLU, arXiv:2002.05202).

mod cpu;
pub(super) mod cuda;

use super::{Cost, Lora, LoraGrad, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// g·σ(g)
    Silu,
}

pub trait GateUp: Backend {
    /// Overwrites `act` (T, F), `gate_up` (T, 2F) and `xa` (T, 2r). The caller saves gate_up; act is cheap to have again.
    fn gate_up_forward(
        &self,
        act: &mut Tensor<Self>,
        gate_up: &mut Tensor<Self>,
        xa: &mut Tensor<Self>,
        x: &Tensor<Self>,
        w: &Self::Weight,
        lora: Option<&Lora<Self>>,
        activation: Activation,
    ) -> Result<()>;

    /// Overwrites `act` (T, F) from the saved gate_up: backward's first line, since the next product's gradient needs it.
    fn activate(&self, act: &mut Tensor<Self>, gate_up: &Tensor<Self>, activation: Activation) -> Result<()>;

    /// Turns `gate_up` in place into its own gradient, then overwrites `dx` (T, K) and the scratch `dxa` (T, 2r) and adds to
    /// `grad`. No dW: the base is frozen.
    fn gate_up_backward(
        &self,
        dx: &mut Tensor<Self>,
        grad: Option<&mut LoraGrad<Self>>,
        gate_up: &mut Tensor<Self>,
        dxa: &mut Tensor<Self>,
        dact: &Tensor<Self>,
        x: &Tensor<Self>,
        xa: &Tensor<Self>,
        w: &Self::Weight,
        lora: Option<&Lora<Self>>,
        activation: Activation,
    ) -> Result<()>;
}

pub(crate) fn check<B: Backend>(act: &Tensor<B>, gate_up: &Tensor<B>) -> Result<(usize, usize)> {
    expect("gate_up", "gate_up", gate_up.shape(), (act.rows(), 2 * act.cols()))?;
    Ok(act.shape())
}

/// The activation alone: gate and up in, act out.
pub fn activate_cost(rows: u64, cols: u64, act: u64) -> Cost {
    Cost { flops: 6 * rows * cols, bytes: act * 3 * rows * cols }
}
