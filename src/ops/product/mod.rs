//! Matrix products on the CPU. A frozen weight is packed once and read in whole vectors; every element of the result is one chain
//! of multiply-adds over k, whatever stands beside it, so that a row's bits never depend on its company.

pub(crate) mod cuda;
pub mod naive;
mod tile;
mod vector;

use rayon::prelude::*;

pub(crate) use self::tile::{Rows, tiles};
use self::tile::{Task, multiply};
pub(crate) use self::vector::{add_scaled, dot, exp, folded, maximum, simd, total};
use crate::backend::cpu::{PANEL, Packed, Right, second_cache};

/// Rows of a task: enough of them to read a panel of the right operand often while it lies in the second cache.
const ROWS: usize = 128;
/// The same where panels are widened first, which costs as much as some rows.
const WIDENED_ROWS: usize = 512;
/// Panels of a task that the second cache holds, if each is as deep as it then can be.
const PANELS: usize = 5;
/// Rows that a product over rows adds up in one chain.
const CHAIN: usize = 512;
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
// SAFETY: `product` gives each task a rectangle that no other task touches.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// c = a·b, or c += a·b. Each row of c depends on its own row of a alone, bit for bit. `a` is row-major.
pub(crate) fn product<'a>(c: ViewMut, a: View, b: impl Into<Right<'a>>, accumulate: bool) {
    let (b, rows, cols, inner) = (b.into(), c.rows, c.cols, a.cols);
    assert!(a.rows == rows && b.shape() == (inner, cols) && a.col_stride == 1);
    if rows == 0 || cols == 0 || inner == 0 {
        let empty = if accumulate { 0 } else { rows };
        c.data.chunks_mut(c.stride).take(empty).for_each(|row| row[..cols].fill(0.0));
        return;
    }
    let block = rows_at_once(b);
    let blocks = rows.div_ceil(block);
    let depth = depth().min(inner);
    let panels = panels(blocks, cols, depth);
    let target = Target(c.data.as_mut_ptr());
    let task = |index: usize| {
        let (row, first) = (index % blocks * block, index / blocks * panels);
        let task = Task {
            out: target.at(row * c.stride),
            stride: c.stride,
            left: (&a.data[row * a.row_stride..], a.row_stride),
            right: b,
            rows: block.min(rows - row),
            panels: first..(first + panels).min(cols.div_ceil(PANEL)),
            depth,
            accumulate,
        };
        // SAFETY: the rows and panels of this task lie inside `c`, which holds extent(rows, cols, stride) numbers, and are its
        // own; `left` holds as many rows of `inner` numbers by the extent of `a`.
        unsafe { multiply(task) };
    };
    run_tasks(blocks * cols.div_ceil(PANEL).div_ceil(panels), rows * cols * inner, task);
}

/// Rows of a task.
pub(crate) fn rows_at_once(right: Right) -> usize {
    if right.is_widened() { WIDENED_ROWS } else { ROWS }
}

/// Numbers that a task reads again for every few rows: half of the second cache.
fn cached() -> usize {
    second_cache() / 2 / size_of::<f32>()
}

/// Numbers of k that a task adds up at a time; whole blocks of a transpose that is widened.
fn depth() -> usize {
    (cached() / (PANELS * PANEL) / PANEL * PANEL).max(PANEL)
}

/// Panels of one task: as many as stay in cache, fewer where all threads would not have work.
fn panels(blocks: usize, cols: usize, depth: usize) -> usize {
    let all = cols.div_ceil(PANEL);
    let shared = (all * blocks).div_ceil(2 * rayon::current_num_threads());
    (cached() / (PANEL * depth)).min(shared).clamp(1, all)
}

/// c += scale·narrowᵀ·wide (width, cols), or the transpose of it with `turned`. Each number is the sum of a few chains over the rows,
/// which begin at the same rows whatever the number of threads.
pub(crate) fn add_transposed(c: ViewMut, narrow: View, wide: View, scale: f32, turned: bool) {
    let (rows, width, cols) = (narrow.rows, narrow.cols, wide.cols);
    assert!(wide.rows == rows && (c.rows, c.cols) == if turned { (cols, width) } else { (width, cols) });
    let (panels, chains) = (cols.div_ceil(PANEL), rows.div_ceil(CHAIN));
    let least = if rows * width * cols < SMALL { panels * chains } else { 1 };
    let sum = |i: usize| transposed(narrow, wide, i / chains * PANEL, i % chains * CHAIN);
    let sums: Vec<_> = (0..panels * chains).into_par_iter().with_min_len(least.max(1)).map(sum).collect();
    for (index, sums) in sums.iter().enumerate() {
        let first = index / chains * PANEL;
        for (i, sums) in sums.chunks_exact(PANEL).enumerate() {
            for (j, sum) in (first..cols).zip(sums) {
                c.data[if turned { j * c.stride + i } else { i * c.stride + j }] += scale * sum;
            }
        }
    }
}

