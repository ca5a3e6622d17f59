//! AdamW against the same formula in f64, one number at a time.

use ares::backend::{Cpu, Tensor};
use ares::ops::{AdamW, AdamWSpec, Parameter};

use super::common::*;

const SPEC: AdamWSpec = AdamWSpec { lr: 3e-2, beta1: 0.9, beta2: 0.99, eps: 1e-6, decay: 0.1, clip: 1.5, step: 0 };
const FACTOR: f32 = 0.3;

/// Master, first and second moment, gradient, operand.
struct Trained {
    master: Tensor<Cpu>,
    m: Tensor<Cpu>,
    v: Tensor<Cpu>,
    grad: Tensor<Cpu>,
    operand: Tensor<Cpu>,
}

impl Trained {
    fn new(seed: u64, cols: usize, rows: usize) -> Trained {
        let zeros = || parameter(cols, &vec![0.0; rows * cols]);
        let master = parameter(cols, &noise(seed, rows * cols));
        let operand = parameter(cols, &vec![f32::NAN; rows * cols]);
        Trained { master, m: zeros(), v: zeros(), grad: zeros(), operand }
    }

    fn parameter(&mut self) -> Parameter<'_, Cpu> {
        let Trained { master, m, v, grad, operand } = self;
        Parameter { master, m, v, grad, operand: Some((operand, FACTOR)) }
    }

    fn state(&self) -> Vec<u32> {
        [&self.master, &self.m, &self.v, &self.operand].iter().flat_map(|t| bits(&t.buffer)).collect()
    }
}

/// One update of all parameters; returns the norm that the op reports.
fn update(parameters: &mut [Trained], spec: AdamWSpec) -> f32 {
    let mut norm = nans(1, 1);
    let mut parameters: Vec<_> = parameters.iter_mut().map(Trained::parameter).collect();
    Cpu::new().adamw(&mut norm, &mut parameters, spec).unwrap();
    values(&norm)[0]
}

#[test]
fn adamw_is_its_formula() {
    let mut parameters = [Trained::new(1, 7, 5), Trained::new(2, 3, 4)];
    // (θ, m, v) of every number
    let mut expected: Vec<[f64; 3]> =
        parameters.iter().flat_map(|p| &p.master.buffer).map(|value| [f64::from(*value), 0.0, 0.0]).collect();
    for step in 1..=4u32 {
        // Large gradients are clipped, small ones are not.
        let size = if step % 2 == 0 { 0.05 } else { 2.0 };
        for (i, p) in parameters.iter_mut().enumerate() {
            let grad = noise(100 * u64::from(step) + i as u64, p.grad.buffer.len());
            p.grad.buffer.iter_mut().zip(grad).for_each(|(to, g)| *to = size * g);
        }
        let grads: Vec<f64> = parameters.iter().flat_map(|p| &p.grad.buffer).map(|g| f64::from(*g)).collect();
        let norm = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_eq!(norm > f64::from(SPEC.clip), step % 2 == 1, "both sides of the clip are tried");

        let found = update(&mut parameters, AdamWSpec { step, ..SPEC });
        assert_close("norm before clipping", &[found], &[norm], 1e-6 * norm);
        formula(&mut expected, &grads, (f64::from(SPEC.clip) / norm).min(1.0), step);
        let found: Vec<f32> = parameters.iter().flat_map(|p| p.master.buffer.clone()).collect();
        assert_close(
            &format!("master at step {step}"),
            &found,
            &expected.iter().map(|e| e[0]).collect::<Vec<_>>(),
            1e-6,
        );
        let found: Vec<f32> = parameters.iter().flat_map(|p| p.operand.buffer.clone()).collect();
        let operand: Vec<f64> = expected.iter().map(|e| e[0] * f64::from(FACTOR)).collect();
        assert_close(&format!("operand at step {step}"), &found, &operand, 1e-6);
    }
}

fn formula(state: &mut [[f64; 3]], grads: &[f64], clip: f64, step: u32) {
    let [lr, beta1, beta2, eps, decay] = [SPEC.lr, SPEC.beta1, SPEC.beta2, SPEC.eps, SPEC.decay].map(f64::from);
    for ([value, m, v], g) in state.iter_mut().zip(grads) {
        let g = g * clip;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        let (m, v) = (*m / (1.0 - beta1.powi(step as i32)), *v / (1.0 - beta2.powi(step as i32)));
        *value -= lr * (m / (v.sqrt() + eps) + decay * *value);
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let mut parameters = [Trained::new(1, 7, 5), Trained::new(2, 3, 4)];
        parameters.iter_mut().for_each(|p| p.grad.buffer.fill(0.5));
        update(&mut parameters, AdamWSpec { step: 1, ..SPEC });
        let before: Vec<_> = parameters.iter().map(Trained::state).collect();
        parameters[1].grad.buffer[4] = bad;
        parameters[1].grad.buffer[5] = bad;
        let norm = update(&mut parameters, AdamWSpec { step: 2, ..SPEC });
        assert!(!norm.is_finite(), "the norm tells: found {norm} for {bad}");
        let after: Vec<_> = parameters.iter().map(Trained::state).collect();
        assert_eq!(after, before, "a gradient of {bad}");
    }
}
