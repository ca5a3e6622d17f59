//! The innermost loops of a product: a few rows times a few vectors of columns, held in registers over k.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::backend::cpu::{PANEL, Packed};

/// Numbers of k that are added up in registers before the result goes back to memory: then a few rows of the left operand stay in
/// the first cache, and the task's panels in the second.
pub(super) const DEPTH: usize = 512;
/// Rows of the largest tile: 8 × 3 sums, 3 vectors of the right operand and one number of the left fit 32 registers.
const MOST: usize = 8;

/// c[..rows, panels] = left·right, or += with `accumulate`; K is 1 or more.
pub(super) struct Task<'a> {
    /// First element of the first row; rows lie `stride` apart.
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    pub(crate) left: &'a [f32],
    pub(crate) left_stride: usize,
    pub(crate) right: &'a Packed,
    pub(crate) rows: usize,
    pub(crate) panels: Range<usize>,
    pub(crate) accumulate: bool,
}

/// # Safety
/// `out` has `rows` rows, `stride` apart, whose columns in `panels` nobody else touches; `left` has as many rows of K numbers.
pub(super) unsafe fn multiply(task: Task) {
    pulp::Arch::new().dispatch(task);
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let depth = self.right.shape().0;
        for k in (0..depth).step_by(DEPTH) {
            let part = k..(k + DEPTH).min(depth);
            let mut row = 0;
            while row < self.rows {
                let count = match self.rows - row {
                    left if left >= MOST && S::REGISTER_COUNT >= 32 => MOST,
                    left if left >= 4 => 4,
                    left if left >= 2 => 2,
                    _ => 1,
                };
                match count {
                    MOST => self.rows_of::<S, MOST>(simd, row, part.clone()),
                    4 => self.rows_of::<S, 4>(simd, row, part.clone()),
                    2 => self.rows_of::<S, 2>(simd, row, part.clone()),
                    _ => self.rows_of::<S, 1>(simd, row, part.clone()),
                }
                row += count;
            }
        }
    }
}

impl Task<'_> {
    /// `M` rows times all panels.
    #[inline(always)]
    fn rows_of<S: Simd, const M: usize>(&self, simd: S, row: usize, part: Range<usize>) {
        let cols = self.right.shape().1;
        for panel in self.panels.clone() {
            let wide = PANEL.min(cols - panel * PANEL);
            for col in (0..wide).step_by(3 * S::F32_LANES) {
                let tile = Tile {
                    // SAFETY: row and column lie inside the caller's rectangle.
                    out: unsafe { self.out.add(row * self.stride + panel * PANEL + col) },
                    stride: self.stride,
                    left: &self.left[row * self.left_stride..],
                    left_stride: self.left_stride,
                    right: &self.right.panel(panel)[part.start * PANEL + col..],
                    part: part.clone(),
                    wide: (wide - col).min(3 * S::F32_LANES),
                    add: self.accumulate || part.start > 0,
                };
                match tile.wide.div_ceil(S::F32_LANES) {
                    1 => tile.run::<S, M, 1>(simd),
                    2 => tile.run::<S, M, 2>(simd),
                    _ => tile.run::<S, M, 3>(simd),
                }
            }
        }
    }
}

/// M rows times V vectors.
struct Tile<'a> {
    out: *mut f32,
    stride: usize,
    left: &'a [f32],
    left_stride: usize,
    right: &'a [f32],
    part: Range<usize>,
    /// Columns that are written.
    wide: usize,
    add: bool,
}

impl Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, const M: usize, const V: usize>(self, simd: S) {
        let Tile { out, stride, wide, add, .. } = self;
        let left = (&self.left[self.part.start..], self.left_stride);
        let (right, depth) = ((self.right, PANEL), self.part.len());
        if wide == V * S::F32_LANES {
            // SAFETY: the caller's rectangle holds V whole vectors here.
            unsafe { add_up::<S, M, V>(simd, (out, stride), left, right, depth, add) };
            return;
        }
        // The last vector is not whole: sums go by way of a tile of their own.
        let mut sums = [0.0f32; MOST * PANEL];
        for i in 0..if add { M } else { 0 } {
            // SAFETY: `wide` columns of row i lie in the caller's rectangle.
            let row = unsafe { std::slice::from_raw_parts(out.add(i * stride), wide) };
            sums[i * PANEL..][..wide].copy_from_slice(row);
        }
        // SAFETY: `sums` holds M rows of PANEL numbers, at least V whole vectors.
        unsafe { add_up::<S, M, V>(simd, (sums.as_mut_ptr(), PANEL), left, right, depth, add) };
        for i in 0..M {
            // SAFETY: as above.
            let row = unsafe { std::slice::from_raw_parts_mut(out.add(i * stride), wide) };
            row.copy_from_slice(&sums[i * PANEL..][..wide]);
        }
    }
}

/// out (M, V vectors) = left (M, depth)·right (depth, V vectors), or += with `add`; each with its row stride. Every number is one
/// chain over the depth.
///
/// # Safety
/// `out` holds M rows of V vectors, `stride` apart, that nobody else touches.
#[inline(always)]
pub(crate) unsafe fn add_up<S: Simd, const M: usize, const V: usize>(
    simd: S,
    (out, stride): (*mut f32, usize),
    (left, left_stride): (&[f32], usize),
    (right, right_stride): (&[f32], usize),
    depth: usize,
    add: bool,
) {
    let lanes = S::F32_LANES;
    assert!(depth > 0 && (M - 1) * left_stride + depth <= left.len());
    assert!((depth - 1) * right_stride + V * lanes <= right.len());
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let at = |i: usize, j: usize| out.wrapping_add(i * stride + j * lanes).cast::<S::f32s>();
    // SAFETY: reads of `out` by the caller's promise; of `left` and `right` by the assertions.
    unsafe {
        for i in 0..if add { M } else { 0 } {
            for j in 0..V {
                sums[i][j] = at(i, j).read_unaligned();
            }
        }
        for k in 0..depth {
            let row = right.as_ptr().add(k * right_stride);
            let mut vectors = [simd.splat_f32s(0.0); V];
            for j in 0..V {
                vectors[j] = row.add(j * lanes).cast::<S::f32s>().read_unaligned();
            }
            for i in 0..M {
                let factor = simd.splat_f32s(*left.as_ptr().add(i * left_stride + k));
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
