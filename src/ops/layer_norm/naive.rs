//! LayerNorm in plain loops.

/// Overwrites `y` (T, C), `mean` (T) and `rstd` (T).
pub fn forward(
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) {
    let cols = w.len();
    for t in 0..rstd.len() {
        let row = t * cols..(t + 1) * cols;
        let (y, x) = (&mut y[row.clone()], &x[row]);
        mean[t] = x.iter().sum::<f32>() / cols as f32;
        let variance = x.iter().map(|x| (x - mean[t]) * (x - mean[t])).sum::<f32>() / cols as f32;
        // As in RMSNorm.
        rstd[t] = if variance.is_finite() { 1.0 / (variance + eps).sqrt() } else { f32::NAN };
        for c in 0..cols {
            y[c] = (x[c] - mean[t]) * rstd[t] * w[c] + bias.map_or(0.0, |bias| bias[c]);
        }
    }
}

/// Adds to `dx`.
pub fn backward(dx: &mut [f32], dy: &[f32], x: &[f32], mean: &[f32], rstd: &[f32], w: &[f32]) {
    let cols = w.len();
    for t in 0..rstd.len() {
        let row = t * cols..(t + 1) * cols;
        let (dx, dy, x) = (&mut dx[row.clone()], &dy[row.clone()], &x[row]);
        let normed = |c: usize| (x[c] - mean[t]) * rstd[t];
        let mean_dy = (0..cols).map(|c| w[c] * dy[c]).sum::<f32>() / cols as f32;
        let mean_dyx = (0..cols).map(|c| w[c] * dy[c] * normed(c)).sum::<f32>() / cols as f32;
        for c in 0..cols {
            dx[c] += rstd[t] * (w[c] * dy[c] - mean_dy - normed(c) * mean_dyx);
        }
    }
}
