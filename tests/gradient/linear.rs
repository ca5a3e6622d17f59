//! Products with LoRA: query, key and value; the projection back into the residual stream; gate and up.

use ares::backend::{Backend, Cpu, Tensor};
use ares::ops::{Activation, GateUp, GateUpSpec, LoraGrad, NormSpec, Project, Qkv, QkvSpec, QkvWeights, Rope};

use super::common::*;
use super::{added, assert_gradient, functional};

/// More rows than one block of the products holds.
const ROWS: usize = 67;
const INPUTS: usize = 11;
const RANK: usize = 3;

/// What a family has beside the product.
#[derive(Clone, Copy)]
struct Family {
    bias: bool,
    qk_norm: bool,
}

struct QkvCase {
    spec: QkvSpec,
    weights: QkvWeights<Cpu>,
    masters: Masters,
    rope: Rope<Cpu>,
    positions: Tensor<Cpu, u32>,
}

impl QkvCase {
    fn new(family: Family) -> QkvCase {
        let norm = NormSpec { eps: 1e-2, unit_offset: false };
        let spec = QkvSpec { heads: 4, kv_heads: 2, head_dim: 6, norm };
        let (width, e) = (spec.width(), spec.head_dim);
        let gain = |seed| tensor(e, &noise(seed, e).iter().map(|g| 1.0 + g / 2.0).collect::<Vec<_>>());
        let weights = QkvWeights {
            w: weight(width, &noise(10, width * INPUTS)),
            bias: family.bias.then(|| tensor(width, &noise(11, width))),
            qk_norm: family.qk_norm.then(|| (gain(12), gain(13))),
        };
        let parts = [spec.heads * e, spec.kv_heads * e, spec.kv_heads * e];
        let positions: Vec<u32> = (0..ROWS as u32).map(|t| (t * 5 + 2) % 31).collect();
        QkvCase {
            spec,
            weights,
            masters: Masters::noise(14, &parts, INPUTS, RANK),
            rope: Rope::new(&Cpu::new(), &[1.0, 0.3, 0.05], 31).unwrap(),
            positions: indices(&positions),
        }
    }

    /// q∣k∣v, xa and the q∣k before norm.
    fn forward(&self, x: &[f32], a: &[f32], b: &[f32]) -> [Tensor<Cpu>; 3] {
        let mut qkv = nans(ROWS, self.spec.width());
        let (mut xa, mut raw) = (nans(ROWS, self.masters.width()), nans(ROWS, self.raw_columns()));
        let lora = self.masters.lora_of(a, b);
        let (x, positions, rope) = (tensor(INPUTS, x), &self.positions, &self.rope);
        let cpu = Cpu::new();
        cpu.qkv_forward(&mut qkv, &mut xa, &mut raw, &x, &self.weights, Some(&lora), positions, rope, self.spec)
            .unwrap();
        [qkv, xa, raw]
    }

    fn raw_columns(&self) -> usize {
        if self.weights.qk_norm.is_some() { self.spec.rotated() } else { 0 }
    }

    fn backward(&self, c: &[f32], x: &[f32], grad: Option<&mut LoraGrad<Cpu>>) -> Vec<f32> {
        let [_, xa, raw] = self.forward(x, &self.masters.a, &self.masters.b);
        let (mut dx, mut dxa) = (nans(ROWS, INPUTS), nans(ROWS, self.masters.width()));
        let (mut dqkv, x, lora) = (tensor(self.spec.width(), c), tensor(INPUTS, x), self.masters.lora());
        let (weights, positions, rope) = (&self.weights, &self.positions, &self.rope);
        let cpu = Cpu::new();
        #[rustfmt::skip] // outputs, inputs, weights
        cpu.qkv_backward(
            &mut dx, grad, &mut dqkv, &mut dxa,
            &x, &xa, &raw,
            weights, Some(&lora), positions, rope, self.spec,
        ).unwrap();
        values(&dx)
    }
}

