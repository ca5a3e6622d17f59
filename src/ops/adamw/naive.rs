//! AdamW in plain loops.

use super::AdamWSpec;

/// ‖g‖ over the gradients of all parameters.
pub fn norm(grads: &[&[f32]]) -> f32 {
    let square = grads.iter().flat_map(|grad| grad.iter()).map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
    square.sqrt() as f32
}

/// Updates one parameter and its moments; `norm` is that of all gradients.
pub fn update(theta: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], norm: f32, spec: AdamWSpec) {
    let AdamWSpec { lr, beta1, beta2, eps, decay, clip, step } = spec;
    if !norm.is_finite() {
        return;
    }
    for i in 0..theta.len() {
        let g = grad[i] * (clip / norm).min(1.0);
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powi(step as i32));
        let v_hat = v[i] / (1.0 - beta2.powi(step as i32));
        theta[i] -= lr * (m_hat / (v_hat.sqrt() + eps) + decay * theta[i]);
    }
}
