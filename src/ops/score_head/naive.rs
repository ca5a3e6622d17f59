//! The score head in plain loops.

use crate::ops::product::naive as product;

/// Overwrites `r` (S, labels); `cols` is C.
pub fn forward(r: &mut [f32], h: &[f32], w: &[f32], cols: usize) {
    product::forward(r, h, w, cols);
}

/// Overwrites `dh` (S, C); adds to `dw` (labels, C).
pub fn backward(dh: &mut [f32], dw: &mut [f32], dr: &[f32], h: &[f32], w: &[f32], cols: usize) {
    product::backward(dh, dr, w, cols);
    let labels = w.len() / cols;
    for s in 0..h.len() / cols {
        for label in 0..labels {
            for c in 0..cols {
                dw[label * cols + c] += dr[s * labels + label] * h[s * cols + c];
            }
        }
    }
}
