//! Token embedding in a plain loop.

/// Overwrites `x` (T, C) with rows of `table` (V, C).
pub fn forward(x: &mut [f32], tokens: &[u32], table: &[f32]) {
    let cols = x.len() / tokens.len();
    for t in 0..tokens.len() {
        for c in 0..cols {
            x[t * cols + c] = table[tokens[t] as usize * cols + c];
        }
    }
}
