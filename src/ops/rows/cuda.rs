use super::{Rows, check, cost};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, DeviceBuffer, kernels};
use crate::backend::{Backend, Cuda, Indices, Tensor};
use crate::error::Result;
use crate::ops::Cost;

/// A row of 1,024 columns is 128 accesses of 16 bytes.
const THREADS: u32 = 128;
const DEFINES: &[Define] = &[("THREADS", THREADS as u64)];

pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::ROWS, DEFINES, THREADS)]
}

fn launch(rows: usize) -> LaunchConfig {
    LaunchConfig::linear(rows as u32, THREADS)
}

/// `y[i] = scale·x[rows[i]]` for the rows of `rows`; x and y have rows of `stride` elements.
///
/// # Safety
/// Every index is a row of `x`, and `y` has as many rows as `rows`.
unsafe fn gather(
    cuda: &Cuda,
    y: &mut Tensor<Cuda>,
    x: &DeviceBuffer<half::bf16>,
    rows: &Indices<Cuda>,
    scale: f32,
) -> Result<()> {
    let stride = y.stride();
    cuda.charge(|| cost(rows.rows() as u64, y.cols() as u64, 2));
    // SAFETY: the caller's promise.
    unsafe { kernels::gather(cuda, DEFINES, launch(rows.rows()), &mut y.buffer, x, rows.buffer(), stride, scale) }
}

impl Rows for Cuda {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight, scale: f32) -> Result<()> {
        check(x, table.shape(), tokens)?;
        // SAFETY: `check` proved one token per row, equal columns, and that every token is below V.
        unsafe { gather(self, x, &table.buffer, tokens, scale) }
    }

    fn embed_add(&self, x: &mut Tensor<Self>, index: &Indices<Self>, table: &Self::Weight) -> Result<()> {
        check(x, table.shape(), index)?;
        let stride = x.stride();
        self.charge(|| cost(index.rows() as u64, x.cols() as u64, 3));
        let (x, table, config) = (&mut x.buffer, &table.buffer, launch(index.rows()));
        // SAFETY: as in `embed`.
        unsafe { kernels::gather_add(self, DEFINES, config, x, table, index.buffer(), stride) }
    }

    fn gather(&self, y: &mut Tensor<Self>, x: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        check(y, x.shape(), rows)?;
        // SAFETY: `check` proved one index per row of y, each a row of x.
        unsafe { gather(self, y, &x.buffer, rows, 1.0) }
    }

    fn scatter(&self, dx: &mut Tensor<Self>, dy: &Tensor<Self>, rows: &Indices<Self>) -> Result<()> {
        check(dy, dx.shape(), rows)?;
        dx.clear(self)?;
        let stride = dy.stride();
        self.charge(|| cost(rows.rows() as u64, dy.cols() as u64, 2));
        let (dx, dy, config) = (&mut dx.buffer, &dy.buffer, launch(rows.rows()));
        // SAFETY: `check` proved one index per row of dy, each a row of dx.
        unsafe { kernels::scatter(self, DEFINES, config, dx, dy, rows.buffer(), stride) }
    }

    fn scale_rows(&self, y: &mut Tensor<Self>, weights: &Tensor<Self, f32>) -> Result<()> {
        crate::ops::expect("rows", "weights", weights.shape(), (y.rows(), 1))?;
        debug_assert_eq!(Cuda::stride::<f32>(1), 1);
        let (stride, config) = (y.stride(), launch(y.rows()));
        let values = (y.rows() * y.cols()) as u64;
        self.charge(|| Cost { flops: values, bytes: 4 * values });
        // SAFETY: one weight per row was just proved.
        unsafe { kernels::scale_rows(self, DEFINES, config, &mut y.buffer, &weights.buffer, stride) }
    }
}
