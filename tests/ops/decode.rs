//! Attention over the cache: every part of it filled to every border, at any occupancy, in any slot; a captured step.

use ares::backend::{Backend, Cpu, Tensor};
use ares::ops::decode::naive;
use ares::ops::{AttentionSpec, Decode, DecodeAttention, Ops, SlotTable};

use crate::attention::{forward_limits, spec};
use crate::toolkit::{self, *};

/// Positions of the longest sequence: two whole parts of the cache and some of a third.
const LENGTH: usize = 700;

/// Each sequence's decoded position: first and last of a part, one part to three.
const POSITIONS: [usize; 5] = [0, 255, 256, 5, 699];

#[derive(Clone)]
struct Case {
    spec: AttentionSpec,
    /// Rows q∣k∣v of each sequence up to the decoded one.
    sequences: Vec<Vec<f32>>,
    /// Runs of sequences that begin alike: how many, and for how many positions.
    shared: Vec<(usize, u32)>,
    /// Whether the keys and values of shared positions are given to the first of a run alone.
    once: bool,
    slots: usize,
    length: usize,
}

impl Case {
    fn new(spec: AttentionSpec) -> Case {
        let sequence = |(seed, position)| random(seed, (position + 1) * spec.width(), 1.2);
        let sequences: Vec<_> = (4..).zip(POSITIONS).map(sequence).collect();
        Case { spec, shared: vec![(1, 0); 5], sequences, once: false, slots: 5, length: LENGTH }
    }

    /// Five sequences that share two whole parts of the cache and some of a third, one alone, three that share one to its end,
    /// two that share less than a part.
    fn sharing(spec: AttentionSpec) -> Case {
        let (mut sequences, mut seed) = (Vec::new(), 40);
        let mut next = |positions: usize| {
            seed += 1;
            random(seed, positions * spec.width(), 1.2)
        };
        let shared = vec![(5, 520), (1, 0), (3, 256), (2, 200)];
        for &(count, common) in &shared {
            let prompt = next(common as usize);
            sequences.extend((0..count).map(|_| [prompt.clone(), next(30)].concat()));
        }
        Case { spec, sequences, shared, once: false, slots: 11, length: LENGTH }
    }

    fn forward(&self, sequence: &[f32]) -> Vec<f32> {
        let mut o = nans(self.spec.heads * self.spec.head_dim);
        naive::forward(&mut o, sequence, &self.spec);
        o
    }
}

fn table<B: Backend>(ops: &B, slots: &[u32], positions: &[u32]) -> SlotTable<B> {
    let mut table = SlotTable::with_capacity(ops, slots.len()).unwrap();
    table.set(ops, slots, positions).unwrap();
    table
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        Plain::from([("o", self.sequences.iter().flat_map(|sequence| self.forward(sequence)).collect())])
    }

    /// The earlier positions come at once, as a prompt does, the last ones together; sequences fill the slots from the last, which
    /// a broken sequence has left full of NaN.
    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (spec, width) = (self.spec, self.spec.width());
        let mut cache = ops.kv_cache(self.slots, self.length, spec).unwrap();
        let (mut last, mut slots, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let all: Vec<u32> = (0..self.length as u32).collect();
        for slot in 0..self.slots as u32 {
            let broken = act(ops, width, &nans(self.length * width));
            ops.cache_append(&mut cache, &broken, &table(ops, &vec![slot; self.length], &all)).unwrap();
        }
        // Of what is shared, whole strips of 16 positions.
        let elsewhere = |&(count, common): &(usize, u32)| (0..count).map(move |n| common / 16 * 16 * u32::from(n > 0));
        let elsewhere = self.shared.iter().flat_map(elsewhere);
        for ((slot, sequence), elsewhere) in (0..self.slots as u32).rev().zip(&self.sequences).zip(elsewhere) {
            let (earlier, newest) = sequence.split_at(sequence.len() - width);
            let (begin, end) = (if self.once { elsewhere } else { 0 }, (earlier.len() / width) as u32);
            if begin < end {
                let own = act(ops, width, &earlier[begin as usize * width..]);
                let before: Vec<u32> = (begin..end).collect();
                ops.cache_append(&mut cache, &own, &table(ops, &vec![slot; before.len()], &before)).unwrap();
            }
            last.extend(newest);
            slots.push(slot);
            positions.push(end);
        }
        let (mut table, qkv) = (table(ops, &slots, &positions), act(ops, width, &last));
        table.share(ops, self.shared.clone()).unwrap();
        let mut o = unwritten(ops, slots.len(), spec.heads * spec.head_dim);
        ops.cache_append(&mut cache, &qkv, &table).unwrap();
        ops.decode_attention(DecodeAttention { o: &mut o, qkv: &qkv, cache: &cache, table: &table }).unwrap();
        let limits = self.sequences.iter().flat_map(|s| forward_limits(s, &spec, |s| self.forward(s))).collect();
        let mut out = Outputs::default();
        out.each(ops, "o", o, 1.0, limits);
        out
    }
}