simd! {
    /// (width, PANEL) of narrowᵀ·wide, from column `first` on, over the `CHAIN` rows from `start` on.
    fn transposed<'a>[simd](narrow: View<'a>, wide: View<'a>, first: usize, start: usize) -> Vec<f32> {
        let count = PANEL.min(wide.cols - first);
        let (mut sums, mut padded) = (vec![0.0; narrow.cols * PANEL], Vec::new());
        let end = wide.rows.min(start + CHAIN);
        for row in (start..end).step_by(ROWS) {
            let rows = ROWS.min(end - row);
            let mut right = (&wide.data[row * wide.row_stride + first..], wide.row_stride);
            if count < PANEL {
                // The last vector would reach past the matrix.
                padded.clear();
                padded.resize(rows * PANEL, 0.0);
                let from = right.0.chunks(right.1);
                padded.chunks_exact_mut(PANEL).zip(from).for_each(|(to, from)| to[..count].copy_from_slice(&from[..count]));
                right = (&padded, PANEL);
            }
            let left = (&narrow.data[row * narrow.row_stride..], narrow.row_stride);
            // SAFETY: `sums` holds as many rows as `narrow` has columns.
            unsafe { tiles::<_, true>(simd, (sums.as_mut_ptr(), PANEL), left, right, (narrow.cols, PANEL), rows, true) };
        }
        sums
    }
}

fn run_tasks(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if work < SMALL || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Halves;

    /// Widened or not, in whatever steps: every number is the same chain, bit for bit.
    #[test]
    fn sixteen_bits_give_the_bits_of_thirty_two() {
        for (rows, k, n) in [(1, 700, 49), (8, 130, 97), (9, 1000, 48), (130, 97, 131), (600, 531, 50)] {
            let numbers = |n: usize, salt: u32| -> Vec<f32> {
                let bits = |i: usize| (i as u32).wrapping_mul(2_654_435_761).wrapping_add(salt) >> 8;
                (0..n).map(|i| half::bf16::from_f32(bits(i) as f32 / 8_388_608.0 - 1.0).to_f32()).collect()
            };
            let w = numbers(n * k, 3);
            let halves = Halves::packed(&w, (k, n));
            let forward = Packed::new(&w, (k, n), (1, k));
            let backward = forward.transposed();
            let operands = [(Right::Halves(&halves), &forward, k, n), (Right::Turned(&halves), &backward, n, k)];
            for (right, whole, inner, cols) in operands {
                let a = numbers(rows * inner, 5);
                for accumulate in [false, true] {
                    let run = |right: Right| {
                        let mut c = vec![0.25; rows * cols];
                        let view = View::new(&a, rows, inner, inner);
                        product(ViewMut::new(&mut c, rows, cols, cols), view, right, accumulate);
                        c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    };
                    assert!(run(right) == run(whole.into()), "{rows} x {inner} x {cols}, {accumulate}");
                }
            }
        }
    }

    /// Past the end of a block, of a chain, of a panel and of a vector.
    #[test]
    fn a_product_over_rows_is_the_plain_one() {
        let numbers =
            |n: usize, salt: usize| -> Vec<f32> { (0..n).map(|i| ((i * 37 + salt) % 19) as f32 - 9.0).collect() };
        for (rows, width, cols) in [(1, 1, 1), (130, 7, 49), (512, 16, 48), (1100, 19, 131)] {
            let (narrow, wide) = (numbers(rows * (width + 2), 1), numbers(rows * (cols + 3), 5));
            let narrow_view = View::new(&narrow, rows, width, width + 2);
            let wide_view = View::new(&wide, rows, cols, cols + 3);
            for turned in [false, true] {
                let (down, across) = if turned { (cols, width) } else { (width, cols) };
                let mut c = vec![1.0; down * across];
                add_transposed(ViewMut::new(&mut c, down, across, across), narrow_view, wide_view, 0.5, turned);
                for (i, j) in (0..width).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                    let terms = (0..rows).map(|t| narrow[t * (width + 2) + i] * wide[t * (cols + 3) + j]);
                    // Small whole numbers: f32 sums are exact.
                    let expected = 1.0 + 0.5 * terms.sum::<f32>();
                    assert_eq!(
                        c[if turned { j * width + i } else { i * cols + j }],
                        expected,
                        "({i}, {j}) of {width} x {cols}"
                    );
                }
            }
        }
    }
}
