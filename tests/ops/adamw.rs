//! AdamW: both sides of the clip, several parameters, one of more than one block and one without an operand.

use ares::backend::{Backend, Cpu, Tensor};
use ares::ops::adamw::naive;
use ares::ops::{AdamWSpec, Ops, Parameter};

use crate::toolkit::{self, *};

const SHAPES: [(usize, usize); 3] = [(5, 12), (40, 210), (1, 3)];
const FACTOR: f32 = 0.5;

#[derive(Clone)]
struct Case {
    spec: AdamWSpec,
    theta: Vec<Vec<f32>>,
    /// By step and parameter.
    grads: Vec<Vec<Vec<f32>>>,
}

impl Case {
    /// Gradients that are large and small in turn.
    fn new(clip: f32) -> Case {
        let values = |seed, scale| -> Vec<_> {
            (seed..).zip(SHAPES).map(|(seed, (rows, cols))| random(seed, rows * cols, scale)).collect()
        };
        let spec = AdamWSpec { lr: 0.05, beta1: 0.9, beta2: 0.99, eps: 1e-6, decay: 0.1, clip, step: 0 };
        let grads =
            [2.0, 0.05, 2.0, 0.05].iter().zip((10..).step_by(10)).map(|(scale, seed)| values(seed, *scale)).collect();
        Case { spec, theta: values(1, 1.0), grads }
    }

    fn spec(&self, step: usize) -> AdamWSpec {
        AdamWSpec { step: step as u32 + 1, ..self.spec }
    }
}

/// Without spare rows: the optimiser owns its tensors whole.
fn owned<B: Backend>(ops: &B, values: &[Vec<f32>]) -> Vec<Tensor<B, f32>> {
    SHAPES.iter().zip(values).map(|((rows, cols), v)| Tensor::from_host(ops, *rows, *cols, v).unwrap()).collect()
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let zeros: Vec<Vec<f32>> = self.theta.iter().map(|theta| vec![0.0; theta.len()]).collect();
        let (mut theta, mut m, mut v, mut norms) = (self.theta.clone(), zeros.clone(), zeros, Vec::new());
        for (step, grads) in self.grads.iter().enumerate() {
            norms.push(naive::norm(&grads.iter().map(|grad| &grad[..]).collect::<Vec<_>>()));
            for (i, grad) in grads.iter().enumerate() {
                naive::update(&mut theta[i], &mut m[i], &mut v[i], grad, norms[step], self.spec(step));
            }
        }
        let operand = theta[..2].iter().flatten().map(|theta| theta * FACTOR).collect();
        let [theta, m, v] = [theta, m, v].map(|values| values.concat());
        Plain::from([("norm", norms), ("theta", theta), ("m", m), ("v", v), ("operand", operand)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let zeros: Vec<Vec<f32>> = self.theta.iter().map(|theta| vec![0.0; theta.len()]).collect();
        let (mut theta, mut m, mut v) = (owned(ops, &self.theta), owned(ops, &zeros), owned(ops, &zeros));
        let mut operands = SHAPES.map(|(rows, cols)| act(ops, cols, &vec![f32::NAN; rows * cols]));
        let (mut norm, mut norms) = (Tensor::from_host(ops, 1, 1, &[f32::NAN]).unwrap(), Vec::new());
        for (step, grads) in self.grads.iter().enumerate() {
            let grads = owned(ops, grads);
            let tensors = theta.iter_mut().zip(&mut m).zip(&mut v).zip(&grads).zip(&mut operands).enumerate();
            let mut parameters: Vec<Parameter<'_, B>> = tensors
                .map(|(i, ((((master, m), v), grad), operand))| Parameter {
                    master,
                    m,
                    v,
                    grad,
                    operand: (i < 2).then_some((operand, FACTOR)),
                })
                .collect();
            ops.adamw(&mut norm, &mut parameters, self.spec(step)).unwrap();
            norms.extend(norm.read(ops).unwrap());
        }
        let all =
            |tensors: &[Tensor<B, f32>]| -> Vec<f32> { tensors.iter().flat_map(|t| t.read(ops).unwrap()).collect() };
        let [first, second, unasked] = operands.map(|operand| read(ops, operand));
        assert!(unasked.iter().all(|v| v.is_nan()), "an operand that was not asked for");
        let mut again = unwritten(ops, 40, 210);
        ops.write_operand(&mut again, &theta[1], FACTOR).unwrap();
        assert_eq!(bits(&read(ops, again)), bits(&second), "write_operand = what adamw left");
        let mut out = Outputs::default();
        for (name, values) in [("norm", norms), ("theta", all(&theta)), ("m", all(&m)), ("v", all(&v))] {
            out.f32(ops, name, numbers(ops, 1, &values), 2e-5, 1e-6);
        }
        out.act(ops, "operand", act(ops, 1, &[first, second].concat()), 1.0, 1e-6);
        out
    }
}

const CLIPS: [f32; 3] = [0.5, 20.0, 1e9];

#[test]
fn naive() {
    CLIPS.into_iter().for_each(|clip| assert_naive("adamw", &Case::new(clip), 1e-5, 0.0));
    let norms = &toolkit::Case::naive(&Case::new(CLIPS[1]))["norm"];
    assert!(norms.iter().enumerate().all(|(i, norm)| (*norm > CLIPS[1]) == (i % 2 == 0)), "both sides of the clip");
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    CLIPS.into_iter().for_each(|clip| assert_parity("adamw", &device, &Case::new(clip)));
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let (mut before, mut after) = (Case::new(1.0), Case::new(1.0));
    before.grads.truncate(1);
    after.grads.truncate(2);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        after.grads[1][1][8399] = bad;
        after.grads[1][1][8398] = bad;
        unchanged(&Cpu::new(), &before, &after);
        device().iter().for_each(|device| unchanged(device, &before, &after));
    }
}

fn unchanged<B: Ops>(ops: &B, before: &Case, after: &Case) {
    let [before, after] = [before, after].map(|case| toolkit::Case::run(case, ops));
    assert!(!after.named("norm")[1].is_finite(), "the norm says so: {:?}", after.named("norm"));
    for name in ["theta", "m", "v", "operand"] {
        assert_eq!(bits(after.named(name)), bits(before.named(name)), "{name}");
    }
}
