//! Query, key and value: product and adapter, bias, norm of the heads, rotation.

use ares::ops::qkv::naive;
use ares::ops::{NormSpec, Ops, QkvSpec, Rope, Rotation};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    spec: QkvSpec,
    product: Product,
    qk_norm: Option<[Vec<f32>; 2]>,
    freq: Vec<f32>,
    positions: Vec<u32>,
    dy: Vec<f32>,
}

impl Case {
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), rows: usize, k: usize, bias: bool, norm: bool) -> Case {
        let norm_spec = NormSpec { eps: 1e-2, unit_offset: false };
        let spec = QkvSpec { heads, kv_heads, head_dim, norm: norm_spec, wide: false };
        let e = head_dim;
        Case {
            spec,
            product: Product::new((rows, k), &[heads, kv_heads, kv_heads].map(|n| n * e), 3, 0.2, bias.then_some(0.5)),
            qk_norm: norm.then(|| [random(4, e, 1.0), random(5, e, 1.0)]),
            freq: (0..e / 2).map(|i| 100f32.powf(-2.0 * i as f32 / e as f32)).collect(),
            positions: (0..rows as u32).map(|t| t * 5 % 64).collect(),
            dy: random(9, rows * spec.width(), 1.0),
        }
    }

    /// Norms of all of q, and of all of k.
    fn wide(self) -> Case {
        let QkvSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let qk_norm = Some([random(4, heads * head_dim, 1.0), random(5, kv_heads * head_dim, 1.0)]);
        Case { spec: QkvSpec { wide: true, ..self.spec }, qk_norm, ..self }
    }

    fn rotation(&self) -> naive::Rotation<'_> {
        let qk_norm = self.qk_norm.as_ref().map(|[q, k]| (&q[..], &k[..]));
        naive::Rotation { qk_norm, positions: &self.positions, freq: &self.freq, spec: self.spec }
    }

    fn raw_columns(&self) -> usize {
        if self.qk_norm.is_some() { self.spec.rotated() } else { 0 }
    }

    /// q∣k∣v, xa and the q∣k before norm.
    fn forward(&self) -> [Vec<f32>; 3] {
        let [mut qkv, mut xa, mut raw] =
            [self.spec.width(), self.product.width(), self.raw_columns()].map(|cols| nans(self.positions.len() * cols));
        naive::forward(&mut qkv, &mut xa, &mut raw, &self.product.x, self.product.weights(), self.rotation());
        [qkv, xa, raw]
    }

    fn take(&self, rows: &[usize]) -> Case {
        let positions = rows.iter().map(|r| self.positions[*r]).collect();
        let (product, dy) = (self.product.take(rows), rows_of(&self.dy, self.spec.width(), rows));
        Case { product, dy, positions, ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([qkv, xa, raw], mut dqkv, product) = (self.forward(), self.dy.clone(), &self.product);
        let gradients = product.gradients(|(dx, dab, dxa)| {
            naive::backward(dx, dab, &mut dqkv, dxa, &product.x, &xa, &raw, product.weights(), self.rotation());
        });
        [("qkv", qkv), ("xa", xa), ("raw", raw), ("dqkv", dqkv)].into_iter().chain(gradients).collect()
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, rows, [_, xa, raw]) = (self.spec, self.positions.len(), self.forward());
        let qk_norm = self.qk_norm.as_ref().map(|gains| gains.each_ref().map(|g| act(ops, g.len(), g)).into());
        let (rope, positions) = (Rope::new(ops, &self.freq, 64).unwrap(), indices(ops, &self.positions));
        let rotation = || Rotation { qk_norm: qk_norm.as_ref(), positions: &positions, rope: &rope, spec };
        let (mut product, mut dqkv) = (self.product.on(ops, &xa), act(ops, spec.width(), &self.dy));
        let saved = if raw.is_empty() { unwritten(ops, rows, 0) } else { act(ops, spec.rotated(), &raw) };
        let mut raw = unwritten(ops, rows, self.raw_columns());
        ops.qkv_forward(product.forward(), &mut raw, rotation()).unwrap();
        ops.qkv_backward(product.backward(), &mut dqkv, &saved, rotation()).unwrap();
        product.gradients(ops, &dqkv);
        let mut out = Outputs::default();
        let (qkv, _) = product.outputs(ops, &mut out, [5e-3, 1e-5, 1e-2], [(1e-2, 8e-2); 2]);
        // What lies between two bf16 is rounded one way or the other, before norm and rotation and after.
        out.act(ops, "qkv", qkv, 2.0, 2e-2);
        out.act(ops, "raw", raw, 1.0, 1e-2);
        out.act(ops, "dqkv", dqkv, 1.0, 1e-5);
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes =
        [((4, 2, 8), 7, 36), ((3, 1, 32), 33, 40), ((2, 2, 20), 1, 64), ((2, 1, 128), 9, 72), ((4, 2, 12), 67, 11)];
    let kinds = |(heads, rows, k)| {
        let of = move |(bias, norm)| Case::new(heads, rows, k, bias, norm);
        [(false, false), (true, false), (false, true), (true, true)]
            .map(of)
            .into_iter()
            .chain([of((false, true)).wide()])
    };
    shapes.into_iter().flat_map(kinds)
}

#[test]
fn gradient() {
    for (bias, norm) in [(false, false), (true, true)] {
        let case = Case::new((4, 2, 6), 5, 7, bias, norm);
        assert_product_slopes(&case, ("qkv", &case.dy), |case| &mut case.product);
    }
    let wide = Case::new((4, 2, 6), 5, 7, false, true).wide();
    assert_product_slopes(&wide, ("qkv", &wide.dy), |case| &mut case.product);
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
            if full {
                let wide = case.clone().wide();
                assert_alone("qkv, wide", &|rows: &[usize]| wide.take(rows));
            }
        }
    }
}
