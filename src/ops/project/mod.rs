//! Projection back into the residual stream: y = residual + x·Wᵀ (+ bias) (+ LoRA). Writes the next saved input, so nothing is
//! copied.

mod cpu;
mod cuda;
pub mod naive;

use super::{Lora, LoraGrad};
use crate::backend::{Backend, Tensor};
use crate::error::Result;

pub trait Project: Backend {
    /// Overwrites `y` (T, N) and `xa` (T, r).
    fn project_forward(
        &self,
        y: &mut Tensor<Self>,
        xa: &mut Tensor<Self>,
        x: &Tensor<Self>,
        residual: &Tensor<Self>,
        w: &Self::Weight,
        bias: Option<&Tensor<Self>>,
        lora: Option<&Lora<Self>>,
    ) -> Result<()>;

    /// Overwrites `dx` (T, K) and the scratch `dxa` (T, r); adds to `grad`. The residual's gradient is dy itself. No dW and no
    /// dbias: the base is frozen.
    fn project_backward(
        &self,
        dx: &mut Tensor<Self>,
        grad: Option<&mut LoraGrad<Self>>,
        dxa: &mut Tensor<Self>,
        dy: &Tensor<Self>,
        x: &Tensor<Self>,
        xa: &Tensor<Self>,
        w: &Self::Weight,
        lora: Option<&Lora<Self>>,
    ) -> Result<()>;
}
