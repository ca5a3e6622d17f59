//! The three products of attention on a tile of four rows: each vector that is read serves four multiplications.
//!
//! Every result is one chain of fused multiplications and additions in a fixed order, so a row's bits do not depend on the
//! rows beside it. Compiled for the widest vectors by `simd`; on a processor without fused multiplication they are slow.

use std::ops::Range;

/// Rows of a tile.
pub(crate) const ROWS: usize = 4;
/// Numbers of one vector step; strides are multiples of it, zeros behind.
pub(crate) const LANES: usize = 16;

type Sums = [[f32; LANES]; ROWS];

#[inline(always)]
fn add(sums: &mut Sums, factor: impl Fn(usize) -> f32, vector: &[f32]) {
    let vector = &vector[..LANES];
    for (r, sums) in sums.iter_mut().enumerate() {
        let factor = factor(r);
        for (sum, value) in sums.iter_mut().zip(vector) {
            *sum = factor.mul_add(*value, *sum);
        }
    }
}

/// s[r][j] = scale·Σ_c x[r][c]·m[c][j] for all j of `range` (and those that share a vector with them).
/// s (ROWS, stride), x (ROWS, width), m (c below `channels`, stride).
#[inline(always)]
pub(crate) fn scores(s: &mut [f32], x: &[f32], m: &[f32], channels: usize, range: &Range<usize>, scale: f32) {
    let (stride, width) = (s.len() / ROWS, x.len() / ROWS);
    for j in (range.start / LANES * LANES..range.end).step_by(LANES) {
        let mut sums: Sums = [[0.0; LANES]; ROWS];
        for c in 0..channels {
            add(&mut sums, |r| x[r * width + c], &m[c * stride + j..]);
        }
        for (r, sums) in sums.iter().enumerate() {
            let to = &mut s[r * stride + j..][..LANES];
            to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * scale);
        }
    }
}

/// y[r][c] = Σ_j p[r][j]·m[j][c] over the j of `range`. y (ROWS, width), p (ROWS, stride), m (_, width).
#[inline(always)]
pub(crate) fn mix(y: &mut [f32], p: &[f32], m: &[f32], range: &Range<usize>) {
    let (width, stride) = (y.len() / ROWS, p.len() / ROWS);
    for c in (0..width).step_by(LANES) {
        let mut sums: Sums = [[0.0; LANES]; ROWS];
        for j in range.clone() {
            add(&mut sums, |r| p[r * stride + j], &m[j * width + c..]);
        }
        for (r, sums) in sums.iter().enumerate() {
            y[r * width + c..][..LANES].copy_from_slice(sums);
        }
    }
}

/// dm[j][c] += Σ_r p[r][j]·x[r][c] for the j of `range`. dm (_, width), p (ROWS, stride), x (ROWS, width).
#[inline(always)]
pub(crate) fn spread(dm: &mut [f32], p: &[f32], x: &[f32], range: &Range<usize>) {
    let (width, stride) = (x.len() / ROWS, p.len() / ROWS);
    for c in (0..width).step_by(LANES) {
        // Copies, so that the compiler need not fear that what is written is also what is read.
        let mut rows: Sums = [[0.0; LANES]; ROWS];
        rows.iter_mut().enumerate().for_each(|(r, row)| row.copy_from_slice(&x[r * width + c..][..LANES]));
        for j in range.clone() {
            let to = &mut dm[j * width + c..][..LANES];
            let mut sums = [0.0; LANES];
            sums.copy_from_slice(to);
            for (r, row) in rows.iter().enumerate() {
                let factor = p[r * stride + j];
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum = factor.mul_add(*value, *sum));
            }
            to.copy_from_slice(&sums);
        }
    }
}