#[test]
fn qkv() {
    for family in [(false, false), (true, false), (false, true), (true, true)] {
        let family = Family { bias: family.0, qk_norm: family.1 };
        let case = QkvCase::new(family);
        let (x, c) = (noise(20, ROWS * INPUTS), noise(21, ROWS * case.spec.width()));
        let (a, b) = (&case.masters.a, &case.masters.b);
        let f = |x: &[f32], a: &[f32], b: &[f32]| functional(&c, &values(&case.forward(x, a, b)[0]));
        let mut grad = case.masters.grad(30);
        let dx = case.backward(&c, &x, Some(&mut grad));
        assert_gradient("qkv dx", &dx, &x, |x| f(x, a, b));
        assert_gradient("qkv dA", &added(&grad.da.buffer, 30), a, |a| f(&x, a, b));
        assert_gradient("qkv dB", &added(&grad.db.buffer, 31), b, |b| f(&x, a, b));
        assert_eq!(bits(&case.backward(&c, &x, None)), bits(&dx), "dx without adapter gradients");
    }
}

#[test]
fn project() {
    let (cpu, outputs) = (Cpu::new(), 13);
    let w = weight(outputs, &noise(40, outputs * INPUTS));
    let masters = Masters::noise(41, &[outputs], INPUTS, RANK);
    let (x, residual, c) = (noise(43, ROWS * INPUTS), noise(44, ROWS * outputs), noise(45, ROWS * outputs));
    let forward = |x: &[f32], residual: &[f32], a: &[f32], b: &[f32]| {
        let (mut y, mut xa) = (nans(ROWS, outputs), nans(ROWS, RANK));
        let (x, residual, lora) = (tensor(INPUTS, x), tensor(outputs, residual), masters.lora_of(a, b));
        cpu.project_forward(&mut y, &mut xa, &x, &residual, &w, None, Some(&lora)).unwrap();
        (values(&y), xa)
    };
    let (a, b) = (&masters.a, &masters.b);
    let (_, xa) = forward(&x, &residual, a, b);
    let (mut dx, mut dxa, mut grad) = (nans(ROWS, INPUTS), nans(ROWS, RANK), masters.grad(50));
    let (dy, lora) = (tensor(outputs, &c), masters.lora());
    cpu.project_backward(&mut dx, Some(&mut grad), &mut dxa, &dy, &tensor(INPUTS, &x), &xa, &w, Some(&lora)).unwrap();
    let f = |x: &[f32], r: &[f32], a: &[f32], b: &[f32]| functional(&c, &forward(x, r, a, b).0);
    assert_gradient("project dx", &values(&dx), &x, |x| f(x, &residual, a, b));
    assert_gradient("project dresidual", &c, &residual, |residual| f(&x, residual, a, b));
    assert_gradient("project dA", &added(&grad.da.buffer, 50), a, |a| f(&x, &residual, a, b));
    assert_gradient("project dB", &added(&grad.db.buffer, 51), b, |b| f(&x, &residual, a, b));
}

#[test]
fn project_without_adapter() {
    let (cpu, outputs) = (Cpu::new(), 13);
    let w = weight(outputs, &noise(60, outputs * INPUTS));
    let (x, residual, c) =
        (noise(61, ROWS * INPUTS), tensor(outputs, &noise(62, ROWS * outputs)), noise(63, ROWS * outputs));
    let none = || nans(ROWS, 0);
    let mut dx = nans(ROWS, INPUTS);
    let dy = tensor(outputs, &c);
    cpu.project_backward(&mut dx, None, &mut none(), &dy, &tensor(INPUTS, &x), &none(), &w, None).unwrap();
    assert_gradient("project dx", &values(&dx), &x, |x| {
        let mut y = nans(ROWS, outputs);
        cpu.project_forward(&mut y, &mut none(), &tensor(INPUTS, x), &residual, &w, None, None).unwrap();
        functional(&c, &values(&y))
    });
}

/// gate∣up or the gate alone, both ways.
struct GateUpCase {
    spec: GateUpSpec,
    w: <Cpu as Backend>::Weight,
    bias: Option<Tensor<Cpu>>,
    masters: Masters,
}

impl GateUpCase {
    /// One whole vector step and a rest.
    const FEATURES: usize = 19;

