use super::Project;
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::lora::cuda::{linear_backward, linear_forward};
use crate::ops::{Lora, LoraGrad};

impl Project for Cuda {
    fn project_forward(
        &self,
        y: &mut Tensor<Self>,
        xa: &mut Tensor<Self>,
        x: &Tensor<Self>,
        residual: &Tensor<Self>,
        w: &Self::Weight,
        bias: Option<&Tensor<Self>>,
        lora: Option<&Lora<Self>>,
    ) -> Result<()> {
        linear_forward(self, "project", y, xa, x, w, lora, bias, Some(residual))
    }

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
    ) -> Result<()> {
        linear_backward(self, "project", dx, grad, dxa, dy, x, xa, w, lora)
    }
}
