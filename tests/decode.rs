//! Generation's own operations: attention through the cache = packed attention on the same tokens; sampling = the
//! distribution it promises, keyed by (seed, row id, position).

#[path = "common/mod.rs"]
mod common;

use ares::backend::{Backend, Cpu, Tensor};
use ares::ops::{Attention, AttentionSpec, Decode, Packing, Sample, SampleSpec, SampleTable, SlotTable};
use common::*;

fn spec() -> AttentionSpec {
    AttentionSpec { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, window: None, softcap: None, causal: true }
}

fn rows_of(values: &[f32], cols: usize, rows: impl Iterator<Item = usize>) -> Vec<f32> {
    rows.flat_map(|row| values[row * cols..][..cols].iter().copied()).collect()
}

fn table(slots: &[u32], positions: &[u32]) -> SlotTable<Cpu> {
    let mut table = SlotTable::with_capacity(&Cpu::new(), slots.len() + 3).unwrap();
    table.set(&Cpu::new(), slots, positions).unwrap();
    table
}

/// Feeds two interleaved sequences through a cache of four slots that holds NaN, and returns o of every packed row.
fn decoded(qkv: &[f32], packing: &Packing<Cpu>, spec: AttentionSpec) -> Vec<f32> {
    let (cpu, width, columns) = (Cpu::new(), spec.width(), spec.heads * spec.head_dim);
    let mut cache = cpu.kv_cache(4, 16, spec).unwrap();
    cache.k.buffer.fill(f32::NAN);
    cache.v.buffer.fill(f32::NAN);
    let slots = [2u32, 0];
    let mut found = vec![f32::NAN; packing.rows() * columns];
    // The first three positions of each come at once, as a prompt does; then one row per sequence and step.
    let starts: Vec<usize> = packing.segments.iter().map(|s| s.rows.start).collect();
    let lengths: Vec<usize> = packing.segments.iter().map(|s| s.rows.len()).collect();
    let longest = lengths.iter().copied().max().unwrap();
    let mut steps: Vec<Vec<(usize, u32)>> = vec![(0..2).flat_map(|s| (0..3).map(move |p| (s, p))).collect()];
    steps.extend((3..longest as u32).map(|p| (0..2).filter(|s| (p as usize) < lengths[*s]).map(|s| (s, p)).collect()));
    for step in steps {
        let rows: Vec<usize> = step.iter().map(|(s, p)| starts[*s] + *p as usize).collect();
        let slots: Vec<u32> = step.iter().map(|(s, _)| slots[*s]).collect();
        let table = table(&slots, &step.iter().map(|(_, p)| *p).collect::<Vec<_>>());
        let input = tensor(width, &rows_of(qkv, width, rows.iter().copied()));
        cpu.cache_append(&mut cache, &input, &table, spec).unwrap();
        let mut o = nans(rows.len(), columns);
        cpu.decode_attention(&mut o, &input, &cache, &table, spec).unwrap();
        for (o, row) in values(&o).chunks(columns).zip(rows) {
            found[row * columns..][..columns].copy_from_slice(o);
        }
    }
    found
}

#[test]
fn decode_attention_is_packed_attention() {
    let packing = packing(&[(0, &[13]), (0, &[8])]);
    let kinds = [
        spec(),
        AttentionSpec { window: Some(4), ..spec() },
        AttentionSpec { softcap: Some(0.9), ..spec() },
        AttentionSpec { kv_heads: 1, head_dim: 5, ..spec() },
    ];
    for spec in kinds {
        let qkv: Vec<f32> = noise(1, packing.rows() * spec.width()).iter().map(|v| 2.0 * v).collect();
        let mut o = nans(packing.rows(), spec.heads * spec.head_dim);
        let mut lse = nans(packing.rows(), spec.heads);
        Cpu::new().attention_forward(&mut o, &mut lse, &tensor(spec.width(), &qkv), &packing, spec).unwrap();
        let expected: Vec<f64> = values(&o).iter().map(|o| f64::from(*o)).collect();
        assert_close(&format!("{spec:?}"), &decoded(&qkv, &packing, spec), &expected, 1e-6);
    }
}

const GREEDY: SampleSpec = SampleSpec { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 7 };

