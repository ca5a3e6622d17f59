//! The innermost loops of a product: a few rows times a few vectors of columns, held in registers over k.

use std::cell::Cell;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::ROWS;
use crate::backend::cpu::{PANEL, Right};

/// Numbers of k of the right operand's blocks where it must be widened and few rows read it: a block fits the first cache.
const SHALLOW: usize = 3 * PANEL;
/// Rows of the right operand that are asked of the second cache before their turn: some 200 cycles.
const AHEAD: usize = 16;

thread_local! {
    /// Blocks of the right operand, widened.
    static SPACE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Rows of numbers, and how far apart they begin.
pub(crate) type Rows<'a> = (&'a [f32], usize);

/// c[..rows, panels] = left·right, or += with `accumulate`; K is 1 or more.
pub(super) struct Task<'a> {
    /// First element of the first row; rows lie `stride` apart.
    pub(super) out: *mut f32,
    pub(super) stride: usize,
    pub(super) left: Rows<'a>,
    pub(super) right: Right<'a>,
    pub(super) rows: usize,
    pub(super) panels: Range<usize>,
    /// Numbers of k that are added up in registers before the result goes back to memory.
    pub(super) depth: usize,
    pub(super) accumulate: bool,
}

/// # Safety
/// `out` has `rows` rows, `stride` apart, whose columns in `panels` nobody else touches; `left` has as many rows of K numbers.
pub(super) unsafe fn multiply(task: Task) {
    pulp::Arch::new().dispatch(task);
}

impl WithSimd for Task<'_> {
    type Output = ();

    /// A panel is read again for every few rows, all of them once for every panel; where they are widened, as much of them at a time as
    /// stays in a cache.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if !self.right.is_widened() {
            return self.add_panels(simd, self.panels.clone(), self.depth, &mut []);
        }
        // Taken and put back, as a closure would be compiled for the oldest processor.
        let mut space = SPACE.take();
        let (at_once, step) = if self.rows <= 8 { (1, SHALLOW) } else { (self.panels.len().max(1), self.depth) };
        space.resize(space.len().max(at_once * step * PANEL), 0.0);
        for first in self.panels.clone().step_by(at_once) {
            self.add_panels(simd, first..(first + at_once).min(self.panels.end), step, &mut space);
        }
        SPACE.set(space);
    }
}

impl Task<'_> {
    /// The products with some panels, `step` numbers of k after another. Every result stays one chain over k, whatever the step.
    #[inline(always)]
    fn add_panels<S: Simd>(&self, simd: S, panels: Range<usize>, step: usize, space: &mut [f32]) {
        let (depth, cols) = self.right.shape();
        for first in (0..depth).step_by(step) {
            let (count, add) = (step.min(depth - first), self.accumulate || first > 0);
            let left = (&self.left.0[first..], self.left.1);
            for (panel, block) in panels.clone().zip(space.chunks_exact_mut(step * PANEL)) {
                self.right.write_block(panel, first, &mut block[..count * PANEL]);
            }
            for (row, panel) in (0..self.rows).step_by(8).flat_map(|row| panels.clone().map(move |panel| (row, panel)))
            {
                let rows = 8.min(self.rows - row);
                let left = (&left.0[row * left.1..], left.1);
                let wide = PANEL.min(cols - panel * PANEL);
                let whole = wide / S::F32_LANES * S::F32_LANES;
                let right = match self.right {
                    Right::Whole(packed) => &packed.panel(panel)[first * PANEL..],
                    _ => &space[(panel - panels.start) * step * PANEL..],
                };
                let right = (right, PANEL);
                // SAFETY: the caller's rectangle holds these columns of `rows` rows.
                unsafe {
                    let out = self.out.add(row * self.stride + panel * PANEL);
                    tiles::<S, false>(simd, (out, self.stride), left, right, (rows, whole), count, add);
                    if whole < wide {
                        let (out, right) = (out.add(whole), (&right.0[whole..], PANEL));
                        ragged(simd, (out, self.stride), left, right, (rows, wide - whole), count, add);
                    }
                }
            }
        }
    }
}

