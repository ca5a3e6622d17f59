//! Matrix products on the CPU. A frozen weight is packed once and read in whole vectors; every element of the result is one chain
//! of multiply-adds over k, whatever stands beside it, so that a row's bits never depend on its company.

pub(crate) mod cuda;
pub mod naive;
mod tile;
mod vector;

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use rayon::prelude::*;

pub(crate) use self::tile::add_up;
use self::tile::{Task, multiply};
pub(crate) use self::vector::{add_scaled, dot, exp, simd, total};
use crate::backend::cpu::{PANEL, Packed};

/// Rows of a task: enough of them to read a panel of the right operand often while it lies in the second cache.
const ROWS: usize = 128;
/// Numbers of the right operand that a task reads again for every few rows: half of a second cache of one megabyte.
const CACHED: usize = 1 << 17;
/// Below this many multiplications a task is not worth handing to another thread.
const SMALL: usize = 1 << 18;

/// A matrix to read: `rows` × `cols` with any strides.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major, `stride` elements from row to row.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> View<'a> {
        View { data: &data[..extent(rows, cols, stride)], rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// As the right operand of a product.
    pub(crate) fn packed(self) -> Packed {
        Packed::new(self.data, (self.rows, self.cols), (self.row_stride, self.col_stride))
    }

    /// Rows become columns; nothing moves.
    pub(crate) fn t(self) -> View<'a> {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A row-major matrix to write.
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> ViewMut<'a> {
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> ViewMut<'a> {
        ViewMut { data: &mut data[..extent(rows, cols, stride)], rows, cols, stride }
    }
}

fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// Where tasks write: each to its own rectangle.
#[derive(Clone, Copy)]
struct Target(*mut f32);
// SAFETY: `product` and `add_transposed` give each task a rectangle that no other task touches.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// c = a·b, or c += a·b. Each row of c depends on its own row of a alone, bit for bit. `a` is row-major.
pub(crate) fn product(c: ViewMut, a: View, b: &Packed, accumulate: bool) {
    let (rows, cols, inner) = (c.rows, c.cols, a.cols);
    assert!(a.rows == rows && b.shape() == (inner, cols) && a.col_stride == 1);
    if rows == 0 || cols == 0 || inner == 0 {
        let empty = if accumulate { 0 } else { rows };
        c.data.chunks_mut(c.stride).take(empty).for_each(|row| row[..cols].fill(0.0));
        return;
    }
    let blocks = rows.div_ceil(ROWS);
    let panels = panels(blocks, cols, inner);
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let (row, first) = (index % blocks * ROWS, index / blocks * panels);
        let task = Task {
            out: target.at(row * c.stride),
            stride: c.stride,
            left: &a.data[row * a.row_stride..],
            left_stride: a.row_stride,
            right: b,
            rows: ROWS.min(rows - row),
            panels: first..(first + panels).min(cols.div_ceil(PANEL)),
            accumulate,
        };
        // SAFETY: the rows and panels of this task lie inside `c`, which holds extent(rows, cols, stride) numbers, and are its
        // own; `left` holds as many rows of `inner` numbers by the extent of `a`.
        unsafe { multiply(task) };
    };
    run_tasks(blocks * cols.div_ceil(PANEL).div_ceil(panels), rows * cols * inner, task);
}

/// Panels of one task: as many as stay in cache, fewer where all threads would not have work.
fn panels(blocks: usize, cols: usize, inner: usize) -> usize {
    let all = cols.div_ceil(PANEL);
    let cached = CACHED / (PANEL * inner.clamp(1, tile::DEPTH));
    let shared = (all * blocks).div_ceil(2 * rayon::current_num_threads());
    cached.min(shared).clamp(1, all)
}

/// c += scale·aᵀ·b where the sum runs over many rows: deterministic, but a sum over the batch. Neither operand is read twice, so
/// packing would not pay: `gemm` reads both as they lie.
pub(crate) fn add_transposed(c: ViewMut, a: View, b: View, scale: f32) {
    let (rows, cols, inner) = (c.rows, c.cols, a.rows);
    assert!(a.cols == rows && b.rows == inner && b.cols == cols && b.col_stride == 1);
    if rows == 0 || cols == 0 || inner == 0 {
        return;
    }
    let panel = cols.div_ceil(2).next_multiple_of(16);
    // Its kernels prefer column-major results, so it is given cᵀ += bᵀ·a.
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let col = index * panel;
        let n = panel.min(cols - col);
        // SAFETY: column panels are disjoint and inside `c`; `a` and `b` hold inner rows by their construction.
        unsafe {
            get_gemm_fn()(
                n,
                rows,
                inner,
                target.at(col),
                c.stride as isize,
                1,
                true,
                b.data[col..].as_ptr(),
                b.row_stride as isize,
                1,
                a.data.as_ptr(),
                a.col_stride as isize,
                a.row_stride as isize,
                1.0,
                scale,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    };
    run_tasks(cols.div_ceil(panel), rows * cols * inner, task);
}

fn run_tasks(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if work < SMALL || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}
