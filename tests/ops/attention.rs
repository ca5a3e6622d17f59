//! Packed attention of every kind that a family may ask for.

use ares::ops::attention::naive;
use ares::ops::{AttentionBackward, AttentionForward, AttentionSpec, Ops};

use crate::toolkit::{self, *};

/// Shared prompts with one to three answers, sequences without prompt, a prompt without answers; one row to more than two tiles.
const RAGGED: &[Group] = &[(130, &[65, 64, 7]), (0, &[1]), (0, &[65]), (1, &[7, 1]), (64, &[130]), (7, &[])];

/// What an encoder packs: sequences side by side, of one row to more than two tiles.
const SEQUENCES: &[Group] = &[(0, &[65]), (0, &[1]), (0, &[130]), (0, &[64]), (0, &[7])];

const SMALL: &[Group] = &[(3, &[2, 4, 1]), (0, &[5]), (2, &[]), (1, &[2, 2])];

pub fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
    let scale = (head_dim as f32).powf(-0.5);
    AttentionSpec { heads, kv_heads, head_dim, scale, window: None, softcap: None, causal: true }
}

#[derive(Clone)]
struct Case {
    spec: AttentionSpec,
    pack: Pack,
    qkv: Vec<f32>,
    d_o: Vec<f32>,
}

impl Case {
    fn new(groups: &[Group], spec: AttentionSpec) -> Case {
        let pack = Pack::new(groups);
        let (qkv, d_o) =
            (random(1, pack.rows() * spec.width(), 1.2), random(2, pack.rows() * spec.heads * spec.head_dim, 0.6));
        Case { spec, pack, qkv, d_o }
    }

    /// o and lse.
    fn forward(&self, qkv: &[f32]) -> [Vec<f32>; 2] {
        let (mut o, mut lse) = (nans(self.d_o.len()), nans(self.pack.rows() * self.spec.heads));
        naive::forward(&mut o, &mut lse, qkv, &self.pack.segments, &self.spec);
        [o, lse]
    }

    /// By the definition: the magnitudes that make up dq (ds·k), dk (ds·q) and dv (p·do), of which an operand in bf16 is off by
    /// 2^-8; and a little of those that made up ds, which is a difference of f32 sums.
    fn backward_limits(&self, o: &[f32], lse: &[f32]) -> Vec<f32> {
        let (e, qkv, mut limits) = (self.spec.head_dim, &self.qkv, vec![0.0; self.qkv.len()]);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let absolute = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f32>();
        for (segment, i, head) in naive::queries(&self.pack.segments, &self.spec) {
            let at = i * self.spec.heads + head;
            let (d_o, o) = (&self.d_o[at * e..][..e], &o[at * e..][..e]);
            let [q, ..] = naive::columns(i, head, &self.spec);
            for j in naive::keys(segment, i, &self.spec) {
                let [_, k, v] = naive::columns(j, head, &self.spec);
                let (s, slope) = naive::score(dot(&qkv[q..][..e], &qkv[k..][..e]), &self.spec);
                let p = (s - lse[at]).exp();
                let ds = p * slope * (dot(d_o, &qkv[v..][..e]) - dot(d_o, o)).abs();
                let ds = ds / 256.0 + 2e-6 * p * slope * (absolute(d_o, &qkv[v..][..e]) + absolute(d_o, o));
                for c in 0..e {
                    limits[q + c] += ds * qkv[k + c].abs();
                    limits[k + c] += ds * qkv[q + c].abs();
                    limits[v + c] += (1.0 / 256.0 + 2e-6) * p * d_o[c].abs();
                }
            }
        }
        limits
    }
}