/// `tiles` where the columns are less than a vector: by way of rows of their own.
///
/// # Safety
/// As for `tiles`; rows are at most `ROWS`.
#[inline(always)]
unsafe fn ragged<S: Simd>(
    simd: S,
    (out, stride): (*mut f32, usize),
    left: Rows,
    right: Rows,
    (rows, cols): (usize, usize),
    depth: usize,
    add: bool,
) {
    const WIDEST: usize = 16;
    let mut sums = [0.0; ROWS * WIDEST];
    // SAFETY: `cols` columns of every row by the caller's promise; `sums` holds as many rows of a whole vector.
    unsafe {
        for (i, sums) in sums.chunks_exact_mut(WIDEST).take(if add { rows } else { 0 }).enumerate() {
            sums[..cols].copy_from_slice(std::slice::from_raw_parts(out.add(i * stride), cols));
        }
        tiles::<S, false>(simd, (sums.as_mut_ptr(), WIDEST), left, right, (rows, S::F32_LANES), depth, add);
        for (i, sums) in sums.chunks_exact(WIDEST).take(rows).enumerate() {
            std::slice::from_raw_parts_mut(out.add(i * stride), cols).copy_from_slice(&sums[..cols]);
        }
    }
}

/// out[..rows, ..cols] = left·right, or += with `add`, in tiles of eight rows and three vectors, or what registers hold of it; whole
/// vectors. With `T` left lies transposed, (depth, rows). Every number is one chain over the depth: its bits do not depend on the
/// others.
///
/// # Safety
/// `out` holds `rows` rows of `cols` numbers, `stride` apart, that nobody else touches.
#[inline(always)]
pub(crate) unsafe fn tiles<S: Simd, const T: bool>(
    simd: S,
    (out, stride): (*mut f32, usize),
    left: Rows,
    right: Rows,
    (rows, cols): (usize, usize),
    depth: usize,
    add: bool,
) {
    let most: usize = if S::REGISTER_COUNT >= 32 { 8 } else { 4 };
    let mut row = 0;
    while row < rows {
        let count = 1 << most.min(rows - row).ilog2();
        let left = (&left.0[if T { row } else { row * left.1 }..], left.1);
        for col in (0..cols).step_by(3 * S::F32_LANES) {
            let (right, vectors) = ((&right.0[col..], right.1), (cols - col) / S::F32_LANES);
            // SAFETY: `count` rows of as many vectors lie inside `out`.
            unsafe {
                let out = (out.add(row * stride + col), stride);
                match count {
                    8 => tile::<S, 8, T>(simd, out, left, right, vectors, depth, add),
                    4 => tile::<S, 4, T>(simd, out, left, right, vectors, depth, add),
                    2 => tile::<S, 2, T>(simd, out, left, right, vectors, depth, add),
                    _ => tile::<S, 1, T>(simd, out, left, right, vectors, depth, add),
                }
            }
        }
        row += count;
    }
}

/// M rows of three vectors at most.
///
/// # Safety
/// As for `add_up`.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const T: bool>(
    simd: S,
    out: (*mut f32, usize),
    left: Rows,
    right: Rows,
    vectors: usize,
    depth: usize,
    add: bool,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match vectors {
            1 => add_up::<S, M, 1, T>(simd, out, left, right, depth, add),
            2 => add_up::<S, M, 2, T>(simd, out, left, right, depth, add),
            _ => add_up::<S, M, 3, T>(simd, out, left, right, depth, add),
        }
    }
}

