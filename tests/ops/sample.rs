//! Sampling: the distribution that it promises, keyed by (seed, row id, position).

use ares::backend::Cpu;
use ares::ops::sample::naive;
use ares::ops::{Ops, SampleSpec, SampleTable, SampleTokens};

use crate::toolkit::{self, *};

const GREEDY: SampleSpec = SampleSpec { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 7 };
const FREE: SampleSpec = SampleSpec { temperature: 1.0, ..GREEDY };

#[derive(Clone)]
struct Case {
    spec: SampleSpec,
    cols: usize,
    h: Vec<f32>,
    w: Vec<f32>,
    keys: Vec<(u64, u32)>,
    softcap: Option<f32>,
}

impl Case {
    fn new(rows: usize, vocab: usize, spec: SampleSpec) -> Case {
        let cols = 24;
        let keys = (0..rows as u64).map(|i| (i * 3 + (i << 33), i as u32 % 5)).collect();
        Case { spec, cols, h: random(1, rows * cols, 1.0), w: random(2, vocab * cols, 0.4), keys, softcap: None }
    }

    /// One draw from the same logits for each key.
    fn of(logits: &[f32], keys: &[(u64, u32)], spec: SampleSpec) -> Case {
        Case { spec, cols: 1, h: vec![1.0; keys.len()], w: logits.to_vec(), keys: keys.to_vec(), softcap: None }
    }

    fn draw<B: Ops>(&self, ops: &B) -> Vec<u32> {
        let (rows, vocab) = (self.keys.len(), self.w.len() / self.cols);
        let mut table = SampleTable::with_capacity(ops, rows).unwrap();
        let (ids, positions): (Vec<u64>, Vec<u32>) = self.keys.iter().copied().unzip();
        table.set(ops, &ids, &positions).unwrap();
        let (mut tokens, mut logits) = (indices(ops, &vec![u32::MAX; rows]), unwritten(ops, rows, vocab));
        let (w, h) = (ops.weight(vocab, self.cols, self.w.clone()).unwrap(), act(ops, self.cols, &self.h));
        let (logits, softcap, spec) = (&mut logits, self.softcap, self.spec);
        ops.sample(SampleTokens { tokens: &mut tokens, logits, h: &h, table: &table, w: &w, softcap, spec }).unwrap();
        tokens.read(ops).unwrap()
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let (ids, positions): (Vec<u64>, Vec<u32>) = self.keys.iter().copied().unzip();
        let mut tokens = vec![u32::MAX; ids.len()];
        naive::forward(&mut tokens, &self.h, &ids, &positions, &self.w, self.softcap, self.spec);
        Plain::from([("tokens", tokens.iter().map(|token| *token as f32).collect())])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let tokens: Vec<f32> = self.draw(ops).iter().map(|token| *token as f32).collect();
        let mut out = Outputs::default();
        out.f32(ops, "tokens", numbers(ops, 1, &tokens), 0.0, 0.0);
        out
    }
}

fn specs() -> [SampleSpec; 8] {
    [
        GREEDY,
        FREE,
        SampleSpec { temperature: 0.6, ..FREE },
        SampleSpec { temperature: 1.7, top_k: 5, ..FREE },
        SampleSpec { top_p: 0.7, ..FREE },
        SampleSpec { temperature: 0.8, top_k: 9, top_p: 0.55, ..FREE },
        SampleSpec { top_p: 1e-9, ..FREE },
        SampleSpec { top_k: 100, ..FREE },
    ]
}

#[test]
fn naive() {
    for spec in specs() {
        [5, 300, 1030]
            .into_iter()
            .for_each(|vocab| assert_naive(&format!("{spec:?}"), &Case::new(33, vocab, spec), 0.0, 0.0));
        let capped = Case { softcap: Some(1.3), ..Case::new(33, 300, spec) };
        assert_naive(&format!("{spec:?}, capped"), &capped, 0.0, 0.0);
    }
}

