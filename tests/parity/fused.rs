//! Products with what is fused around them: q∣k∣v with bias, norm and rotation; gate∣up with its activation; sampling.

use ares::backend::{Backend, Tensor};
use ares::ops::{
    Activation, GateUp, GateUpSpec, Lora, LoraGrad, NormSpec, Qkv, QkvSpec, QkvWeights, Rope, Sample, SampleSpec,
    SampleTable,
};

use crate::harness::*;

/// An adapter of `parts` for k inputs.
fn lora<B: Backend>(ops: &B, parts: &[usize], k: usize, rank: usize) -> Lora<B> {
    let (n, width) = (parts.iter().sum::<usize>(), parts.len() * rank);
    Lora {
        parts: parts.to_vec(),
        rank,
        scale: 2.0,
        a: act(ops, width, k, &random(31, width * k, 0.3)),
        b: act(ops, n, rank, &random(32, n * rank, 0.3)),
    }
}

/// Accumulators that already hold something.
fn grads<B: Backend>(ops: &B, lora: &Lora<B>, k: usize) -> LoraGrad<B> {
    let (n, width) = (lora.b.rows(), lora.width());
    LoraGrad {
        da: numbers(ops, width, k, &random(33, width * k, 1.0)),
        db: numbers(ops, n, lora.rank, &random(34, n * lora.rank, 1.0)),
    }
}

/// (activations, f32 gradients)
type Results = (Vec<(&'static str, Vec<f32>)>, Vec<(&'static str, Vec<f32>)>);

fn compare(found: &Results, expected: &Results, absolute: f32) {
    for ((name, found), (_, expected)) in found.0.iter().zip(&expected.0) {
        close(name, found, expected, 2.0, absolute);
    }
    for ((name, found), (_, expected)) in found.1.iter().zip(&expected.1) {
        // Operands that were rounded the other way somewhere: an ulp of bf16 on a few of many terms.
        near(name, found, expected, 1e-2, 4.0 * absolute);
    }
}

fn qkv<B: Qkv>(ops: &B, spec: QkvSpec, rows: usize, k: usize, full: bool) -> Results {
    let (n, e) = (spec.width(), spec.head_dim);
    let weights = QkvWeights {
        w: ops.weight(n, k, random(1, n * k, 0.2)).unwrap(),
        bias: full.then(|| act(ops, 1, n, &random(2, n, 0.5))),
        qk_norm: full.then(|| (act(ops, 1, e, &random(3, e, 1.0)), act(ops, 1, e, &random(4, e, 1.0)))),
    };
    let parts = [spec.heads * e, spec.kv_heads * e, spec.kv_heads * e];
    let lora = lora(ops, &parts, k, 8);
    let mut grad = grads(ops, &lora, k);
    let frequencies: Vec<f32> = (0..e / 2).map(|i| 100f32.powf(-2.0 * i as f32 / e as f32)).collect();
    let rope = Rope::new(ops, &frequencies, 64).unwrap();
    let positions: Vec<u32> = (0..rows as u32).map(|t| (t * 5) % 64).collect();
    let positions = numbers(ops, rows, 1, &positions);
    let x = act(ops, rows, k, &random(5, rows * k, 1.0));
    let (mut y, mut xa) = (unwritten(ops, rows, n), unwritten(ops, rows, lora.width()));
    let mut raw = unwritten(ops, rows, if full { spec.rotated() } else { 0 });
    ops.qkv_forward(&mut y, &mut xa, &mut raw, &x, &weights, Some(&lora), &positions, &rope, spec).unwrap();
    let mut out = vec![("qkv", read(ops, &y)), ("xa", read(ops, &xa)), ("raw", read(ops, &raw))];
    let mut dy = act(ops, rows, n, &random(6, rows * n, 1.0));
    let (mut dx, mut dxa) = (unwritten(ops, rows, k), unwritten(ops, rows, lora.width()));
    // Backward starts from the same saved values on both, so that its own error is seen.
    let (xa, raw_values) =
        (act(ops, rows, lora.width(), &random(7, rows * lora.width(), 1.0)), random(8, raw.rows() * raw.cols(), 1.0));
    let raw = act(ops, rows, raw.cols(), &raw_values);
    let (w, p) = (&weights, &positions);
    ops.qkv_backward(&mut dx, Some(&mut grad), &mut dy, &mut dxa, &x, &xa, &raw, w, Some(&lora), p, &rope, spec)
        .unwrap();
    out.extend([("dqkv", read(ops, &dy)), ("dx", read(ops, &dx)), ("dxa", read(ops, &dxa))]);
    (out, vec![("dA", grad.da.read(ops).unwrap()), ("dB", grad.db.read(ops).unwrap())])
}