/// out (M, V vectors) = left (M, depth)·right (depth, V vectors), or += with `add`.
///
/// # Safety
/// `out` holds M rows of V vectors, `stride` apart, that nobody else touches.
#[inline(always)]
unsafe fn add_up<S: Simd, const M: usize, const V: usize, const T: bool>(
    simd: S,
    (out, stride): (*mut f32, usize),
    (left, left_stride): Rows,
    (right, right_stride): Rows,
    depth: usize,
    add: bool,
) {
    let lanes = S::F32_LANES;
    let (rows, cols) = if T { (depth, M) } else { (M, depth) };
    assert!(depth > 0 && (rows - 1) * left_stride + cols <= left.len());
    assert!((depth - 1) * right_stride + V * lanes <= right.len());
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let at = |i: usize, j: usize| out.wrapping_add(i * stride + j * lanes).cast::<S::f32s>();
    // SAFETY: reads of `out` by the caller's promise; of `left` and `right` by the assertions.
    unsafe {
        for i in 0..M {
            for j in 0..V {
                prefetch(at(i, j).cast());
            }
        }
        for i in 0..if add { M } else { 0 } {
            for j in 0..V {
                sums[i][j] = at(i, j).read_unaligned();
            }
        }
        for k in 0..depth {
            let row = right.as_ptr().add(k * right_stride);
            let mut vectors = [simd.splat_f32s(0.0); V];
            // A narrower tile has no time for it.
            for j in 0..if V == 3 { V } else { 0 } {
                prefetch(row.wrapping_add(AHEAD * right_stride + j * lanes));
            }
            for j in 0..V {
                vectors[j] = row.add(j * lanes).cast::<S::f32s>().read_unaligned();
            }
            for i in 0..M {
                let at = if T { k * left_stride + i } else { i * left_stride + k };
                let factor = simd.splat_f32s(*left.as_ptr().add(at));
                for j in 0..V {
                    sums[i][j] = simd.mul_add_e_f32s(factor, vectors[j], sums[i][j]);
                }
            }
        }
        for i in 0..M {
            for j in 0..V {
                at(i, j).write_unaligned(sums[i][j]);
            }
        }
    }
}

/// Asks for the cache line at an address, which may be anywhere.
#[inline(always)]
fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing and never faults; every x86-64 processor has it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;
    #[cfg(target_arch = "x86_64")]
    use pulp::x86::{V3, V4};

    use super::*;
    use crate::backend::cpu::{Halves, Packed};

    /// Whatever this processor would choose: vectors of one number, of eight and of sixteen, on shapes that end within a vector, a tile
    /// and a panel. Small whole numbers: f32 sums are exact.
    #[test]
    fn vectors_of_every_width_give_the_plain_product() {
        for (rows, depth, cols) in [(1, 1, 1), (7, 5, 47), (8, 48, 48), (13, 150, 49), (19, 530, 131)] {
            let numbers = |n: usize| (0..n).map(|i| (i * 37 % 19) as f32 - 9.0).collect::<Vec<f32>>();
            let (left, w) = (numbers(rows * depth), numbers(cols * depth));
            let (packed, halves) = (Packed::new(&w, (depth, cols), (1, depth)), Halves::packed(&w, (depth, cols)));
            let dot = |i: usize, j: usize| (0..depth).map(|k| left[i * depth + k] * w[j * depth + k]).sum::<f32>();
            let plain: Vec<f32> = (0..rows * cols).map(|at| dot(at / cols, at % cols)).collect();
            for (right, accumulate) in
                [Right::Whole(&packed), Right::Halves(&halves)].into_iter().flat_map(|r| [(r, false), (r, true)])
            {
                let found = |run: &dyn Fn(Task)| {
                    let mut out = vec![2.0; rows * cols];
                    let panels = 0..cols.div_ceil(PANEL);
                    run(Task {
                        out: out.as_mut_ptr(),
                        stride: cols,
                        left: (&left, depth),
                        right,
                        rows,
                        panels,
                        depth: 2 * PANEL,
                        accumulate,
                    });
                    out.iter().map(|sum| if accumulate { sum - 2.0 } else { *sum }).collect::<Vec<f32>>()
                };
                let mut widths = vec![found(&|task| Simd::vectorize(Scalar::new(), task))];
                #[cfg(target_arch = "x86_64")]
                {
                    widths.extend(V3::try_new().map(|simd| found(&|task| Simd::vectorize(simd, task))));
                    widths.extend(V4::try_new().map(|simd| found(&|task| Simd::vectorize(simd, task))));
                }
                widths.iter().for_each(|found| assert!(*found == plain, "{rows} x {depth} x {cols}, {accumulate}"));
            }
        }
    }
}
