//! Memory, copies, launching. Knows no operation.
//!
//! A backend is a device with its memory. What can be computed on it is said by the traits of [`crate::ops`], which a
//! backend implements one by one; a model is written once over them and monomorphised for each backend.

pub(crate) mod cost;
pub(crate) mod cpu;
pub mod cuda;
pub(crate) mod indices;
mod nvtx;
pub mod pages;
pub(crate) mod tensor;

pub use cpu::Cpu;
pub use cuda::Cuda;
pub use indices::Indices;
pub(crate) use nvtx::{Stage, stage};
pub use tensor::{Element, Tensor};

use std::ops::Range;

use crate::error::{Error, Result};

/// Rows and columns of a frozen matrix, however a backend stores it.
pub trait Matrix: Send + Sync {
    /// Output and input features: the N and the K of y = x·Wᵀ.
    fn shape(&self) -> (usize, usize);

    fn rows(&self) -> usize {
        self.shape().0
    }

    fn cols(&self) -> usize {
        self.shape().1
    }
}

/// A device and its memory. All work is queued in order; `download` waits for it.
pub trait Backend: Sized + Clone + Send + Sync + 'static {
    /// Stored activations: f32 on `Cpu`, bf16 on a GPU.
    type Act: Element + Into<f32>;
    /// A frozen matrix as this backend multiplies it fastest.
    type Weight: Matrix;
    /// Device memory for `len` elements.
    type Buffer<T: Element>: Send + Sync;
    /// A captured decode step; nothing where launches cost nothing.
    type Graph: Default + Send;

    /// Packed rows of one forward pass where nobody says how many: activations that stay in a processor's caches, or that keep all
    /// of a GPU at work.
    const BATCH: usize;

    /// What the user reads: `cpu (2 threads of AMD EPYC, family 26 model 2, avx512f)`.
    fn describe(&self) -> String;

    /// Elements from one row of a tensor of `T` to the next; at least `cols`.
    fn stride<T: Element>(cols: usize) -> usize;

    /// `len` zeros. Out of memory is an error that says what was asked.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Overwrites `dst[at..at + src.len()]`.
    fn upload<T: Element>(&self, dst: &mut Self::Buffer<T>, at: usize, src: &[T]) -> Result<()>;

    /// Waits for queued work, then reads `src[at..at + dst.len()]`.
    fn download<T: Element>(&self, dst: &mut [T], src: &Self::Buffer<T>, at: usize) -> Result<()>;

    /// Overwrites `dst[dst_at..dst_at + len]`; queued.
    fn copy<T: Element>(
        &self,
        dst: &mut Self::Buffer<T>,
        dst_at: usize,
        src: &Self::Buffer<T>,
        src_at: usize,
        len: usize,
    ) -> Result<()>;

    /// Zeros `dst[at..at + len]`; queued.
    fn zero<T: Element>(&self, dst: &mut Self::Buffer<T>, at: usize, len: usize) -> Result<()>;

    /// Values as this backend stores activations: rounded where it rounds.
    fn activations(&self, values: &[f32]) -> Vec<Self::Act>;

    /// A frozen matrix from row-major f32 values (`rows * cols` of them, concatenated parts one below the other).
    fn weight(&self, rows: usize, cols: usize, values: Vec<f32>) -> Result<Self::Weight>;

    /// Whether passes over blocks of `weights` numbers run side by side, each on a thread of its own, instead of one after the other
    /// with all threads, or the whole device, at each operation.
    fn in_lanes(weights: usize) -> bool {
        let _ = weights;
        false
    }

    /// Rows that a step of `rows` is filled up to where steps are replayed: of few different sizes, as each must be recorded.
    fn replayed_rows(rows: usize) -> usize {
        rows
    }

    /// Runs `record`, or replays what an earlier call with the same `graph` recorded. All that changes between calls must lie
    /// in device memory. The closure may run more than once on the first call (plainly, then captured).
    fn replay(&self, graph: &mut Self::Graph, record: impl FnMut() -> Result<()>) -> Result<()>;
}

/// `at..at + len`, if it lies within `size` elements.
fn within(size: usize, at: usize, len: usize) -> Result<Range<usize>> {
    let end = at.saturating_add(len);
    if end <= size {
        return Ok(at..end);
    }
    let expected = format!("a range within {size} elements");
    Err(Error::Shape { op: "copy", expected, found: format!("{at}..{end}") })
}
