//! RMSNorm in plain loops.

use super::NormSpec;

/// Overwrites `y` (T, C) and `rstd` (T).
pub fn forward(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], residual: Option<&[f32]>, spec: NormSpec) {
    let cols = w.len();
    for t in 0..rstd.len() {
        let row = t * cols..(t + 1) * cols;
        let (y, x) = (&mut y[row.clone()], &x[row]);
        let mean_square = x.iter().map(|x| x * x).sum::<f32>() / cols as f32;
        // An overflow is seen: as 1 / infinity it would be a row of zeros.
        rstd[t] = if mean_square.is_finite() { 1.0 / (mean_square + spec.eps).sqrt() } else { f32::NAN };
        for c in 0..cols {
            y[c] = gain(w[c], spec) * x[c] * rstd[t] + residual.map_or(0.0, |r| r[t * cols + c]);
        }
    }
}

/// Adds to `dx`.
pub fn backward(dx: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32], w: &[f32], spec: NormSpec) {
    let cols = w.len();
    for t in 0..rstd.len() {
        let row = t * cols..(t + 1) * cols;
        let (dx, dy, x) = (&mut dx[row.clone()], &dy[row.clone()], &x[row]);
        let mean = (0..cols).map(|c| gain(w[c], spec) * dy[c] * x[c]).sum::<f32>() / cols as f32;
        for c in 0..cols {
            dx[c] += rstd[t] * (gain(w[c], spec) * dy[c] - x[c] * rstd[t] * rstd[t] * mean);
        }
    }
}

fn gain(w: f32, spec: NormSpec) -> f32 {
    if spec.unit_offset { 1.0 + w } else { w }
}
