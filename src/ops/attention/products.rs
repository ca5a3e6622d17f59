//! The products of attention: small ones, in whole vectors.

use crate::ops::product::{Rows, simd, tiles};

/// Numbers of the widest vector step; strides are multiples of it.
pub(crate) const LANES: usize = 16;

simd! {
    /// out (rows, cols) = left (rows, depth)·right (depth, cols), or += with `add`; whole vectors of columns. Each number is one chain
    /// over the depth: a row's bits do not depend on the others.
    pub(crate) fn multiply<'a>[simd](out: (&'a mut [f32], usize), left: Rows<'a>, right: Rows<'a>, shape: (usize, usize), depth: usize, add: bool) {
        let ((out, stride), (rows, cols)) = (out, shape);
        check(out, stride, shape);
        // SAFETY: `check`.
        unsafe { tiles::<_, false>(simd, (out.as_mut_ptr(), stride), left, right, (rows, cols), depth, add) };
    }
}

simd! {
    /// out (rows, cols) += leftᵀ·right where left is (depth, rows); else as `multiply`.
    pub(crate) fn multiply_transposed<'a>[simd](out: (&'a mut [f32], usize), left: Rows<'a>, right: Rows<'a>, shape: (usize, usize), depth: usize) {
        let ((out, stride), (rows, cols)) = (out, shape);
        check(out, stride, shape);
        // SAFETY: `check`.
        unsafe { tiles::<_, true>(simd, (out.as_mut_ptr(), stride), left, right, (rows, cols), depth, true) };
    }
}

/// All rows lie inside `out`, in whole vectors of any width: what `tiles` is promised.
fn check(out: &[f32], stride: usize, (rows, cols): (usize, usize)) {
    assert!(rows > 0 && cols.is_multiple_of(LANES) && cols <= stride && (rows - 1) * stride + cols <= out.len());
}
