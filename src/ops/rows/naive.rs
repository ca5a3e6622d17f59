//! Rows by index in plain loops.

/// Overwrites `y` (R, C) with the rows of `x` (T, C) that `rows` (R) names.
pub fn gather(y: &mut [f32], x: &[f32], rows: &[u32]) {
    let cols = y.len() / rows.len();
    for i in 0..rows.len() {
        for c in 0..cols {
            y[i * cols + c] = x[rows[i] as usize * cols + c];
        }
    }
}

/// Overwrites `dx` (T, C): gather's gradient.
pub fn scatter(dx: &mut [f32], dy: &[f32], rows: &[u32]) {
    let cols = dy.len() / rows.len();
    dx.fill(0.0);
    for i in 0..rows.len() {
        for c in 0..cols {
            dx[rows[i] as usize * cols + c] += dy[i * cols + c];
        }
    }
}

/// Multiplies row i of `y` (R, C) by `weights[i]`.
pub fn scale_rows(y: &mut [f32], weights: &[f32]) {
    let cols = y.len() / weights.len();
    for i in 0..weights.len() {
        for c in 0..cols {
            y[i * cols + c] *= weights[i];
        }
    }
}