/// A draw that falls within rounding of a border may go to the neighbour. (What top-k and top-p keep, a device draws in an order of
/// its own: the distribution is what agrees.)
#[test]
fn parity() {
    let Some(device) = device() else { return };
    for spec in &specs()[..3] {
        for (vocab, softcap) in [(5, None), (300, Some(1.3)), (1030, None)] {
            let case = Case { softcap, ..Case::new(33, vocab, *spec) };
            let (found, expected) = (case.draw(&device), case.draw(&Cpu::rounded()));
            let same = found.iter().zip(&expected).filter(|(f, e)| f == e).count();
            assert!(same + 1 >= 33, "{spec:?} of {vocab}: {found:?} against {expected:?}");
        }
    }
}

#[test]
fn invariance() {
    for spec in [GREEDY, SampleSpec { top_k: 50, top_p: 0.9, ..FREE }] {
        let all = Case::new(ROWS, 310, spec);
        assert_alone("sample", &|rows: &[usize]| Case {
            h: rows_of(&all.h, all.cols, rows),
            keys: rows.iter().map(|r| all.keys[*r]).collect(),
            ..all.clone()
        });
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_on_a_tie() {
    let keys = [(0, 0), (9, 4)];
    for (logits, expected) in [([0.1, 2.0, -1.0, 1.9], 1), ([0.1, 2.0, -1.0, 2.0], 1), ([-5.0, -4.0, -5.0, -5.0], 1)] {
        assert_eq!(Case::of(&logits, &keys, GREEDY).draw(&Cpu::new()), [expected; 2]);
    }
    // More logits than one per thread; the largest appears a hundred times, first at id 3.
    let logits: Vec<f32> = (0..2003).map(|id| if id % 7 == 3 { 1.0 } else { -1.0 }).collect();
    let Some(device) = device() else { return };
    assert_eq!(Case::of(&logits, &keys, GREEDY).draw(&device), [3, 3]);
}

/// In rows 1 and 4 no logit is a number, then one of every row: what is left would give a token all the same.
#[test]
fn no_token_where_a_logit_is_not_finite() {
    for (spec, softcap) in specs().into_iter().zip([None, Some(1.3)].into_iter().cycle()) {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let sound = Case { softcap, ..Case::new(6, 310, spec) };
            let mut rows = sound.clone();
            rows.h[rows.cols] = broken;
            rows.h[4 * rows.cols..][..rows.cols].fill(broken);
            // Weights are finite, their products with h beyond f32 at one id.
            let mut logits = Case::of(&random(3, 310, 0.2), &sound.keys, spec);
            (logits.h, logits.softcap) = (vec![3e38; 6], softcap);
            logits.w[299] = if broken < 0.0 { -2.0 } else { 2.0 };
            none_of(&Cpu::new(), [&sound, &rows, &logits]);
            device().iter().for_each(|device| none_of(device, [&sound, &rows, &logits]));
            let naive = |case: &Case| toolkit::Case::naive(case)["tokens"].clone();
            let mut expected = naive(&sound);
            [1, 4].into_iter().for_each(|row| expected[row] = 310.0);
            assert_eq!((naive(&rows), naive(&logits)), (expected, vec![310.0; 6]), "naive: {spec:?}, {broken}");
        }
    }
}

fn none_of<B: Ops>(ops: &B, [sound, rows, logits]: [&Case; 3]) {
    let mut expected = sound.draw(ops);
    [1, 4].into_iter().for_each(|row| expected[row] = 310);
    assert_eq!((rows.draw(ops), logits.draw(ops)), (expected, vec![310; 6]), "{:?}, {}", rows.spec, logits.w[299]);
}

/// On the CPU, keyed once by the row's id, once by its high half, once by the position; then on the device.
#[test]
fn draws_follow_the_distribution() {
    let logits = random(3, 23, 1.2);
    for spec in &specs()[1..] {
        let keyings: [fn(u64) -> (u64, u32); 3] = [|i| (i, 5), |i| (3, i as u32), |i| (i << 32, 0)];
        keyings.into_iter().for_each(|key| follows(&Cpu::new(), &logits, 20_000, key, *spec));
        device().iter().for_each(|device| follows(device, &logits, 200, |i| (i, 5), *spec));
    }
}

fn follows<B: Ops>(ops: &B, logits: &[f32], draws: u64, key: fn(u64) -> (u64, u32), spec: SampleSpec) {
    let keys: Vec<_> = (0..draws).map(key).collect();
    let mut counts = vec![0u64; logits.len()];
    Case::of(logits, &keys, spec).draw(ops).iter().for_each(|token| counts[*token as usize] += 1);
    let mut expected = vec![0.0; logits.len()];
    naive::distribution(logits, spec).into_iter().for_each(|(id, p)| expected[id as usize] = p);
    for (id, (count, p)) in counts.into_iter().zip(expected).enumerate() {
        // Five standard deviations; what may not be drawn is never drawn.
        let (found, limit) = (count as f64 / draws as f64, 5.0 * (p * (1.0 - p).max(0.0) / draws as f64).sqrt());
        assert!((found - p).abs() <= limit + 1e-12, "{spec:?}: {id} in {found} of draws, expected {p} ± {limit}");
    }
}

/// Over more ids than one per thread, with equal weights on both sides of the border, in several warps' ids.
#[test]
fn the_first_of_equals_are_kept() {
    let mut ties = random(5, 3001, 1.0);
    [2990, 17].into_iter().for_each(|id| ties[id] = 5.0);
    [5, 1000, 2047, 2999].into_iter().for_each(|id| ties[id] = 4.0);
    let (flat, steep) = (vec![0.25; 3001], (0..3001).map(|id| (id * 7 % 3001) as f32 * -0.03).collect());
    // Near each other, so that a sum that is not exact ends elsewhere: half of the mass is 20 of these 40, and a little.
    let mut near = vec![-40.0; 3001];
    (0..40).for_each(|i| near[73 * i + 5] = -0.0015 * i as f32);
    let keep = |top_k, top_p| SampleSpec { top_k, top_p, ..FREE };
    let cases = [
        (&ties, keep(4, 1.0)),
        (&ties, keep(4, 0.6)),
        (&ties, keep(0, 0.05)),
        (&flat, keep(3, 1.0)),
        (&flat, keep(0, 0.001)),
        (&flat, keep(3, 0.5)),
        (&steep, keep(5, 1.0)),
        (&steep, keep(1, 1.0)),
        (&steep, keep(0, 0.2)),
        (&steep, keep(2900, 0.1)),
        (&near, keep(0, 0.5076)),
        (&near, keep(0, 0.5074)),
        (&flat, keep(0, 0.0)),
    ];
    let keys: Vec<_> = (0..200).map(|i| (i, 0)).collect();
    let Some(device) = device() else { return };
    for (logits, spec) in cases {
        let kept = naive::distribution(logits, spec);
        let drawn = Case::of(logits, &keys, spec).draw(&device);
        let stray = drawn.iter().find(|token| kept.iter().all(|(id, _)| id != *token));
        let missed = kept.iter().find(|(id, p)| *p > 0.04 && !drawn.contains(id));
        assert_eq!((stray, missed), (None, None), "{spec:?} keeps {kept:?}");
    }
}

#[test]
fn both_halves_of_the_seed_count() {
    let (logits, keys) = (random(4, 97, 0.6), (0..70).map(|i| (i, 0)).collect::<Vec<_>>());
    let draw = |seed| Case::of(&logits, &keys, SampleSpec { seed, ..FREE }).draw(&Cpu::new());
    for seed in [8, 7 + (1 << 32)] {
        assert!(draw(seed).iter().zip(draw(7)).filter(|(a, b)| *a != b).count() > 40);
    }
}
