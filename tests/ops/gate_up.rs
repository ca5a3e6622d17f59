//! The feed-forward's first half, for every activation, gated or not.

use ares::ops::gate_up::naive;
use ares::ops::{Activation, GateUpSpec, Ops};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    spec: GateUpSpec,
    k: usize,
    features: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    masters: Masters,
    dact: Vec<f32>,
}

impl Case {
    fn new(spec: GateUpSpec, rows: usize, k: usize, features: usize, bias: bool) -> Case {
        let n = spec.width(features);
        Case {
            spec,
            k,
            features,
            x: random(1, rows * k, 1.0),
            w: random(2, n * k, 0.3),
            bias: bias.then(|| random(3, n, 1.0)),
            masters: Masters::new(4, &vec![features; n / features], k, 4),
            dact: random(8, rows * features, 1.0),
        }
    }

    /// act, gate∣up and xa.
    fn forward(&self) -> [Vec<f32>; 3] {
        let rows = self.x.len() / self.k;
        let [mut act, mut both, mut xa] =
            [self.features, self.spec.width(self.features), self.masters.width()].map(|cols| nans(rows * cols));
        let (bias, adapter) = (self.bias.as_deref(), Some(self.masters.naive()));
        naive::forward(&mut act, &mut both, &mut xa, &self.x, &self.w, bias, adapter, self.spec, self.k);
        [act, both, xa]
    }

    fn take(&self, rows: &[usize]) -> Case {
        Case { x: rows_of(&self.x, self.k, rows), dact: rows_of(&self.dact, self.features, rows), ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([act, both, xa], masters) = (self.forward(), &self.masters);
        let (mut dboth, mut dx, mut dxa) = (both.clone(), nans(self.x.len()), nans(xa.len()));
        let (mut da, mut db, adapter) = (masters.da.clone(), masters.db.clone(), Some(masters.naive()));
        #[rustfmt::skip] // outputs, inputs, weights
        naive::backward(
            &mut dx, &mut da, &mut db, &mut dboth, &mut dxa,
            &self.dact, &self.x, &xa,
            &self.w, adapter, self.spec, self.k,
        );
        let outputs = [("act", act.clone()), ("again", act), ("gate_up", both), ("xa", xa)];
        let gradients = [("dgate_up", dboth), ("dx", dx), ("dxa", dxa), ("dA", da), ("dB", db)];
        outputs.into_iter().chain(gradients).collect()
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, k, features, [_, both, xa]) = (self.spec, self.k, self.features, self.forward());
        let (n, width) = (spec.width(features), self.masters.width());
        let (w, bias) = (ops.weight(n, k, self.w.clone()).unwrap(), self.bias.as_ref().map(|bias| act(ops, n, bias)));
        let (x, dact, lora, mut grad) =
            (act(ops, k, &self.x), act(ops, features, &self.dact), self.masters.lora(ops), self.masters.grad(ops));
        let (saved, mut dboth) = (act(ops, width, &xa), act(ops, n, &both));
        let output = |cols| unwritten(ops, x.rows(), cols);
        let (mut y, mut again, mut both, mut xa) = (output(features), output(features), output(n), output(width));
        ops.gate_up_forward(&mut y, &mut both, &mut xa, &x, &w, bias.as_ref(), Some(&lora), spec).unwrap();
        ops.activate(&mut again, &dboth, spec).unwrap();
        let (mut dx, mut dxa) = (output(k), output(width));
        #[rustfmt::skip] // outputs, inputs, weights
        ops.gate_up_backward(
            &mut dx, Some(&mut grad), &mut dboth, &mut dxa,
            &dact, &x, &saved,
            &w, Some(&lora), spec,
        ).unwrap();
        let mut out = Outputs::default();
        out.act(ops, "act", y, 2.0, 2e-2);
        out.act(ops, "gate_up", both, 1.0, 1e-2);
        out.act(ops, "xa", xa, 1.0, 1e-5);
        // From the same gate and up; tight enough to tell GELU from its tanh form, which is 5e-4 away at most.
        out.act(ops, "again", again, 1.0, 1e-5);
        out.act(ops, "dgate_up", dboth, 1.0, 1e-5);
        out.act(ops, "dx", dx, 1.0, 2e-2);
        out.act(ops, "dxa", dxa, 1.0, 1e-2);
        out.f32(ops, "dA", grad.da, 1e-2, 8e-2).sum();
        out.f32(ops, "dB", grad.db, 1e-2, 8e-2).sum();
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
    shapes.into_iter().flat_map(both).map(|case| (format!("{:?}, bias {}", case.spec, case.bias.is_some()), case))
}

#[test]
fn gradient() {
    for spec in specs() {
        let case = Case::new(spec, 3, 7, 5, true);
        let dact = ("act", &case.dact[..]);
        assert_slope(&case, dact, ("dx", &[]), |case| &mut case.x);
        assert_slope(&case, dact, ("dA", &case.masters.da), |case| &mut case.masters.a);
        assert_slope(&case, dact, ("dB", &case.masters.db), |case| &mut case.masters.b);
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