/// What o may be off by: p is rounded to bf16, by 2^-8 of itself at most, and its products with v add up to o.
pub fn forward_limits(qkv: &[f32], spec: &AttentionSpec, forward: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
    let mut magnitudes = qkv.to_vec();
    let first = (spec.heads + spec.kv_heads) * spec.head_dim;
    magnitudes.chunks_mut(spec.width()).for_each(|row| row[first..].iter_mut().for_each(|v| *v = v.abs()));
    forward(&magnitudes).iter().map(|sum| (1.0 / 256.0 + 2e-6) * sum).collect()
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([o, lse], mut dqkv) = (self.forward(&self.qkv), nans(self.qkv.len()));
        naive::backward(&mut dqkv, &self.d_o, &o, &lse, &self.qkv, &self.pack.segments, &self.spec);
        Plain::from([("o", o), ("lse", lse), ("dqkv", dqkv)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, packing, [o, lse]) = (self.spec, &self.pack.on(ops), self.forward(&self.qkv));
        let (rows, columns) = (self.pack.rows(), spec.heads * spec.head_dim);
        let limits = [
            forward_limits(&self.qkv, &spec, |qkv| self.forward(qkv).into_iter().next().unwrap()),
            self.backward_limits(&o, &lse),
        ];
        let (qkv, d_o) = (&act(ops, spec.width(), &self.qkv), &act(ops, columns, &self.d_o));
        let (mut y, mut y_lse) = (unwritten(ops, rows, columns), unwritten(ops, rows, spec.heads));
        ops.attention_forward(AttentionForward { o: &mut y, lse: &mut y_lse, qkv, packing, spec }).unwrap();
        let (o, lse) = (&act(ops, columns, &o), &numbers(ops, spec.heads, &lse));
        let mut dqkv = unwritten(ops, rows, spec.width());
        ops.attention_backward(AttentionBackward { dqkv: &mut dqkv, d_o, o, lse, qkv, packing, spec }).unwrap();
        let (mut out, [o_limit, dqkv_limit]) = (Outputs::default(), limits);
        out.each(ops, "o", y, 1.0, o_limit);
        out.f32(ops, "lse", y_lse, 1e-6, 2e-6);
        out.each(ops, "dqkv", dqkv, 1.0, dqkv_limit);
        out
    }
}

fn cases() -> impl Iterator<Item = (&'static str, Case)> {
    let both = |spec| AttentionSpec { causal: false, ..spec };
    let window = |window, spec| AttentionSpec { window: Some(window), ..spec };
    let capped = |cap, spec| AttentionSpec { softcap: Some(cap), ..spec };
    let cases: Vec<(_, &[Group], _)> = vec![
        ("two heads of a group, 64", RAGGED, spec(4, 2, 64)),
        ("an odd group of five, 32", RAGGED, spec(5, 1, 32)),
        ("a window of 40, 32", RAGGED, window(40, spec(2, 2, 32))),
        ("softcap, 40", RAGGED, capped(2.0, spec(4, 1, 40))),
        ("a window of 300 over 530 keys, 8", &[(0, &[530])], window(300, spec(1, 1, 8))),
        ("both directions, 8", RAGGED, both(spec(2, 1, 8))),
        ("both directions, a window of 70 and softcap, 8", RAGGED, both(window(70, capped(3.0, spec(2, 2, 8))))),
        ("both directions, two heads of a group, 64", SEQUENCES, both(spec(2, 1, 64))),
        // The first tile's last key begins a strip of its own.
        ("both directions, a window of 66, 64", SEQUENCES, both(window(66, spec(2, 2, 64)))),
        ("both directions, a window of one, 8", SEQUENCES, both(window(1, spec(2, 1, 8)))),
        ("both directions, softcap, 40", SEQUENCES, both(capped(2.0, spec(2, 1, 40)))),
        ("both directions, a padded head of 136", &[(0, &[33]), (0, &[70])], both(spec(1, 1, 136))),
        // A lone row's lse is its one score: far below zero, where exp(0 − lse) of rows that are none is infinite.
        ("steep scores, 8", &[(0, &[1, 1, 1, 1, 1, 40])], AttentionSpec { scale: 40.0, ..spec(2, 1, 8) }),
        ("128", &[(70, &[65, 3]), (0, &[33])], spec(2, 1, 128)),
        ("a padded head of 136", &[(20, &[66]), (0, &[33])], spec(1, 1, 136)),
        ("one key/value head for all, 5", SMALL, spec(4, 1, 5)),
        ("a window of one, 6", SMALL, window(1, spec(4, 2, 6))),
    ];
    cases.into_iter().map(|(name, groups, spec)| (name, Case::new(groups, spec)))
}

#[test]
fn gradient() {
    for causal in [true, false] {
        for (window, softcap) in [(None, None), (Some(3), None), (None, Some(0.9)), (Some(2), Some(0.9))] {
            let case = Case::new(SMALL, AttentionSpec { causal, window, softcap, scale: 0.4, ..spec(2, 1, 4) });
            assert_slope(&case, ("o", &case.d_o), ("dqkv", &[]), |case| &mut case.qkv);
        }
    }
}