#[test]
fn qkv_both_ways() {
    let Some(device) = device() else { return };
    let norm = NormSpec { eps: 1e-6, unit_offset: false };
    for (heads, kv_heads, head_dim, rows, k) in
        [(4, 2, 8, 7, 36), (3, 1, 32, 33, 40), (2, 2, 20, 1, 64), (2, 1, 128, 9, 72)]
    {
        let spec = QkvSpec { heads, kv_heads, head_dim, norm };
        for full in [false, true] {
            compare(&qkv(&device, spec, rows, k, full), &qkv(&reference(), spec, rows, k, full), 2e-2);
        }
    }
}

fn gate_up<B: GateUp>(ops: &B, rows: usize, f: usize, k: usize, spec: GateUpSpec) -> Results {
    let n = spec.width(f);
    let w = ops.weight(n, k, random(1, n * k, 0.3)).unwrap();
    let bias = (!spec.gated).then(|| act(ops, 1, n, &random(6, n, 1.0)));
    let lora = lora(ops, &vec![f; n / f], k, 4);
    let mut grad = grads(ops, &lora, k);
    let x = act(ops, rows, k, &random(2, rows * k, 1.0));
    let (mut y, mut both, mut xa) =
        (unwritten(ops, rows, f), unwritten(ops, rows, n), unwritten(ops, rows, lora.width()));
    ops.gate_up_forward(&mut y, &mut both, &mut xa, &x, &w, bias.as_ref(), Some(&lora), spec).unwrap();
    let mut out = vec![("act", read(ops, &y)), ("gate_up", read(ops, &both)), ("xa", read(ops, &xa))];
    let mut both = act(ops, rows, n, &random(3, rows * n, 2.0));
    let dact = act(ops, rows, f, &random(4, rows * f, 1.0));
    let xa = act(ops, rows, lora.width(), &random(5, rows * lora.width(), 1.0));
    let (mut dx, mut dxa) = (unwritten(ops, rows, k), unwritten(ops, rows, lora.width()));
    let l = Some(&lora);
    ops.gate_up_backward(&mut dx, Some(&mut grad), &mut both, &mut dxa, &dact, &x, &xa, &w, l, spec).unwrap();
    out.extend([("dgate_up", read(ops, &both)), ("dx", read(ops, &dx)), ("dxa", read(ops, &dxa))]);
    (out, vec![("dA", grad.da.read(ops).unwrap()), ("dB", grad.db.read(ops).unwrap())])
}

fn gate_up_specs() -> impl Iterator<Item = GateUpSpec> {
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh].into_iter();
    activations.flat_map(|activation| [true, false].map(|gated| GateUpSpec { activation, gated }))
}

#[test]
fn gate_up_both_ways() {
    let Some(device) = device() else { return };
    for spec in gate_up_specs() {
        for (rows, f, k) in [(1, 8, 24), (7, 44, 36), (40, 72, 128)] {
            compare(&gate_up(&device, rows, f, k, spec), &gate_up(&reference(), rows, f, k, spec), 2e-2);
        }
    }
}

/// The activation alone: act, and the gradient of gate∣up.
fn curve<B: GateUp>(ops: &B, rows: usize, f: usize, spec: GateUpSpec) -> [Vec<f32>; 2] {
    let n = spec.width(f);
    let mut both = act(ops, rows, n, &random(3, rows * n, 3.0));
    let (mut y, dact) = (unwritten(ops, rows, f), act(ops, rows, f, &random(4, rows * f, 1.0)));
    ops.activate(&mut y, &both, spec).unwrap();
    let (k, none) = (8, || unwritten(ops, rows, 0));
    let (w, x) = (ops.weight(n, k, random(1, n * k, 0.1)).unwrap(), act(ops, rows, k, &random(2, rows * k, 1.0)));
    let mut dx = unwritten(ops, rows, k);
    ops.gate_up_backward(&mut dx, None, &mut both, &mut none(), &dact, &x, &none(), &w, None, spec).unwrap();
    [read(ops, &y), read(ops, &both)]
}

/// Tight enough to tell GELU from its tanh form, which is 5e-4 away at most.
#[test]
fn activations_are_the_reference_s() {
    let Some(device) = device() else { return };
    for spec in gate_up_specs() {
        for (rows, f) in [(1, 8), (7, 44), (40, 72)] {
            let (found, expected) = (curve(&device, rows, f, spec), curve(&reference(), rows, f, spec));
            close(&format!("{spec:?}: act"), &found[0], &expected[0], 1.0, 1e-5);
            close(&format!("{spec:?}: dgate_up"), &found[1], &expected[1], 1.0, 1e-5);
        }
    }
}

