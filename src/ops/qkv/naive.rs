//! Query, key and value in plain loops.

use super::QkvSpec;
use crate::ops::lora::naive::{self as linear, Weights};
use crate::ops::norm::naive as norm;

/// What follows the product.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub qk_norm: Option<(&'a [f32], &'a [f32])>, // (e) each, wide (h·e), (k·e): q's gain, k's gain
    pub positions: &'a [u32],                    // (T)
    pub freq: &'a [f32],                         // (e/2) angle per position of each pair
    pub spec: QkvSpec,
}

/// Overwrites `qkv` (T, (h+2k)·e), `xa` (T, 3r) and, with a q/k norm, `raw` (T, (h+k)·e).
pub fn forward(
    qkv: &mut [f32],
    xa: &mut [f32],
    raw: &mut [f32],
    x: &[f32],
    weights: Weights,
    Rotation { qk_norm, positions, freq, spec }: Rotation,
) {
    let (e, width) = (spec.head_dim, spec.width());
    linear::forward(qkv, xa, x, weights, None);
    for t in 0..positions.len() {
        let row = &mut qkv[t * width..][..spec.rotated()];
        if let Some((q, k)) = qk_norm {
            let raw = &mut raw[t * spec.rotated()..][..spec.rotated()];
            raw.copy_from_slice(row);
            for (columns, of_q) in spec.spans() {
                let gain = if of_q { q } else { k };
                norm::forward(&mut row[columns.clone()], &mut [0.0], &raw[columns], gain, None, spec.norm);
            }
        }
        row.chunks_exact_mut(e).for_each(|head| rotate(head, positions[t] as f32, freq));
    }
}

/// Turns `dqkv` into the product's gradient; overwrites `dx` (T, C) and `dxa` (T, 3r); adds to `da` and `db`.
pub fn backward(
    dx: &mut [f32],
    (da, db): (&mut [f32], &mut [f32]),
    dqkv: &mut [f32],
    dxa: &mut [f32],
    x: &[f32],
    xa: &[f32],
    raw: &[f32],
    weights: Weights,
    Rotation { qk_norm, positions, freq, spec }: Rotation,
) {
    let (e, width) = (spec.head_dim, spec.width());
    for t in 0..positions.len() {
        let row = &mut dqkv[t * width..][..spec.rotated()];
        // A rotation's transpose turns back.
        row.chunks_exact_mut(e).for_each(|head| rotate(head, -(positions[t] as f32), freq));
        let Some((q, k)) = qk_norm else { continue };
        for (columns, of_q) in spec.spans() {
            let (gain, raw) = (if of_q { q } else { k }, &raw[t * spec.rotated()..][columns.clone()]);
            let (dy, mut y, mut rstd) = (row[columns.clone()].to_vec(), vec![0.0; columns.len()], [0.0]);
            norm::forward(&mut y, &mut rstd, raw, gain, None, spec.norm);
            row[columns.clone()].fill(0.0);
            norm::backward(&mut row[columns], &dy, raw, &rstd, gain, spec.norm);
        }
    }
    linear::backward(dx, (da, db), dxa, dqkv, x, xa, weights);
}

fn rotate(head: &mut [f32], position: f32, freq: &[f32]) {
    let half = freq.len();
    for i in 0..half {
        let (sin, cos) = (position * freq[i]).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}
