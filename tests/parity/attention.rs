//! Packed attention, both directions: ragged packs against the reference, and a sequence's bits against the same sequence in
//! other company.

use ares::backend::{Backend, Cpu, Cuda, Tensor};
use ares::ops::{Attention, AttentionSpec, Packing};

use crate::common::{Group, bits, columns, keys_of, packing};
use crate::harness::*;

/// Rows behind those in use, which must stay as they were.
const SPARE: usize = 3;

/// What an encoder packs: sequences side by side, of one row to more than two tiles.
const SEQUENCES: &[Group] = &[(0, &[65]), (0, &[1]), (0, &[130]), (0, &[64]), (0, &[7])];

/// Shared prompts with one to three answers, sequences without prompt, a prompt without answers; one row to more than two tiles.
const RAGGED: &[Group] = &[(130, &[65, 64, 7]), (0, &[1]), (0, &[65]), (1, &[7, 1]), (64, &[130]), (7, &[])];

pub fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
    let scale = (head_dim as f32).powf(-0.5);
    AttentionSpec { heads, kv_heads, head_dim, scale, window: None, softcap: None, causal: true }
}

fn cases() -> Vec<(&'static str, &'static [Group<'static>], AttentionSpec)> {
    let both = |spec| AttentionSpec { causal: false, ..spec };
    let capped = |window, spec| AttentionSpec { window: Some(window), softcap: Some(3.0), ..spec };
    vec![
        ("two heads of a group, 64", RAGGED, spec(4, 2, 64)),
        ("an odd group of five, 32", RAGGED, spec(5, 1, 32)),
        ("a window of 40, 32", RAGGED, AttentionSpec { window: Some(40), ..spec(2, 2, 32) }),
        ("softcap, 40", RAGGED, AttentionSpec { softcap: Some(2.0), ..spec(4, 1, 40) }),
        ("both directions, 8", RAGGED, both(spec(2, 1, 8))),
        ("both directions, a window of 70 and softcap, 8", RAGGED, both(capped(70, spec(2, 2, 8)))),
        ("both directions, two heads of a group, 64", SEQUENCES, both(spec(2, 1, 64))),
        // The first tile's last key begins a strip of its own.
        ("both directions, a window of 66, 64", SEQUENCES, AttentionSpec { window: Some(66), ..both(spec(2, 2, 64)) }),
        ("both directions, a window of one, 8", SEQUENCES, AttentionSpec { window: Some(1), ..both(spec(2, 1, 8)) }),
        ("both directions, softcap, 40", SEQUENCES, AttentionSpec { softcap: Some(2.0), ..both(spec(2, 1, 40)) }),
        ("both directions, a padded head of 136", &[(0, &[33]), (0, &[70])], both(spec(1, 1, 136))),
        // A lone row's lse is its one score: far below zero, where exp(0 − lse) of rows that are none is infinite.
        ("steep scores, 8", &[(0, &[1, 1, 1, 1, 1, 40])], AttentionSpec { scale: 40.0, ..spec(2, 1, 8) }),
        ("128", &[(70, &[65, 3]), (0, &[33])], spec(2, 1, 128)),
        ("a padded head of 136", &[(20, &[66]), (0, &[33])], spec(1, 1, 136)),
    ]
}

/// The same tables on another backend.
fn packing_on<B: Backend>(ops: &B, packing: &Packing<Cpu>) -> Packing<B> {
    let mut copy = Packing::with_capacity(ops, packing.rows()).unwrap();
    copy.set(ops, packing.segments.clone(), packing.groups.clone(), &packing.positions.buffer).unwrap();
    copy
}

/// An output with spare rows.
fn output<B: Backend>(ops: &B, rows: usize, cols: usize) -> Tensor<B> {
    let mut tensor = unwritten(ops, rows + SPARE, cols);
    tensor.set_rows(rows).unwrap();
    tensor
}

/// The rows in use; the spare ones must be unwritten.
fn written<B: Backend>(ops: &B, mut tensor: Tensor<B>) -> Vec<f32> {
    let (rows, cols) = tensor.shape();
    tensor.set_rows(rows + SPARE).unwrap();
    let mut values = read(ops, &tensor);
    assert!(values[rows * cols..].iter().all(|v| v.is_nan()), "rows behind those in use were written");
    values.truncate(rows * cols);
    values
}

fn forward<B: Attention>(ops: &B, qkv: &[f32], packing: &Packing<Cpu>, spec: AttentionSpec) -> (Vec<f32>, Vec<f32>) {
    let rows = packing.rows();
    let qkv = act(ops, rows, spec.width(), qkv);
    let mut o = output(ops, rows, spec.heads * spec.head_dim);
    let mut lse = numbers(ops, rows, spec.heads, &vec![f32::NAN; rows * spec.heads]);
    ops.attention_forward(&mut o, &mut lse, &qkv, &packing_on(ops, packing), spec).unwrap();
    (written(ops, o), lse.read(ops).unwrap())
}

/// What backward reads.
struct Given {
    qkv: Vec<f32>,
    o: Vec<f32>,
    lse: Vec<f32>,
    d_o: Vec<f32>,
}

fn given(packing: &Packing<Cpu>, spec: AttentionSpec) -> Given {
    let qkv = random(1, packing.rows() * spec.width(), 1.2);
    let (o, lse) = forward(&reference(), &qkv, packing, spec);
    let d_o = random(2, o.len(), 0.6);
    Given { qkv, o, lse, d_o }
}

fn backward<B: Attention>(ops: &B, given: &Given, packing: &Packing<Cpu>, spec: AttentionSpec) -> Vec<f32> {
    let (rows, columns) = (packing.rows(), spec.heads * spec.head_dim);
    let mut dqkv = output(ops, rows, spec.width());
    let (d_o, o) = (act(ops, rows, columns, &given.d_o), act(ops, rows, columns, &given.o));
    let (lse, qkv) = (numbers(ops, rows, spec.heads, &given.lse), act(ops, rows, spec.width(), &given.qkv));
    ops.attention_backward(&mut dqkv, &d_o, &o, &lse, &qkv, &packing_on(ops, packing), spec).unwrap();
    written(ops, dqkv)
}

/// Both sides round once: one ulp. What is rounded to bf16 as an operand is off by 2^-8 of itself at most, so its products
/// with the other operand are off by 2^-8 of the sum of their magnitudes. `slack`: f32 sums in another order.
pub fn assert_products(what: &str, found: &[f32], expected: &[f32], magnitudes: &[f32], slack: &[f32]) {
    assert_eq!([found.len(), magnitudes.len(), slack.len()], [expected.len(); 3], "{what}: lengths");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let limit = ulp(found.abs().max(expected.abs())) + magnitudes[i] / 256.0 + slack[i];
        assert!((found - expected).abs() <= limit, "{what}[{i}]: expected {expected}, found {found}, limit {limit}");
    }
}

