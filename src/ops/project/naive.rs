//! Projection back into the residual stream in plain loops.

use crate::ops::lora::naive::{self as lora, Adapter};

/// Overwrites `y` (T, N) and, with an adapter, `xa` (T, P·r); `k` is K.
pub fn forward(
    y: &mut [f32],
    xa: &mut [f32],
    x: &[f32],
    residual: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    adapter: Option<Adapter>,
    k: usize,
) {
    lora::forward(y, xa, x, w, adapter, k);
    let n = w.len() / k;
    for i in 0..y.len() {
        y[i] += residual[i] + bias.map_or(0.0, |bias| bias[i % n]);
    }
}

/// The product's own; the residual's gradient is dy itself.
pub use lora::backward;
