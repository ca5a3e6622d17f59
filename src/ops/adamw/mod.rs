//! AdamW (arXiv:1711.05101) over all parameters of a model at once, gradients clipped to a global norm:
//! g ← g·min(1, clip/‖g‖); m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²;
//! θ ← θ − lr·(m̂/(√v̂ + ε) + decay·θ), m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

mod cpu;
pub(super) mod cuda;
pub mod naive;

use super::{Cost, expect};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSpec {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub decay: f32,
    /// Largest global gradient norm.
    pub clip: f32,
    /// t, from 1.
    pub step: u32,
}

/// One trained tensor: f32 master, moments and gradient, and the operand that products read.
pub struct Parameter<'a, B: Backend> {
    pub master: &'a mut Tensor<B, f32>,
    pub m: &'a mut Tensor<B, f32>,
    pub v: &'a mut Tensor<B, f32>,
    pub grad: &'a Tensor<B, f32>,
    /// Rewritten with master × factor, where products read a copy of their own.
    pub operand: Option<(&'a mut Tensor<B>, f32)>,
}

/// Master and moments in and out, the gradient in twice (its norm comes first), the operand out.
pub(crate) fn cost(values: u64, act: u64) -> Cost {
    Cost { flops: 14 * values, bytes: (8 * 4 + act) * values }
}

pub trait AdamW: Backend {
    /// Updates every parameter and writes the gradients' global norm before clipping to `norm` (1, 1). When that norm is not
    /// finite nothing is updated.
    fn adamw(&self, norm: &mut Tensor<Self, f32>, parameters: &mut [Parameter<Self>], spec: AdamWSpec) -> Result<()>;

    /// Overwrites `operand` with master × factor: after loading, and after a rollback.
    fn write_operand(&self, operand: &mut Tensor<Self>, master: &Tensor<Self, f32>, factor: f32) -> Result<()>;
}

fn check<B: Backend>(parameters: &[Parameter<'_, B>]) -> Result<()> {
    for Parameter { master, m, v, grad, operand } in parameters {
        for tensor in [&**m, &**v, grad] {
            expect("adamw", "shape", tensor.shape(), master.shape())?;
        }
        if let Some((operand, _)) = operand {
            expect("adamw", "operand", operand.shape(), master.shape())?;
        }
    }
    Ok(())
}