/// The same rows with |v| for v: attention over them is the sum of the magnitudes that make up o.
pub fn with_magnitudes(qkv: &[f32], spec: &AttentionSpec) -> Vec<f32> {
    let first = columns(spec, 2, 0).start;
    let mut rows = qkv.to_vec();
    rows.chunks_mut(spec.width()).for_each(|row| row[first..].iter_mut().for_each(|v| *v = v.abs()));
    rows
}

#[test]
fn forward_is_the_reference() {
    let Some(device) = device() else { return };
    for (name, groups, spec) in cases() {
        let packing = packing(groups);
        let given = given(&packing, spec);
        let (o, lse) = forward(&device, &given.qkv, &packing, spec);
        let (magnitudes, _) = forward(&Cpu::new(), &with_magnitudes(&given.qkv, &spec), &packing, spec);
        let slack: Vec<f32> = magnitudes.iter().map(|m| 2e-6 * m).collect();
        assert_products(&format!("{name}: o"), &o, &given.o, &magnitudes, &slack);
        near(&format!("{name}: lse"), &lse, &given.lse, 1e-6, 2e-6);
    }
}

/// By the definition: the magnitudes that make up dq (ds·k), dk (ds·q) and dv (p·do), and those that made up ds, which is a
/// difference of f32 sums.
fn magnitudes(given: &Given, packing: &Packing<Cpu>, spec: AttentionSpec) -> (Vec<f32>, Vec<f32>) {
    let (width, e) = (spec.width(), spec.head_dim);
    let (mut sums, mut slack) = (vec![0.0; packing.rows() * width], vec![0.0; packing.rows() * width]);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let absolute = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f32>();
    for (i, head) in (0..packing.rows()).flat_map(|i| (0..spec.heads).map(move |head| (i, head))) {
        let kv = head * spec.kv_heads / spec.heads;
        let row = i * spec.heads + head;
        let (d_o, o) = (&given.d_o[row * e..][..e], &given.o[row * e..][..e]);
        let at = |row: usize, which, head| row * width + columns(&spec, which, head).start;
        for j in keys_of(packing, i, &spec) {
            let (q, k, v) = (at(i, 0, head), at(j, 1, kv), at(j, 2, kv));
            let raw = spec.scale * dot(&given.qkv[q..][..e], &given.qkv[k..][..e]);
            let (s, slope) = spec.softcap.map_or((raw, 1.0), |cap| {
                let tanh = (raw / cap).tanh();
                (cap * tanh, 1.0 - tanh * tanh)
            });
            let p = (s - given.lse[row]).exp();
            let factor = p * slope * spec.scale;
            let ds = (factor * (dot(d_o, &given.qkv[v..][..e]) - dot(d_o, o))).abs();
            let before = factor * (absolute(d_o, &given.qkv[v..][..e]) + absolute(d_o, o));
            for c in 0..e {
                for (to, ds) in [(&mut sums, ds), (&mut slack, 2e-6 * before)] {
                    to[q + c] += ds * given.qkv[k + c].abs();
                    to[k + c] += ds * given.qkv[q + c].abs();
                }
                sums[v + c] += p * d_o[c].abs();
                slack[v + c] += 2e-6 * p * d_o[c].abs();
            }
        }
    }
    (sums, slack)
}