#[test]
fn naive() {
    cases().for_each(|(name, case)| assert_naive(name, &case, if case.spec.scale > 1.0 { 1e-3 } else { 1e-5 }, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    let on_device = |case: &Case| case.spec.head_dim.is_multiple_of(8);
    cases().filter(|(_, case)| on_device(case)).for_each(|(name, case)| assert_parity(name, &device, &case));
}

/// Rows that several blocks share out: a prompt of two tiles that 4230 rows see, the border between two answers' rows; and, in
/// both directions, more rows than one block walks that see every key of a long sequence.
#[test]
fn parity_of_shared_sums() {
    let Some(device) = device() else { return };
    assert_parity("many answers", &device, &Case::new(&[(70, &[130; 32]), (0, &[3])], spec(2, 1, 8)));
    let both = AttentionSpec { causal: false, ..spec(1, 1, 8) };
    assert_parity("a long sequence", &device, &Case::new(&[(0, &[3]), (0, &[4170])], both));
}

/// The prompt's rows and one answer's have the same bits as if there were no other sequence, and as if all others were NaN.
#[test]
fn invariance() {
    let window = AttentionSpec { window: Some(40), ..spec(2, 2, 32) };
    let capped = AttentionSpec { window: Some(6), softcap: Some(2.0), ..spec(4, 2, 8) };
    let both = [spec(2, 1, 64), window].map(|spec| AttentionSpec { causal: false, ..spec });
    for spec in [spec(4, 2, 64), window, capped].into_iter().chain(both) {
        invariance_on(&ares::backend::Cpu::new(), spec);
        device().iter().for_each(|device| invariance_on(device, spec));
    }
}

fn invariance_on<B: Ops>(ops: &B, spec: AttentionSpec) {
    let (packed, columns) = (Case::new(RAGGED, spec), spec.heads * spec.head_dim);
    let run = |case: &Case| {
        let (qkv, packing, rows) = (&act(ops, spec.width(), &case.qkv), &case.pack.on(ops), case.pack.rows());
        let (mut o, mut lse) = (unwritten(ops, rows, columns), unwritten(ops, rows, spec.heads));
        ops.attention_forward(AttentionForward { o: &mut o, lse: &mut lse, qkv, packing, spec }).unwrap();
        [read(ops, o), read(ops, lse)]
    };
    let [o, lse] = run(&packed);
    for segment in packed.pack.segments.iter().filter(|s| s.rows.start == 0 || s.rows.start >= s.prompt.end) {
        let rows: Vec<usize> = segment.prompt.clone().chain(segment.rows.clone()).collect();
        let alone = Case::new(&[(segment.prompt.len(), &[segment.rows.len()])], spec);
        let alone = Case { qkv: rows_of(&packed.qkv, spec.width(), &rows), ..alone };
        let [alone_o, alone_lse] = run(&alone);
        assert_eq!(bits(&alone_o), bits(&rows_of(&o, columns, &rows)), "{segment:?}: o");
        assert_eq!(bits(&alone_lse), bits(&rows_of(&lse, spec.heads, &rows)), "{segment:?}: lse");
        let mut broken = packed.clone();
        let others = broken.qkv.chunks_exact_mut(spec.width()).enumerate().filter(|(row, _)| !rows.contains(row));
        others.for_each(|(_, qkv)| qkv.fill(f32::NAN));
        let [o, lse] = run(&broken);
        assert_eq!(bits(&alone_o), bits(&rows_of(&o, columns, &rows)), "{segment:?}: o beside NaN");
        assert_eq!(bits(&alone_lse), bits(&rows_of(&lse, spec.heads, &rows)), "{segment:?}: lse beside NaN");
    }
}

#[test]
fn scores_beyond_the_exponential() {
    let spec = AttentionSpec { scale: 1.0, ..spec(1, 1, 2) };
    for size in [1e2, 1e3, 1e4] {
        // q, k, v per row: the last row's scores are ±size², its own key's 0.
        #[rustfmt::skip]
        let qkv = vec![
            size, 0.0,   size, 0.0,  1.0, 2.0,
            size, 0.0,  -size, 0.0,  3.0, 4.0,
            size, 0.0,  -size, 0.0,  5.0, 6.0,
            size, 0.0,    0.0, 0.0,  7.0, 8.0,
        ];
        let case = Case { qkv, d_o: vec![1.0; 8], ..Case::new(&[(2, &[2])], spec) };
        let out = toolkit::Case::run(&case, &ares::backend::Cpu::new());
        assert_eq!(out.named("o"), [1.0, 2.0].repeat(4), "the first key takes all");
        assert_eq!(out.named("lse"), [size * size; 4]);
        assert!(
            out.named("dqkv").iter().all(|v| v.is_finite()),
            "gradients at scores of {size}²: {:?}",
            out.named("dqkv")
        );
    }
}
