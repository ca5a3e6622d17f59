//! Matrix products on the CPU: the `gemm` crate in fixed blocks, so that a row's bits never depend on its company.
//!
//! `gemm` chooses its inner loops by the shape it is given, so the same row multiplied alone or among others may differ in its
//! last bits. Here every call it gets has 64 rows (the last block padded with zeros) and a column panel that depends on the
//! weight's shape alone.

use std::cell::RefCell;

use gemm::Parallelism;
use rayon::prelude::*;

/// Rows of one call. 128 rows reach no more once the right operand lies row-major.
const BLOCK: usize = 64;
/// Widest column panel: a panel of packed weights stays in the second cache, and one row block still feeds two threads.
const PANEL: usize = 512;
/// Below this many multiplications a task is not worth handing to another thread.
const SMALL: usize = 1 << 18;

thread_local! {
    static PAD: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> View<'a> {
        View { data: &data[..extent(rows, cols, stride)], rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Rows become columns; nothing moves.
    pub fn t(self) -> View<'a> {
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
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> ViewMut<'a> {
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
pub(crate) fn product(c: ViewMut, a: View, b: View, accumulate: bool) {
    let (rows, cols, inner) = (c.rows, c.cols, a.cols);
    assert!(a.rows == rows && b.rows == inner && b.cols == cols && a.col_stride == 1);
    if rows == 0 || cols == 0 {
        return;
    }
    let panel = cols.div_ceil(cols.div_ceil(PANEL)).next_multiple_of(16);
    let panels = cols.div_ceil(panel);
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let (row, col) = (index / panels * BLOCK, index % panels * panel);
        let (m, n) = (BLOCK.min(rows - row), panel.min(cols - col));
        let out = target.at(row * c.stride + col);
        let right = &b.data[col * b.col_stride..];
        let left = &a.data[row * a.row_stride..];
        if m == BLOCK {
            // SAFETY: the rectangle lies inside `c`, which holds extent(rows, cols, stride) values, and is this task's own.
            unsafe { call(BLOCK, n, inner, out, c.stride, accumulate, (left, a.row_stride, 1), (right, &b)) }
        } else {
            // SAFETY: as above; `padded` reads and writes m rows only.
            unsafe { padded(m, n, inner, out, c.stride, accumulate, (left, a.row_stride), (right, &b)) }
        }
    };
    spread(rows.div_ceil(BLOCK) * panels, rows * cols * inner, task);
}

/// c += scale·aᵀ·b where the sum runs over many rows: deterministic, but a sum over the batch.
pub(crate) fn reduce(c: ViewMut, a: View, b: View, scale: f32) {
    let (rows, cols, inner) = (c.rows, c.cols, a.rows);
    assert!(a.cols == rows && b.rows == inner && b.cols == cols && b.col_stride == 1);
    if rows == 0 || cols == 0 || inner == 0 {
        return;
    }
    let panel = cols.div_ceil(2).next_multiple_of(16);
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let col = index * panel;
        let n = panel.min(cols - col);
        // SAFETY: column panels are disjoint and inside `c`; `a` and `b` hold inner rows by their construction.
        unsafe {
            gemm::gemm(
                rows,
                n,
                inner,
                target.at(col),
                1,
                c.stride as isize,
                true,
                a.data.as_ptr(),
                a.row_stride as isize,
                a.col_stride as isize,
                b.data[col..].as_ptr(),
                1,
                b.row_stride as isize,
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

/// # Safety
/// `out` has m rows of n values, `stride` apart, that nobody else touches.
unsafe fn call(
    m: usize,
    n: usize,
    k: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    (left, left_stride, left_step): (&[f32], usize, usize),
    (right, b): (&[f32], &View),
) {
    // SAFETY: the caller's promise for `out`; `left` and `right` start inside views whose extent covers m × k and k × n.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            accumulate,
            left.as_ptr(),
            left_step as isize,
            left_stride as isize,
            right.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The last block: m < 64 rows, padded with zeros to the 64 that every row is multiplied among.
///
/// # Safety
/// As for `call`.
unsafe fn padded(
    m: usize,
    n: usize,
    k: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    (left, left_stride): (&[f32], usize),
    right: (&[f32], &View),
) {
    PAD.with_borrow_mut(|pad| {
        pad.clear();
        pad.resize(BLOCK * (k + n), 0.0);
        let (rows, sums) = pad.split_at_mut(BLOCK * k);
        for (to, from) in rows.chunks_exact_mut(k.max(1)).take(m).zip(left.chunks(left_stride)) {
            to.copy_from_slice(&from[..k]);
        }
        for r in 0..if accumulate { m } else { 0 } {
            // SAFETY: row r of the caller's rectangle.
            let row = unsafe { std::slice::from_raw_parts(out.add(r * stride), n) };
            sums[r * n..][..n].copy_from_slice(row);
        }
        // SAFETY: `sums` is this thread's own and holds BLOCK × n values.
        unsafe { call(BLOCK, n, k, sums.as_mut_ptr(), n, accumulate, (rows, k, 1), right) };
        for r in 0..m {
            // SAFETY: row r of the caller's rectangle.
            let row = unsafe { std::slice::from_raw_parts_mut(out.add(r * stride), n) };
            row.copy_from_slice(&sums[r * n..][..n]);
        }
    });
}

/// Σ a·b in sixteen running sums, so that the compiler may use whole vectors; the order is fixed.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// y += factor·x.
#[inline(always)]
pub(crate) fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// Runs `work` compiled for the widest vectors this processor has. A release binary is built for the oldest processor of its
/// kind; what is inlined into `work` is compiled once more for newer ones.
#[inline(always)]
pub(crate) fn simd<R>(work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Work<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// e^x to about one unit in the last place, in arithmetic that the compiler turns into whole vectors (libm's `expf` is a call
/// per element). Cody–Waite reduction to |r| ≤ ln 2 / 2, then a polynomial of degree six (coefficients of Cephes `expf`).
/// Below -87.3 it is 0, above 88.7 infinite; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = if x < -88.0 {
        -88.0
    } else if x > 89.0 {
        89.0
    } else {
        x
    };
    let n = (clamped * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // rounds to the nearest whole number
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.000_000_1e-1;
    let e = p * r * r + r + 1.0;
    // 2^n in two factors: n reaches ±128, one exponent field does not.
    let half = (n * 0.5) as i32;
    let rest = n as i32 - half;
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { e * scale(half) * scale(rest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_units() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() <= 2.5e-7, "exp({x}): found {found}, expected {expected}");
        }
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(100.0), f32::INFINITY);
    }

    /// A row's bits do not depend on how many rows stand above, below or beside it.
    #[test]
    fn a_row_does_not_see_its_company() {
        for (n, k) in [(7, 5), (128, 128), (640, 172), (1030, 96), (24, 352)] {
            let noise = |seed: usize, len: usize| -> Vec<f32> {
                (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
            };
            let (a, b) = (noise(1, 200 * k), noise(2, n * k));
            let run = |first: usize, rows: usize| {
                let mut c = vec![f32::NAN; rows * n];
                product(
                    ViewMut::new(&mut c, rows, n, n),
                    View::new(&a[first * k..], rows, k, k),
                    View::new(&b, k, n, n),
                    false,
                );
                c
            };
            let all = run(0, 200);
            for (first, rows) in [(0, 1), (3, 1), (5, 2), (60, 9), (100, 64), (64, 100), (199, 1)] {
                let some = run(first, rows);
                assert!(
                    some.iter().map(|v| v.to_bits()).eq(all[first * n..][..rows * n].iter().map(|v| v.to_bits())),
                    "rows {first}..{} of {n} x {k}",
                    first + rows
                );
            }
            let exact: f64 = (0..k).map(|i| f64::from(a[i]) * f64::from(b[i * n])).sum();
            assert!((f64::from(all[0]) - exact).abs() <= 1e-4, "found {}, expected {exact}", all[0]);
        }
    }
}