fn assert_backward(device: &Cuda, name: &str, groups: &[Group], spec: AttentionSpec) {
    let packing = packing(groups);
    let given = given(&packing, spec);
    let (sums, slack) = magnitudes(&given, &packing, spec);
    let (found, expected) = (backward(device, &given, &packing, spec), backward(&reference(), &given, &packing, spec));
    assert_products(&format!("{name}: dqkv"), &found, &expected, &sums, &slack);
}

#[test]
fn backward_is_the_reference() {
    let Some(device) = device() else { return };
    for (name, groups, spec) in cases() {
        assert_backward(&device, name, groups, spec);
    }
}

/// A prompt of two tiles that 4230 rows see: several blocks share them, the border between two answers' rows.
#[test]
fn backward_adds_shared_sums() {
    let Some(device) = device() else { return };
    assert_backward(&device, "many answers", &[(70, &[130; 32]), (0, &[3])], spec(2, 1, 8));
}

/// More rows than one block walks see every key of a long sequence.
#[test]
fn backward_adds_shared_sums_of_both_directions() {
    let Some(device) = device() else { return };
    let spec = AttentionSpec { causal: false, ..spec(1, 1, 8) };
    assert_backward(&device, "a long sequence", &[(0, &[3]), (0, &[4170])], spec);
}

#[test]
fn a_sequence_alone_has_the_same_bits() {
    let Some(device) = device() else { return };
    let window = AttentionSpec { window: Some(40), ..spec(2, 2, 32) };
    let both = [spec(2, 1, 64), window].map(|spec| AttentionSpec { causal: false, ..spec });
    for spec in [spec(4, 2, 64), window].into_iter().chain(both) {
        let (packed, columns) = (packing(RAGGED), spec.heads * spec.head_dim);
        let qkv = random(3, packed.rows() * spec.width(), 1.0);
        let (o, lse) = forward(&device, &qkv, &packed, spec);
        let answers = packed.segments.iter().filter(|s| s.rows.start > 0 && s.rows.start >= s.prompt.end);
        for segment in answers {
            // The prompt's rows and this answer's, as if there were no other.
            let rows: Vec<usize> = segment.prompt.clone().chain(segment.rows.clone()).collect();
            let pick = |from: &[f32], cols: usize| {
                rows.iter().flat_map(|r| from[r * cols..][..cols].to_vec()).collect::<Vec<_>>()
            };
            let alone = packing(&[(segment.prompt.len(), &[segment.rows.len()])]);
            let (alone, alone_lse) = forward(&device, &pick(&qkv, spec.width()), &alone, spec);
            assert_eq!(bits(&alone), bits(&pick(&o, columns)), "{segment:?}: o");
            assert_eq!(bits(&alone_lse), bits(&pick(&lse, spec.heads)), "{segment:?}: lse");
        }
    }
}
