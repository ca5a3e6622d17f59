//! Query, key and value: product and adapter, bias, norm of the heads, rotation.

use ares::ops::qkv::naive::{self, Weights};
use ares::ops::{NormSpec, Ops, QkvSpec, QkvWeights, Rope};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    spec: QkvSpec,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    qk_norm: Option<[Vec<f32>; 2]>,
    freq: Vec<f32>,
    masters: Masters,
    positions: Vec<u32>,
    dy: Vec<f32>,
}

impl Case {
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), rows: usize, k: usize, bias: bool, norm: bool) -> Case {
        let spec = QkvSpec { heads, kv_heads, head_dim, norm: NormSpec { eps: 1e-2, unit_offset: false } };
        let (n, e) = (spec.width(), head_dim);
        Case {
            spec,
            k,
            x: random(1, rows * k, 1.0),
            w: random(2, n * k, 0.2),
            bias: bias.then(|| random(3, n, 0.5)),
            qk_norm: norm.then(|| [random(4, e, 1.0), random(5, e, 1.0)]),
            freq: (0..e / 2).map(|i| 100f32.powf(-2.0 * i as f32 / e as f32)).collect(),
            masters: Masters::new(6, &[heads * e, kv_heads * e, kv_heads * e], k, 3),
            positions: (0..rows as u32).map(|t| t * 5 % 64).collect(),
            dy: random(9, rows * n, 1.0),
        }
    }

    fn weights(&self) -> Weights<'_> {
        let qk_norm = self.qk_norm.as_ref().map(|[q, k]| (&q[..], &k[..]));
        Weights { w: &self.w, bias: self.bias.as_deref(), qk_norm, freq: &self.freq }
    }

    fn raw_columns(&self) -> usize {
        if self.qk_norm.is_some() { self.spec.rotated() } else { 0 }
    }

    /// q∣k∣v, xa and the q∣k before norm.
    fn forward(&self) -> [Vec<f32>; 3] {
        let rows = self.positions.len();
        let [mut qkv, mut xa, mut raw] =
            [self.spec.width(), self.masters.width(), self.raw_columns()].map(|cols| nans(rows * cols));
        let (weights, adapter) = (self.weights(), self.masters.naive());
        naive::forward(&mut qkv, &mut xa, &mut raw, &self.x, weights, adapter, &self.positions, self.spec);
        [qkv, xa, raw]
    }

    fn take(&self, rows: &[usize]) -> Case {
        let positions = rows.iter().map(|r| self.positions[*r]).collect();
        let (x, dy) = (rows_of(&self.x, self.k, rows), rows_of(&self.dy, self.spec.width(), rows));
        Case { x, dy, positions, ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([qkv, xa, raw], masters, dy) = (self.forward(), &self.masters, &mut self.dy.clone());
        let (mut dx, mut dxa) = (nans(self.x.len()), nans(xa.len()));
        let (mut da, mut db, weights) = (masters.da.clone(), masters.db.clone(), self.weights());
        #[rustfmt::skip] // outputs, inputs, weights
        naive::backward(
            &mut dx, &mut da, &mut db, dy, &mut dxa,
            &self.x, &xa, &raw,
            weights, masters.naive(), &self.positions, self.spec,
        );
        let outputs = [("qkv", qkv), ("xa", xa), ("raw", raw)];
        let gradients = [("dqkv", dy.clone()), ("dx", dx), ("dxa", dxa), ("dA", da), ("dB", db)];
        outputs.into_iter().chain(gradients).collect()
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, k, rows, [_, xa, raw]) = (self.spec, self.k, self.positions.len(), self.forward());
        let weights = QkvWeights {
            w: ops.weight(spec.width(), k, self.w.clone()).unwrap(),
            bias: self.bias.as_ref().map(|bias| act(ops, spec.width(), bias)),
            qk_norm: self.qk_norm.as_ref().map(|gains| gains.each_ref().map(|g| act(ops, spec.head_dim, g)).into()),
        };
        let (rope, positions) = (Rope::new(ops, &self.freq, 64).unwrap(), indices(ops, &self.positions));
        let (x, lora, mut grad) = (act(ops, k, &self.x), self.masters.lora(ops), self.masters.grad(ops));
        let output = |cols| unwritten(ops, rows, cols);
        let saved = act(ops, self.masters.width(), &xa);
        let saved_raw = if raw.is_empty() { output(0) } else { act(ops, spec.rotated(), &raw) };
        let (mut qkv, mut xa, mut raw) =
            (output(spec.width()), output(self.masters.width()), output(self.raw_columns()));
        ops.qkv_forward(&mut qkv, &mut xa, &mut raw, &x, &weights, Some(&lora), &positions, &rope, spec).unwrap();
        let (mut dqkv, mut dx, mut dxa) = (act(ops, spec.width(), &self.dy), output(k), output(self.masters.width()));
        #[rustfmt::skip] // outputs, inputs, weights
        ops.qkv_backward(
            &mut dx, Some(&mut grad), &mut dqkv, &mut dxa,
            &x, &saved, &saved_raw,
            &weights, Some(&lora), &positions, &rope, spec,
        ).unwrap();
        let mut out = Outputs::default();
        // What lies between two bf16 is rounded one way or the other, before norm and rotation and after.
        out.act(ops, "qkv", qkv, 2.0, 2e-2);
        out.act(ops, "xa", xa, 1.0, 1e-5);
        out.act(ops, "raw", raw, 1.0, 1e-2);
        out.act(ops, "dqkv", dqkv, 1.0, 1e-5);
        out.act(ops, "dx", dx, 1.0, 2e-2);
        out.act(ops, "dxa", dxa, 1.0, 1e-2);
        out.f32(ops, "dA", grad.da, 1e-2, 8e-2).sum();
        out.f32(ops, "dB", grad.db, 1e-2, 8e-2).sum();
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes =
        [((4, 2, 8), 7, 36), ((3, 1, 32), 33, 40), ((2, 2, 20), 1, 64), ((2, 1, 128), 9, 72), ((4, 2, 12), 67, 11)];
    let kinds = |(heads, rows, k)| {
        [(false, false), (true, false), (false, true), (true, true)]
            .map(|(bias, norm)| Case::new(heads, rows, k, bias, norm))
    };
    shapes.into_iter().flat_map(kinds)
}

#[test]
fn gradient() {
    for (bias, norm) in [(false, false), (true, true)] {
        let case = Case::new((4, 2, 6), 5, 7, bias, norm);
        let dy = ("qkv", &case.dy[..]);
        assert_slope(&case, dy, ("dx", &[]), |case| &mut case.x);
        assert_slope(&case, dy, ("dA", &case.masters.da), |case| &mut case.masters.a);
        assert_slope(&case, dy, ("dB", &case.masters.db), |case| &mut case.masters.b);
    }
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("qkv", &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("qkv", &device, &case));
}

#[test]
fn invariance() {
    for (heads, k) in [((4, 2, 12), 19), ((4, 4, 32), 128)] {
        for full in [false, true] {
            let case = Case::new(heads, ROWS, k, full, full);
            assert_alone("qkv", &|rows: &[usize]| case.take(rows));
        }
    }
}
