//! The right operand of the CPU's products.

use rayon::prelude::*;

/// Columns of a panel: three vectors of sixteen numbers, six of eight, twelve of four.
pub(crate) const PANEL: usize = 48;
/// Below this many numbers packing is not worth handing to other threads.
const SMALL: usize = 1 << 16;

/// A matrix (K, N) in panels of `PANEL` columns. A panel holds its K rows one after the other, `PANEL` numbers each, zeros past
/// the last column, so that a product reads it from front to back in whole vectors.
pub(crate) struct Packed {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Packed {
    /// Element (k, n) is `values[k * row_stride + n * col_stride]`.
    pub(crate) fn new(
        values: &[f32],
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Packed {
        Packed::filled(rows, cols, |panel, wide, to| {
            for (k, to) in to.chunks_exact_mut(PANEL).enumerate() {
                let from = &values[k * row_stride + panel * PANEL * col_stride..];
                if col_stride == 1 {
                    to[..wide].copy_from_slice(&from[..wide]);
                } else {
                    to.iter_mut().zip(from.iter().step_by(col_stride)).take(wide).for_each(|(to, from)| *to = *from);
                }
            }
        })
    }

    /// (N, K) of this (K, N).
    pub(crate) fn transposed(&self) -> Packed {
        Packed::filled(self.cols, self.rows, |panel, wide, to| {
            for (n, to) in to.chunks_exact_mut(PANEL).enumerate() {
                let from = self.panel(n / PANEL)[panel * PANEL * PANEL + n % PANEL..].iter().step_by(PANEL);
                to.iter_mut().zip(from).take(wide).for_each(|(to, from)| *to = *from);
            }
        })
    }

    /// Every panel as `fill` writes it, which is given its index, how many of its columns the matrix has, and zeros.
    fn filled(rows: usize, cols: usize, fill: impl Fn(usize, usize, &mut [f32]) + Sync) -> Packed {
        let mut values = vec![0.0; rows * cols.next_multiple_of(PANEL)];
        let small = values.len() < SMALL;
        let fill = |(panel, to): (usize, &mut [f32])| fill(panel, PANEL.min(cols - panel * PANEL), to);
        let panel = (rows * PANEL).max(1);
        if small {
            values.chunks_exact_mut(panel).enumerate().for_each(fill);
        } else {
            values.par_chunks_exact_mut(panel).enumerate().for_each(fill);
        }
        Packed { rows, cols, values }
    }

    /// (K, N).
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The K × `PANEL` numbers of a panel.
    pub(crate) fn panel(&self, index: usize) -> &[f32] {
        &self.values[index * self.rows * PANEL..][..self.rows * PANEL]
    }

    /// Overwrites `out` (N) with row k.
    pub(crate) fn read_row(&self, k: usize, out: &mut [f32]) {
        for (panel, out) in out.chunks_mut(PANEL).enumerate() {
            out.copy_from_slice(&self.panel(panel)[k * PANEL..][..out.len()]);
        }
    }

    /// Overwrites `out` (K) with column n.
    pub(crate) fn read_column(&self, n: usize, out: &mut [f32]) {
        let column = self.panel(n / PANEL)[n % PANEL..].iter().step_by(PANEL);
        out.iter_mut().zip(column).for_each(|(out, value)| *out = *value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_where_the_strides_say() {
        for (rows, cols) in [(1, 1), (3, 48), (5, 49), (50, 7), (97, 130), (700, 131)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let straight = Packed::new(&values, (rows, cols), (cols, 1));
            let turned = Packed::new(&values, (cols, rows), (1, cols));
            for packed in [&straight, &turned.transposed()] {
                assert_eq!(packed.shape(), (rows, cols));
                let mut row = vec![f32::NAN; cols];
                for k in 0..rows {
                    packed.read_row(k, &mut row);
                    assert_eq!(row, values[k * cols..][..cols], "row {k} of {rows} x {cols}");
                }
                let mut column = vec![f32::NAN; rows];
                for n in 0..cols {
                    packed.read_column(n, &mut column);
                    let expected: Vec<f32> = (0..rows).map(|k| values[k * cols + n]).collect();
                    assert_eq!(column, expected, "column {n} of {rows} x {cols}");
                }
                let (last, wide) = (cols.div_ceil(PANEL) - 1, (cols - 1) % PANEL + 1);
                let beyond = packed.panel(last).chunks_exact(PANEL).flat_map(|row| &row[wide..]);
                assert!(beyond.into_iter().all(|&v| v == 0.0));
            }
        }
    }
}