fn cases() -> Vec<(&'static str, Case)> {
    let alone = [
        ("64", spec(4, 2, 64)),
        ("eighteen heads of one, 16", spec(18, 1, 16)),
        ("a window of 300, 40", AttentionSpec { window: Some(300), ..spec(2, 2, 40) }),
        ("a window of 3, 8", AttentionSpec { window: Some(3), ..spec(2, 2, 8) }),
        ("softcap, 8", AttentionSpec { softcap: Some(2.0), ..spec(2, 1, 8) }),
        ("one head for all, 5", spec(4, 1, 5)),
        ("136", spec(2, 1, 136)),
    ];
    // Sixteen query heads fill a product: of five rows with three each, two with seven, one with nine; eighteen are two parts.
    let shared = [
        ("shared, 64", spec(6, 2, 64)),
        ("shared, seven heads of one, 8", spec(7, 1, 8)),
        ("shared, nine heads of one, 8", spec(9, 1, 8)),
        ("shared, eighteen heads of one, 16", spec(18, 1, 16)),
        ("shared, a window of 300, 40", AttentionSpec { window: Some(300), ..spec(2, 2, 40) }),
    ];
    let alone = alone.map(|(name, spec)| (name, Case::new(spec)));
    alone.into_iter().chain(shared.map(|(name, spec)| (name, Case::sharing(spec)))).collect()
}

#[test]
fn naive() {
    cases().into_iter().for_each(|(name, case)| assert_naive(name, &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    let on_device = |case: &Case| case.spec.head_dim.is_multiple_of(8);
    cases().iter().filter(|(_, case)| on_device(case)).for_each(|(name, case)| assert_parity(name, &device, case));
}

/// What is shared is read from the first of those that share it, and what comes of it is the same to the bit.
#[test]
fn a_prompt_is_read_once() {
    let Some(device) = device() else { return };
    for (name, case) in cases().into_iter().filter(|(name, _)| name.starts_with("shared")) {
        let o = |case: &Case| toolkit::Case::run(case, &device).named("o").to_vec();
        let alone = o(&Case { shared: vec![(1, 0); 11], ..case.clone() });
        assert_eq!(bits(&o(&Case { once: true, ..case })), bits(&alone), "{name}");
    }
}

/// A sequence sees neither the others nor its slot nor how long the cache is.
#[test]
fn invariance() {
    for spec in [spec(4, 2, 64), AttentionSpec { window: Some(6), softcap: Some(2.0), ..spec(4, 2, 8) }] {
        invariance_on(&Cpu::new(), spec);
        device().iter().for_each(|device| invariance_on(device, spec));
    }
}

fn invariance_on<B: Ops>(ops: &B, spec: AttentionSpec) {
    let (case, columns) = (Case::new(spec), spec.heads * spec.head_dim);
    let o = |case: &Case| toolkit::Case::run(case, ops).named("o").to_vec();
    let all = o(&case);
    let companies = [vec![0], vec![1], vec![2], vec![3], vec![4], vec![4, 2, 0], (0..5).rev().collect()];
    for (rows, slots, length) in
        companies.into_iter().zip([1, 5, 9].into_iter().cycle()).zip(700..).map(|((r, s), l)| (r, s, l))
    {
        let sequences: Vec<_> = rows.iter().map(|row: &usize| case.sequences[*row].clone()).collect();
        let shared = vec![(1, 0); rows.len()];
        let some = Case { slots: slots.max(sequences.len()), shared, length, sequences, ..case.clone() };
        assert_eq!(bits(&o(&some)), bits(&rows_of(&all, columns, &rows)), "sequences {rows:?}");
    }
}

#[test]
fn a_captured_decode_serves_later_positions() {
    let Some(device) = device() else { return };
    let case = Case::new(AttentionSpec { window: Some(400), ..spec(2, 1, 8) });
    let (history, spec, width) = (&case.sequences[4], case.spec, case.spec.width());
    let mut cache = device.kv_cache(1, LENGTH, spec).unwrap();
    let mut at = table(&device, &[0], &[0]);
    let mut qkv = act(&device, width, &history[..width]);
    let mut o: Tensor<_> = unwritten(&device, 1, spec.heads * spec.head_dim);
    let (mut graph, mut others) = (Default::default(), Vec::new());
    for position in 0..600 {
        let zeros = |columns| Tensor::<_, f32>::from_host(&device, 1, columns, &vec![0.0; columns]).unwrap();
        match position {
            // Right behind the scratch, which cannot grow where it is then.
            100 => others.push(zeros(8)),
            // More sequences move the scratch, whose address the captured step holds; others take its place.
            200 => {
                let sequences = vec![history[..width].to_vec(); 64];
                toolkit::Case::run(&Case { sequences, shared: vec![(1, 0); 64], slots: 64, ..case.clone() }, &device);
                others.extend((0..8).map(|_| zeros(64)));
            }
            _ => {}
        }
        at.set(&device, &[0], &[position as u32]).unwrap();
        qkv.write(&device, &device.activations(&history[position * width..][..width])).unwrap();
        let step = device.replay(&mut graph, || {
            device.cache_append(&mut cache, &qkv, &at)?;
            device.decode_attention(DecodeAttention { o: &mut o, qkv: &qkv, cache: &cache, table: &at })
        });
        step.unwrap();
        if [0, 255, 256, 599].contains(&position) {
            let found: Vec<f32> = o.read(&device).unwrap().into_iter().map(Into::into).collect();
            let sequences = vec![history[..(position + 1) * width].to_vec()];
            let alone = Case { sequences, shared: vec![(1, 0)], ..case.clone() };
            assert_eq!(found, toolkit::Case::run(&alone, &device).named("o"), "position {position}");
        }
    }
    assert!(
        others.iter().all(|other| other.read(&device).unwrap().iter().all(|&x| x == 0.0)),
        "memory of others was written"
    );
}