/// Tokens drawn from `rows` equal rows of the hidden state.
fn drawn<B: Sample>(ops: &B, rows: usize, vocab: usize, spec: SampleSpec) -> (Vec<u32>, Vec<f32>) {
    let cols = 24;
    let w = ops.weight(vocab, cols, random(1, vocab * cols, 0.4)).unwrap();
    let row = random(2, cols, 1.0);
    let h = act(ops, rows, cols, &row.repeat(rows));
    let mut table = SampleTable::with_capacity(ops, rows).unwrap();
    let ids: Vec<u64> = (0..rows as u64).map(|i| i * 3 + (i << 33)).collect();
    table.set(ops, &ids, &(0..rows as u32).map(|i| i % 5).collect::<Vec<_>>()).unwrap();
    let mut logits = numbers(ops, rows, vocab, &vec![f32::NAN; rows * vocab]);
    let mut tokens: Tensor<B, u32> = numbers(ops, rows, 1, &vec![u32::MAX; rows]);
    ops.sample(&mut tokens, &mut logits, &h, &table, &w, spec).unwrap();
    let logits: Vec<f32> = row_products(&random(1, vocab * cols, 0.4), &row);
    (tokens.read(ops).unwrap(), logits)
}

fn row_products(w: &[f32], x: &[f32]) -> Vec<f32> {
    w.chunks_exact(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

#[test]
fn greedy_and_plain_draws_are_the_reference_s() {
    let Some(device) = device() else { return };
    for vocab in [5, 300, 1030] {
        for temperature in [0.0, 0.7] {
            let spec = SampleSpec { temperature, top_k: 0, top_p: 1.0, seed: 9 };
            let (found, expected) = (drawn(&device, 33, vocab, spec).0, drawn(&reference(), 33, vocab, spec).0);
            // A draw that falls within rounding of a border may go to the neighbour.
            let same = found.iter().zip(&expected).filter(|(f, e)| f == e).count();
            assert!(same + 1 >= 33, "{vocab} tokens at temperature {temperature}: {found:?} against {expected:?}");
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let Some(device) = device() else { return };
    let (vocab, cols) = (2003, 16); // more than one of them per thread
    let row = random(2, cols, 1.0);
    // Every logit appears a hundred times; the largest first at id 3.
    let w: Vec<f32> = (0..vocab).flat_map(|v| row.iter().map(move |x| if v % 7 == 3 { *x } else { -*x })).collect();
    let w = device.weight(vocab, cols, w).unwrap();
    let mut table = SampleTable::with_capacity(&device, 2).unwrap();
    table.set(&device, &[0, 1], &[0, 0]).unwrap();
    let mut logits = numbers(&device, 2, vocab, &vec![f32::NAN; 2 * vocab]);
    let mut tokens: Tensor<_, u32> = numbers(&device, 2, 1, &[u32::MAX; 2]);
    let spec = SampleSpec { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };
    let h = act(&device, 2, cols, &row.repeat(2));
    device.sample(&mut tokens, &mut logits, &h, &table, &w, spec).unwrap();
    assert_eq!(tokens.read(&device).unwrap(), [3, 3]);
}

#[test]
fn top_k_and_top_p_keep_the_largest() {
    let Some(device) = device() else { return };
    let vocab = 300;
    for (top_k, top_p) in [(1, 1.0), (4, 1.0), (0, 0.5), (40, 0.6), (0, 1e-6)] {
        let spec = SampleSpec { temperature: 1.0, top_k, top_p, seed: 4 };
        let (tokens, logits) = drawn(&device, 200, vocab, spec);
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        order.truncate(if top_k == 0 { vocab } else { top_k });
        let weight = |id: &usize| f64::from(logits[*id]).exp();
        let (whole, mut sum, mut count) = (order.iter().map(weight).sum::<f64>(), 0.0, 0);
        while count < order.len() && sum < f64::from(top_p) * whole {
            sum += weight(&order[count]);
            count += 1;
        }
        let kept = &order[..count.max(1)];
        assert!(tokens.iter().all(|t| kept.contains(&(*t as usize))), "top-k {top_k}, top-p {top_p}: {tokens:?}");
        // The likeliest token appears about as often as it should: within four standard deviations of 200 draws.
        let p = weight(&kept[0]) / sum.max(weight(&kept[0]));
        let seen = tokens.iter().filter(|t| **t as usize == kept[0]).count() as f64;
        assert!((seen - 200.0 * p).abs() <= 4.0 * (200.0 * p * (1.0 - p)).sqrt() + 1e-9, "{seen} of 200, expected {p}");
    }
}
