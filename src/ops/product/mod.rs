//! Matrix products on the CPU. A frozen weight is packed once and read in whole vectors; every element of the result is one chain
//! of multiply-adds over k, whatever stands beside it, so that a row's bits never depend on its company.

pub(crate) mod cuda;
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
// SAFETY: `product` and `reduce` give each task a rectangle that no other task touches.
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
    spread(blocks * cols.div_ceil(PANEL).div_ceil(panels), rows * cols * inner, task);
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
pub(crate) fn reduce(c: ViewMut, a: View, b: View, scale: f32) {
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
    spread(cols.div_ceil(panel), rows * cols * inner, task);
}

fn spread(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if work < SMALL || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// A row's bits do not depend on how many rows stand above, below or beside it, whichever way the right operand lies; and
    /// they are the product's.
    #[test]
    fn a_row_does_not_see_its_company() {
        for (n, k) in [
            (7, 5),
            (128, 128),
            (640, 172),
            (1030, 96),
            (24, 352),
            (3, 19),
            (8, 2),
            (1, 40),
            (48, 1300),
            (112, 1300),
            (200, 1300),
            (49, 512),
            (95, 513),
        ] {
            let (a, b) = (noise(1, 200 * k), noise(2, n * k));
            for right in [View::new(&b, k, n, n), View::new(&b, n, k, k).t()] {
                let packed = right.packed();
                let run = |first: usize, rows: usize| {
                    let mut c = noise(3, 200 * n).split_off(first * n);
                    let a = View::new(&a[first * k..], rows, k, k);
                    product(ViewMut::new(&mut c, rows, n, n), a, &packed, true);
                    c.truncate(rows * n);
                    c
                };
                let all = run(0, 200);
                let ends = (1..=64).map(|rows| (3, rows));
                for (first, rows) in ends.chain([(5, 2), (60, 9), (100, 64), (64, 100), (1, 130), (199, 1)]) {
                    let some = run(first, rows);
                    assert!(
                        some.iter().map(|v| v.to_bits()).eq(all[first * n..][..rows * n].iter().map(|v| v.to_bits())),
                        "rows {first}..{} of {n} x {k}, strides {} and {}",
                        first + rows,
                        right.row_stride,
                        right.col_stride
                    );
                }
                for (row, accumulate) in [(0, true), (0, false), (199, true), (199, false)] {
                    let before = noise(3, 200 * n);
                    let mut c = before.clone();
                    product(ViewMut::new(&mut c, 200, n, n), View::new(&a, 200, k, k), &packed, accumulate);
                    for col in 0..n {
                        let at = |i: usize| f64::from(b[i * right.row_stride + col * right.col_stride]);
                        let before = if accumulate { f64::from(before[row * n + col]) } else { 0.0 };
                        let terms = || (0..k).map(|i| f64::from(a[row * k + i]) * at(i));
                        let (exact, size) = (before + terms().sum::<f64>(), 1.0 + terms().map(f64::abs).sum::<f64>());
                        let found = c[row * n + col];
                        assert!((f64::from(found) - exact).abs() <= 4e-6 * size, "found {found}, expected {exact}");
                    }
                }
            }
        }
    }
}