/// Draws one token per (row id, position) from the same logits.
fn draw(logits: &[f32], keys: &[(u64, u32)], spec: SampleSpec) -> Vec<u32> {
    let (cpu, vocab, rows) = (Cpu::new(), logits.len(), keys.len());
    let mut table = SampleTable::with_capacity(&cpu, rows).unwrap();
    let (ids, positions): (Vec<u64>, Vec<u32>) = keys.iter().copied().unzip();
    table.set(&cpu, &ids, &positions).unwrap();
    let mut tokens = Tensor::from_host(&cpu, rows, 1, &vec![u32::MAX; rows]).unwrap();
    let (mut scratch, h) = (nans(rows, vocab), tensor(1, &vec![1.0; rows]));
    let w: <Cpu as Backend>::Weight = weight(vocab, logits);
    cpu.sample(&mut tokens, &mut scratch, &h, &table, &w, spec).unwrap();
    tokens.buffer
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_on_a_tie() {
    let keys = [(0, 0), (9, 4)];
    assert_eq!(draw(&[0.1, 2.0, -1.0, 1.9], &keys, GREEDY), [1, 1]);
    assert_eq!(draw(&[0.1, 2.0, -1.0, 2.0], &keys, GREEDY), [1, 1]);
    assert_eq!(draw(&[-5.0, -4.0], &keys, GREEDY), [1, 1]);
}

/// What may be drawn and how often: temperature, then top-k, then top-p over what is left.
fn distribution(logits: &[f32], spec: SampleSpec) -> Vec<f64> {
    let weight = |l: f32| (f64::from(l) / f64::from(spec.temperature)).exp();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    if spec.top_k > 0 {
        order.truncate(spec.top_k);
    }
    let all: f64 = order.iter().map(|i| weight(logits[*i])).sum();
    let mut reached = 0.0;
    order.retain(|i| {
        let keep = reached < f64::from(spec.top_p) * all;
        reached += weight(logits[*i]);
        keep
    });
    let kept: f64 = order.iter().map(|i| weight(logits[*i])).sum();
    (0..logits.len()).map(|i| if order.contains(&i) { weight(logits[i]) / kept } else { 0.0 }).collect()
}

#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u64 = 20_000;
    let logits: Vec<f32> = noise(3, 23).iter().map(|v| 2.0 * v).collect();
    let free = SampleSpec { temperature: 1.0, ..GREEDY };
    let specs = [
        free,
        SampleSpec { temperature: 0.6, ..free },
        SampleSpec { temperature: 1.7, top_k: 5, ..free },
        SampleSpec { top_p: 0.7, ..free },
        SampleSpec { temperature: 0.8, top_k: 9, top_p: 0.55, ..free },
        SampleSpec { top_p: 1e-9, ..free },
        SampleSpec { top_k: 100, ..free },
    ];
    for spec in specs {
        let expected = distribution(&logits, spec);
        // Keyed once by the row's id, once by the position.
        let keyings: [fn(u64) -> (u64, u32); 3] = [|i| (i, 5), |i| (3, i as u32), |i| (i << 32, 0)];
        for keys in keyings {
            let keys: Vec<(u64, u32)> = (0..DRAWS).map(keys).collect();
            let mut counts = vec![0u64; logits.len()];
            draw(&logits, &keys, spec).iter().for_each(|token| counts[*token as usize] += 1);
            for (id, (&count, &p)) in counts.iter().zip(&expected).enumerate() {
                // Five standard deviations; what may not be drawn is never drawn.
                let limit = 5.0 * (p * (1.0 - p) / DRAWS as f64).sqrt();
                let found = count as f64 / DRAWS as f64;
                assert!((found - p).abs() <= limit, "{spec:?}: token {id} in {found} of draws, expected {p} ± {limit}");
            }
        }
    }
}

#[test]
fn a_draw_knows_its_key_and_nothing_else() {
    let logits = noise(4, 97);
    let spec = SampleSpec { temperature: 1.0, ..GREEDY };
    let keys: Vec<(u64, u32)> = (0..70).map(|i| (i * 0x1_0000_0003, (i * 11 % 13) as u32)).collect();
    let all = draw(&logits, &keys, spec);
    for (i, key) in keys.iter().enumerate() {
        assert_eq!(draw(&logits, &[*key], spec), [all[i]], "alone");
    }
    let reversed: Vec<_> = keys.iter().rev().copied().collect();
    let mut again = draw(&logits, &reversed, spec);
    again.reverse();
    assert_eq!(again, all, "in another order");
    // Every part of the key counts: seed, both halves of the id, position.
    let differs = |other: Vec<u32>| assert!(other.iter().zip(&all).filter(|(a, b)| a != b).count() > 40);
    differs(draw(&logits, &keys, SampleSpec { seed: 8, ..spec }));
    differs(draw(&logits, &keys, SampleSpec { seed: 7 + (1 << 32), ..spec }));
    differs(draw(&logits, &keys.iter().map(|(id, p)| (id + 1, *p)).collect::<Vec<_>>(), spec));
    differs(draw(&logits, &keys.iter().map(|(id, p)| (id ^ (1 << 50), *p)).collect::<Vec<_>>(), spec));
    differs(draw(&logits, &keys.iter().map(|(id, p)| (*id, p + 1)).collect::<Vec<_>>(), spec));
}
