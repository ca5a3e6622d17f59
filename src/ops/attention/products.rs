//! The products of attention on a few query rows at once: each vector that is read serves all of them, and several running sums
//! hide the latency of an addition.

use std::ops::Range;

use pulp::Simd;

use crate::ops::product::add_up;

/// Rows of a tile of the packed forward and backward.
pub(crate) const ROWS: usize = 4;
/// Numbers of the widest vector step; strides are multiples of it.
pub(crate) const LANES: usize = 16;

/// out[r][j] = Σ_i f[r][i]·m[i][j] for i of `inner` and whole vectors of columns j that cover `cols`. out and f have R rows, as
/// long as their slices allow; m has rows of `stride`. Each number is one chain over i: a row's bits do not depend on the others.
#[inline(always)]
pub(crate) fn multiply<S: Simd, const R: usize>(
    simd: S,
    out: &mut [f32],
    f: &[f32],
    (m, stride): (&[f32], usize),
    inner: &Range<usize>,
    cols: &Range<usize>,
) {
    let (lanes, to, from) = (S::F32_LANES, out.len() / R, f.len() / R);
    let (left, depth) = ((&f[inner.start..], from), inner.len());
    let mut j = cols.start / LANES * LANES;
    while j < cols.end {
        let vectors = (cols.end - j).div_ceil(lanes).min(3);
        let right = (&m[inner.start * stride + j..], stride);
        let out = (out[j..(R - 1) * to + j + vectors * lanes].as_mut_ptr(), to);
        // SAFETY: the slice just taken reaches from the first row's first vector to the last row's last.
        unsafe {
            match vectors {
                1 => add_up::<S, R, 1>(simd, out, left, right, depth, false),
                2 => add_up::<S, R, 2>(simd, out, left, right, depth, false),
                _ => add_up::<S, R, 3>(simd, out, left, right, depth, false),
            }
        }
        j += vectors * lanes;
    }
}

/// dm[j][c] += Σ_r p[r][j]·x[r][c] for the j of `range`. dm (_, width), p (ROWS, stride), x (ROWS, width). Slow on a processor
/// without fused multiplication.
#[inline(always)]
pub(crate) fn add_transposed(dm: &mut [f32], p: &[f32], x: &[f32], range: &Range<usize>) {
    let (width, stride) = (x.len() / ROWS, p.len() / ROWS);
    for c in (0..width).step_by(LANES) {
        // Copies, so that the compiler need not fear that what is written is also what is read.
        let mut rows = [[0.0; LANES]; ROWS];
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
