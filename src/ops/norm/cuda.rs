use super::{Norm, NormBackward, NormForward, NormSpec, check, costs};
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, NormParams};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::Cost;

/// Eight rows keep 256 threads busy; one warp per row needs no shared memory.
pub(crate) const ROWS_PER_BLOCK: u32 = 8;
pub(crate) const DEFINES: &[Define] = &[("ROWS_PER_BLOCK", ROWS_PER_BLOCK as u64)];

pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::NORM, DEFINES, 32 * ROWS_PER_BLOCK)]
}

pub(crate) fn launch(rows: usize) -> LaunchConfig {
    LaunchConfig::linear((rows as u32).div_ceil(ROWS_PER_BLOCK), 32 * ROWS_PER_BLOCK)
}

fn params<'a>(x: &Tensor<Cuda>, residual: Option<&'a Tensor<Cuda>>, spec: NormSpec) -> NormParams<'a> {
    let offset = if spec.unit_offset { 1.0 } else { 0.0 };
    let residual = residual.map(|residual| &residual.buffer);
    NormParams { residual, rows: x.rows(), cols: x.cols(), stride: x.stride(), eps: spec.eps, offset }
}

impl Norm for Cuda {
    fn norm_forward(&self, operands: NormForward<Self>) -> Result<()> {
        let NormForward { y, rstd, x, w, residual, spec } = operands;
        let (rows, cols) = check(&[x, y, residual.unwrap_or(x)], rstd, w)?;
        self.charge(|| {
            let more = residual.map_or(0, |residual| 2 * (residual.rows() * residual.cols()) as u64);
            costs(rows as u64, cols as u64, 2)[0] + Cost { flops: 0, bytes: more }
        });
        let params = params(x, residual, spec);
        let (y, rstd, x, w) = (&mut y.buffer, &mut rstd.buffer, &x.buffer, &w.buffer);
        // SAFETY: `check` proved that x, y and residual hold rows × cols, rstd rows and w cols values.
        unsafe { kernels::norm_forward(self, DEFINES, launch(rows), y, rstd, x, w, &params) }
    }

    fn norm_backward(&self, operands: NormBackward<Self>) -> Result<()> {
        let NormBackward { dx, dy, x, rstd, w, spec } = operands;
        let (rows, cols) = check(&[x, dx, dy], rstd, w)?;
        self.charge(|| costs(rows as u64, cols as u64, 2)[1]);
        let params = params(x, None, spec);
        let (dx, dy, x, rstd, w) = (&mut dx.buffer, &dy.buffer, &x.buffer, &rstd.buffer, &w.buffer);
        // SAFETY: `check` proved that x, dx and dy hold rows × cols, rstd rows and w cols values.
        unsafe { kernels::norm_backward(self, DEFINES, launch(rows), dx, dy, x, rstd, w, &params) }
    }
}
