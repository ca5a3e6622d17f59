//! Matrix products on the CPU: the `gemm` crate in fixed blocks, so that a row's bits never depend on its company.
//!
//! `gemm` chooses its inner loops by the shape it is given, so the same row multiplied alone or among others may differ in its
//! last bits. Here every call has at most 64 rows, never so few that another loop would be chosen (`least_rows`: the last block
//! is padded with zeros up to that), and column panels that are either the whole width or too wide for another loop.

pub(crate) mod cuda;

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
    let blocks = rows.div_ceil(BLOCK);
    let panels = panels(blocks, cols);
    let start = |panel: usize| if panel == panels { cols } else { panel * cols / panels / 16 * 16 };
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let (row, col) = (index / panels * BLOCK, start(index % panels));
        let (m, n) = (BLOCK.min(rows - row), start(index % panels + 1) - col);
        let out = target.at(row * c.stride + col);
        let right = &b.data[col * b.col_stride..];
        let left = &a.data[row * a.row_stride..];
        if m >= least_rows(n, &b) {
            // SAFETY: the rectangle lies inside `c`, which holds extent(rows, cols, stride) values, and is this task's own.
            unsafe { call(m, n, inner, out, c.stride, accumulate, (left, a.row_stride, 1), (right, &b)) }
        } else {
            // SAFETY: as above; `padded` reads and writes m rows only.
            unsafe { padded(m, n, inner, out, c.stride, accumulate, (left, a.row_stride), (right, &b)) }
        }
    };
    spread(blocks * panels, rows * cols * inner, task);
}

/// Into how many column panels a product is cut: so that a panel of the right operand stays in cache, and where there are
/// fewer row blocks than threads, so that all threads have work. Panels are wider than 64 columns, where gemm cuts k by k
/// alone: bits do not depend on the cut.
fn panels(blocks: usize, cols: usize) -> usize {
    const LEAST: usize = 96;
    let threads = rayon::current_num_threads();
    let wanted = if blocks < threads { threads.div_ceil(blocks).min(cols / LEAST) } else { 1 };
    cols.div_ceil(PANEL).max(wanted)
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

/// The fewest rows for which gemm 0.19 takes the same loop as for `BLOCK` rows, and so gives a row the same bits: a single row
/// goes to its matrix-vector product, and up to 256 results of operands that both run along k to its dot products. Where a row
/// count is only bounded by the block size, each result is one chain over k, cut by k alone.
/// `a_row_does_not_see_its_company` holds this against the version in use.
fn least_rows(n: usize, b: &View) -> usize {
    const DOTS: usize = 256;
    if b.row_stride == 1 && BLOCK * n > DOTS { (DOTS / n + 1).max(2) } else { 2 }
}

/// The last block where it has too few rows: padded with zeros to `least_rows`.
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
    let least = least_rows(n, right.1);
    PAD.with_borrow_mut(|pad| {
        pad.clear();
        pad.resize(least * (k + n), 0.0);
        let (rows, sums) = pad.split_at_mut(least * k);
        for (to, from) in rows.chunks_exact_mut(k.max(1)).take(m).zip(left.chunks(left_stride)) {
            to.copy_from_slice(&from[..k]);
        }
        for r in 0..if accumulate { m } else { 0 } {
            // SAFETY: row r of the caller's rectangle.
            let row = unsafe { std::slice::from_raw_parts(out.add(r * stride), n) };
            sums[r * n..][..n].copy_from_slice(row);
        }
        // SAFETY: `sums` is this thread's own and holds least × n values.
        unsafe { call(least, n, k, sums.as_mut_ptr(), n, accumulate, (rows, k, 1), right) };
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

/// Declares a function that is compiled for the widest vectors the processor at hand has. A release binary is built for the
/// oldest processor of its kind; the body, and what is `#[inline(always)]` in it, is compiled again for newer ones. (A closure or
/// a function passed to a helper would not do: the compiler may keep it as one function, for the oldest processor.)
macro_rules! simd {
    ($(#[$meta:meta])* fn $name:ident<$life:lifetime>($($argument:ident: $type:ty),* $(,)?) -> $output:ty $body:block) => {
        $(#[$meta])*
        fn $name<$life>($($argument: $type),*) -> $output {
            struct Work<$life> {
                $($argument: $type,)*
                life: std::marker::PhantomData<&$life ()>,
            }
            impl<$life> pulp::WithSimd for Work<$life> {
                type Output = $output;

                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> $output {
                    let Work { $($argument,)* life: _ } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Work { $($argument,)* life: std::marker::PhantomData })
        }
    };
    ($(#[$meta:meta])* fn $name:ident<$life:lifetime>($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        simd! { $(#[$meta])* fn $name<$life>($($argument: $type),*) -> () $body }
    };
}
pub(crate) use simd;

/// e^x to about one unit in the last place, in arithmetic that the compiler turns into whole vectors (libm's `expf` is a call
/// per element). Cody–Waite reduction to |r| ≤ ln 2 / 2, then a polynomial of degree six (coefficients of Cephes `expf`).
/// Below -87.3 it is 0, above 88.7 infinite; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-88.0, 89.0);
    // Adding 1.5·2²³ rounds to the nearest whole number and leaves it in the lowest bits, as vectors of integers can read it.
    let shifted = clamped * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    // 2^n in two factors: n reaches ±128, one exponent field does not.
    let whole = (shifted.to_bits() as i32).wrapping_sub(0x4B40_0000);
    let half = whole >> 1;
    let rest = whole.wrapping_sub(half);
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
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

    fn noise(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// A row's bits do not depend on how many rows stand above, below or beside it, whichever way the right operand lies.
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
        ] {
            let (a, b) = (noise(1, 200 * k), noise(2, n * k));
            for right in [View::new(&b, k, n, n), View::new(&b, n, k, k).t()] {
                let run = |first: usize, rows: usize| {
                    let mut c = noise(3, 200 * n).split_off(first * n);
                    let a = View::new(&a[first * k..], rows, k, k);
                    product(ViewMut::new(&mut c, rows, n, n), a, right, true);
                    c.truncate(rows * n);
                    c
                };
                let all = run(0, 200);
                let ends = (1..=BLOCK).map(|rows| (3, rows));
                for (first, rows) in ends.chain([(5, 2), (60, 9), (100, 64), (64, 100), (199, 1)]) {
                    let some = run(first, rows);
                    assert!(
                        some.iter().map(|v| v.to_bits()).eq(all[first * n..][..rows * n].iter().map(|v| v.to_bits())),
                        "rows {first}..{} of {n} x {k}, strides {} and {}",
                        first + rows,
                        right.row_stride,
                        right.col_stride
                    );
                }
                let at = |i: usize| f64::from(b[i * right.row_stride]);
                let exact: f64 = (0..k).map(|i| f64::from(a[i]) * at(i)).sum::<f64>() + f64::from(noise(3, 1)[0]);
                assert!((f64::from(all[0]) - exact).abs() <= 1e-4, "found {}, expected {exact}", all[0]);
            }
        }
    }
}
