//! Attention over the cache: every part of it filled to every border, against the reference; a row's bits at any occupancy;
//! a captured step at later positions.

use ares::backend::{Backend, Cpu, Real, Tensor};
use ares::ops::{AttentionSpec, Decode, SlotTable};

use crate::attention::{assert_products, spec, with_magnitudes};
use crate::harness::*;

/// Positions of a slot: two whole parts of the cache and some of a third.
const LENGTH: usize = 700;
const SLOTS: usize = 5;
/// Slot and position of each decoded row: first and last of a part, one part to three.
const DECODED: &[(u32, u32)] = &[(3, 0), (0, 255), (4, 256), (1, 5), (2, 699)];

fn table<B: Backend>(ops: &B, slots: &[u32], positions: &[u32]) -> SlotTable<B> {
    let mut table = SlotTable::with_capacity(ops, slots.len()).unwrap();
    table.set(ops, slots, positions).unwrap();
    table
}

/// Rows q∣k∣v of every position of every slot.
fn history(spec: &AttentionSpec) -> Vec<f32> {
    random(4, SLOTS * LENGTH * spec.width(), 1.2)
}

/// o of the rows of `decoded`, together, after all earlier positions of their slots.
fn decode<B: Decode>(ops: &B, history: &[f32], decoded: &[(u32, u32)], spec: AttentionSpec) -> Vec<f32> {
    let width = spec.width();
    let rows = |slot: u32, from: u32, to: u32| {
        let first = slot as usize * LENGTH;
        &history[(first + from as usize) * width..(first + to as usize) * width]
    };
    let mut cache = ops.kv_cache(SLOTS, LENGTH, spec).unwrap();
    for &(slot, position) in decoded.iter().filter(|d| d.1 > 0) {
        let earlier: Vec<u32> = (0..position).collect();
        let qkv = act(ops, earlier.len(), width, rows(slot, 0, position));
        ops.cache_append(&mut cache, &qkv, &table(ops, &vec![slot; earlier.len()], &earlier), spec).unwrap();
    }
    let (slots, positions): (Vec<u32>, Vec<u32>) = decoded.iter().copied().unzip();
    let table = table(ops, &slots, &positions);
    let last: Vec<f32> = decoded.iter().flat_map(|d| rows(d.0, d.1, d.1 + 1).to_vec()).collect();
    let qkv = act(ops, decoded.len(), width, &last);
    ops.cache_append(&mut cache, &qkv, &table, spec).unwrap();
    let mut o = unwritten(ops, decoded.len(), spec.heads * spec.head_dim);
    ops.decode_attention(&mut o, &qkv, &cache, &table, spec).unwrap();
    read(ops, &o)
}

#[test]
fn decode_is_the_reference() {
    let Some(device) = device() else { return };
    for (name, spec) in [
        ("64", spec(4, 2, 64)),
        ("eighteen heads of one, 16", spec(18, 1, 16)),
        ("a window of 300, 40", AttentionSpec { window: Some(300), ..spec(2, 2, 40) }),
        ("a window of 3, 8", AttentionSpec { window: Some(3), ..spec(2, 2, 8) }),
        ("softcap, 8", AttentionSpec { softcap: Some(2.0), ..spec(2, 1, 8) }),
        ("136", spec(2, 1, 136)),
    ] {
        let history = history(&spec);
        let magnitudes = decode(&Cpu::new(), &with_magnitudes(&history, &spec), DECODED, spec);
        let slack: Vec<f32> = magnitudes.iter().map(|m| 2e-6 * m).collect();
        let (found, expected) =
            (decode(&device, &history, DECODED, spec), decode(&reference(), &history, DECODED, spec));
        assert_products(&format!("{name}: o"), &found, &expected, &magnitudes, &slack);
    }
}

#[test]
fn a_decoded_row_alone_has_the_same_bits() {
    let Some(device) = device() else { return };
    let spec = spec(4, 2, 64);
    let (history, columns) = (history(&spec), spec.heads * spec.head_dim);
    let together = decode(&device, &history, DECODED, spec);
    for (row, together) in DECODED.iter().zip(together.chunks(columns)) {
        assert_eq!(decode(&device, &history, &[*row], spec), together, "{row:?}");
    }
}

#[test]
fn a_captured_decode_serves_later_positions() {
    let Some(device) = device() else { return };
    let spec = AttentionSpec { window: Some(400), ..spec(2, 1, 8) };
    let (history, width) = (history(&spec), spec.width());
    let mut cache = device.kv_cache(1, LENGTH, spec).unwrap();
    let mut at: SlotTable<_> = table(&device, &[0], &[0]);
    let mut qkv = act(&device, 1, width, &history[..width]);
    let mut o: Tensor<_> = unwritten(&device, 1, spec.heads * spec.head_dim);
    let mut graph = Default::default();
    for position in 0..600 {
        at.set(&device, &[0], &[position as u32]).unwrap();
        qkv.write(&device, &device.activations(&history[position * width..][..width])).unwrap();
        let step = device.replay(&mut graph, || {
            device.cache_append(&mut cache, &qkv, &at, spec)?;
            device.decode_attention(&mut o, &qkv, &cache, &at, spec)
        });
        step.unwrap();
        if [0, 255, 256, 599].contains(&position) {
            let found: Vec<f32> = o.read(&device).unwrap().into_iter().map(Real::to_f32).collect();
            assert_eq!(found, decode(&device, &history, &[(0, position as u32)], spec), "position {position}");
        }
    }
}
