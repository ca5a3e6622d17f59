//! The feed-forward's first half, for every activation, gated or not.

use ares::ops::gate_up::naive;
use ares::ops::{Activation, GateUpSpec, Ops};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    spec: GateUpSpec,
    features: usize,
    product: Product,
    dact: Vec<f32>,
}

impl Case {
    fn new(spec: GateUpSpec, rows: usize, k: usize, features: usize, bias: bool) -> Case {
        let parts = vec![features; spec.width(1)];
        let product = Product::new((rows, k), &parts, 4, 0.3, bias.then_some(1.0));
        Case { spec, features, product, dact: random(8, rows * features, 1.0) }
    }

    /// act, gate∣up and xa.
    fn forward(&self) -> [Vec<f32>; 3] {
        let [mut act, mut both, mut xa] = [self.features, self.spec.width(self.features), self.product.width()]
            .map(|cols| nans(self.product.rows() * cols));
        naive::forward(&mut act, &mut both, &mut xa, &self.product.x, self.product.weights(), self.spec);
        [act, both, xa]
    }

    fn take(&self, rows: &[usize]) -> Case {
        Case { product: self.product.take(rows), dact: rows_of(&self.dact, self.features, rows), ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([act, both, xa], product) = (self.forward(), &self.product);
        let (mut dboth, mut dact) = (both.clone(), self.dact.clone());
        let gradients = product.gradients(|(dx, dab, dxa)| {
            naive::backward(dx, dab, &mut dboth, dxa, &mut dact, &product.x, &xa, product.weights(), self.spec);
        });
        let outputs = [("act", act), ("left", dact), ("gate_up", both), ("xa", xa), ("dgate_up", dboth)];
        outputs.into_iter().chain(gradients).collect()
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, features, rows, [_, both, xa]) = (self.spec, self.features, self.product.rows(), self.forward());
        let (mut product, mut left) = (self.product.on(ops, &xa), act(ops, features, &self.dact));
        let mut dboth = act(ops, spec.width(features), &both);
        let mut y = unwritten(ops, rows, features);
        ops.gate_up_forward(&mut y, product.forward(), spec).unwrap();
        ops.gate_up_backward(product.backward(), &mut dboth, &mut left, spec).unwrap();
        product.gradients(ops, &dboth);
        let mut out = Outputs::default();
        let (both, _) = product.outputs(ops, &mut out, [5e-3, 1e-5, 1e-2], [(1e-2, 8e-2); 2]);
        out.act(ops, "act", y, 2.0, 2e-2);
        out.act(ops, "gate_up", both, 1.0, 1e-2);
        // From the same gate and up; tight enough to tell GELU from its tanh form, which is 5e-4 away at most.
        out.act(ops, "left", left, 1.0, 1e-5);
        out.act(ops, "dgate_up", dboth, 1.0, 1e-5);
        out
    }
}

fn specs() -> impl Iterator<Item = GateUpSpec> {
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh].into_iter();
    activations.flat_map(|activation| [true, false].map(|gated| GateUpSpec { activation, gated }))
}

fn cases() -> impl Iterator<Item = (String, Case)> {
    // More rows than one block of the products holds; features of whole vector steps and a rest.
    let shapes = [(1, 24, 8), (7, 36, 44), (40, 128, 72), (67, 11, 19)];
    let both = |(rows, k, features)| {
        specs().flat_map(move |spec| [false, true].map(|bias| Case::new(spec, rows, k, features, bias)))
    };
    shapes
        .into_iter()
        .flat_map(both)
        .map(|case| (format!("{:?}, bias {}", case.spec, case.product.weights().bias.is_some()), case))
}

#[test]
fn gradient() {
    for spec in specs() {
        let case = Case::new(spec, 3, 7, 5, true);
        assert_product_slopes(&case, ("act", &case.dact), |case| &mut case.product);
    }
}

#[test]
fn naive() {
    cases().for_each(|(what, case)| assert_naive(&what, &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|(what, case)| assert_parity(&what, &device, &case));
}

#[test]
fn invariance() {
    for (k, features) in [(19, 9), (128, 352)] {
        for (activation, gated) in [(Activation::Silu, true), (Activation::GeluTanh, true), (Activation::Gelu, false)] {
            let case = Case::new(GateUpSpec { activation, gated }, ROWS, k, features, !gated);
            assert_alone("gate_up", &|rows: &[usize]| case.take(rows));
        }
    }
}