    fn new(spec: GateUpSpec, bias: bool) -> GateUpCase {
        let width = spec.width(Self::FEATURES);
        let parts = vec![Self::FEATURES; width / Self::FEATURES];
        GateUpCase {
            spec,
            w: weight(width, &noise(70, width * INPUTS)),
            bias: bias.then(|| tensor(width, &noise(75, width))),
            masters: Masters::noise(71, &parts, INPUTS, RANK),
        }
    }

    /// act, gate∣up and xa.
    fn forward(&self, x: &[f32], a: &[f32], b: &[f32]) -> [Tensor<Cpu>; 3] {
        let (mut act, mut both) = (nans(ROWS, Self::FEATURES), nans(ROWS, self.spec.width(Self::FEATURES)));
        let mut xa = nans(ROWS, self.masters.width());
        let (x, lora, bias) = (tensor(INPUTS, x), self.masters.lora_of(a, b), self.bias.as_ref());
        Cpu::new().gate_up_forward(&mut act, &mut both, &mut xa, &x, &self.w, bias, Some(&lora), self.spec).unwrap();
        [act, both, xa]
    }

    fn check(&self) {
        let (cpu, what) = (Cpu::new(), format!("{:?}, bias {}", self.spec, self.bias.is_some()));
        let (x, c) = (noise(73, ROWS * INPUTS), noise(74, ROWS * Self::FEATURES));
        let (a, b) = (&self.masters.a, &self.masters.b);
        let [act, mut both, xa] = self.forward(&x, a, b);
        let mut again = nans(ROWS, Self::FEATURES);
        cpu.activate(&mut again, &both, self.spec).unwrap();
        assert_eq!(bits(&values(&again)), bits(&values(&act)), "{what}: activate = forward's act");

        let (mut dx, mut dxa, mut grad) = (nans(ROWS, INPUTS), nans(ROWS, xa.cols()), self.masters.grad(80));
        let (dact, x_saved, lora) = (tensor(Self::FEATURES, &c), tensor(INPUTS, &x), self.masters.lora());
        #[rustfmt::skip] // outputs, inputs, weights
        cpu.gate_up_backward(
            &mut dx, Some(&mut grad), &mut both, &mut dxa,
            &dact, &x_saved, &xa,
            &self.w, Some(&lora), self.spec,
        ).unwrap();
        let f = |x: &[f32], a: &[f32], b: &[f32]| functional(&c, &values(&self.forward(x, a, b)[0]));
        assert_gradient(&format!("{what}: dx"), &values(&dx), &x, |x| f(x, a, b));
        assert_gradient(&format!("{what}: dA"), &added(&grad.da.buffer, 80), a, |a| f(&x, a, b));
        assert_gradient(&format!("{what}: dB"), &added(&grad.db.buffer, 81), b, |b| f(&x, a, b));
    }
}

#[test]
fn gate_up() {
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        for (gated, bias) in [(true, false), (true, true), (false, false), (false, true)] {
            GateUpCase::new(GateUpSpec { activation, gated }, bias).check();
        }
    }
}

/// act = f(x·Wᵀ + bias), by hand: central differences do not see a bias that is left out.
#[test]
fn gate_up_adds_its_bias() {
    let case = GateUpCase::new(GateUpSpec { activation: Activation::Gelu, gated: false }, true);
    let zeros = |values: &[f32]| vec![0.0; values.len()];
    let (a, b) = (zeros(&case.masters.a), zeros(&case.masters.b));
    let x = noise(73, ROWS * INPUTS);
    let [_, both, _] = case.forward(&x, &a, &b);
    let (w, bias) = (noise(70, GateUpCase::FEATURES * INPUTS), noise(75, GateUpCase::FEATURES));
    let expected: Vec<f64> = x
        .chunks(INPUTS)
        .flat_map(|x| w.chunks(INPUTS).zip(&bias).map(|(w, bias)| functional(w, x) + f64::from(*bias)))
        .collect();
    assert_close("x·Wᵀ + bias", &values(&both), &expected, 1e-6);
}
