use super::{LayerNorm, LayerNormBackward, LayerNormForward, check, costs};
use crate::backend::cuda::Build;
use crate::backend::cuda::kernels::{self, LayerNormParams};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::norm::cuda::{DEFINES, ROWS_PER_BLOCK, launch};

pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::LAYER_NORM, DEFINES, 32 * ROWS_PER_BLOCK)]
}

impl LayerNorm for Cuda {
    fn layer_norm_forward(&self, operands: LayerNormForward<Self>) -> Result<()> {
        let LayerNormForward { y, mean, rstd, x, w, bias, eps } = operands;
        let gains: Vec<&Tensor<Self>> = bias.into_iter().chain([w]).collect();
        let (rows, cols) = check(&[x, y], mean, rstd, &gains)?;
        let params = LayerNormParams { rows, cols, stride: x.stride(), eps };
        self.charge(|| costs(rows as u64, cols as u64, 2)[0]);
        let (y, mean, rstd) = (&mut y.buffer, &mut mean.buffer, &mut rstd.buffer);
        let (x, w, bias) = (&x.buffer, &w.buffer, bias.map(|bias| &bias.buffer));
        // SAFETY: `check` proved that x and y hold rows × cols, mean and rstd rows, w and the bias cols values.
        unsafe { kernels::layer_norm_forward(self, DEFINES, launch(rows), y, mean, rstd, x, w, bias, &params) }
    }

    fn layer_norm_backward(&self, operands: LayerNormBackward<Self>) -> Result<()> {
        let LayerNormBackward { dx, dy, x, mean, rstd, w } = operands;
        let (rows, cols) = check(&[x, dx, dy], mean, rstd, &[w])?;
        let params = LayerNormParams { rows, cols, stride: x.stride(), eps: 0.0 };
        self.charge(|| costs(rows as u64, cols as u64, 2)[1]);
        let (dx, dy, x) = (&mut dx.buffer, &dy.buffer, &x.buffer);
        let (mean, rstd, w) = (&mean.buffer, &rstd.buffer, &w.buffer);
        // SAFETY: `check` proved that x, dx and dy hold rows × cols, mean and rstd rows and w cols values.
        unsafe { kernels::layer_norm_backward(self, DEFINES, launch(rows), dx, dy, x, mean, rstd, w, &params) }
    }
}
