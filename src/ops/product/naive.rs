//! Products in plain loops: y (T, N) = x (T, K)·Wᵀ, and dx = dy·W.

/// Overwrites `y`; `k` is K.
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], k: usize) {
    let n = w.len() / k;
    for t in 0..x.len() / k {
        for j in 0..n {
            y[t * n + j] = dot(&x[t * k..][..k], &w[j * k..][..k]);
        }
    }
}

/// Overwrites `dx`.
pub fn backward(dx: &mut [f32], dy: &[f32], w: &[f32], k: usize) {
    let n = w.len() / k;
    for t in 0..dy.len() / n {
        for i in 0..k {
            dx[t * k + i] = (0..n).map(|j| dy[t * n + j] * w[j * k + i]).sum();
        }
    }
}

/// Σ a·b
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
