use std::ops::Range;

use rayon::prelude::*;

use super::{Decode, DecodeAttention, KvCache, SlotTable, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::attention::products::{LANES, multiply};
use crate::ops::product::{exp, folded, maximum, simd};
use crate::ops::{AttentionSpec, expect};

// Keys lie (slot, kv head, channel, position), so that scores are sums of contiguous columns; values lie
// (slot, kv head, position, channel). Rows of both are whole vectors long.

/// Numbers that are worth handing to another thread.
const SMALL: usize = 1 << 15;

/// Positions of a row of keys, and channels of a row of values.
fn strides(length: usize, spec: &AttentionSpec) -> (usize, usize) {
    (length.next_multiple_of(LANES), spec.head_dim.next_multiple_of(LANES))
}

impl Decode for Cpu {
    fn kv_cache(&self, slots: usize, length: usize, spec: AttentionSpec) -> Result<KvCache<Self>> {
        let (rows, (n, wide)) = (slots * spec.kv_heads, strides(length, &spec));
        let (k, v) = (Tensor::zeros(self, rows, n * spec.head_dim)?, Tensor::zeros(self, rows, n * wide)?);
        Ok(KvCache { k, v, slots, length, spec })
    }

    fn cache_append(&self, cache: &mut KvCache<Self>, qkv: &Tensor<Self>, table: &SlotTable<Self>) -> Result<()> {
        check(qkv, cache, table)?;
        let spec = cache.spec;
        let (e, (n, wide), width) = (spec.head_dim, strides(cache.length, &spec), spec.width());
        let rows = runs(&table.slots.buffer()[..qkv.rows()], cache.slots)?;
        // Slot by slot: what a thread writes, channels far apart, is its own; and first writes to fresh memory are expensive.
        let (keys, values) = (spec.kv_heads * n * e, spec.kv_heads * n * wide);
        let slots = cache.k.buffer.par_chunks_exact_mut(keys).zip(cache.v.buffer.par_chunks_exact_mut(values));
        let least = SMALL.div_ceil((qkv.rows() * width).div_ceil(cache.slots).max(1));
        slots.zip(rows).with_min_len(least).for_each(|((keys, values), rows)| {
            let positions = &table.positions.buffer()[rows.clone()];
            let rows = &qkv.buffer[rows.start * width..rows.end * width];
            let rows = || rows.chunks_exact(width).zip(positions.iter().map(|&position| position as usize));
            for kv in 0..spec.kv_heads {
                let (k, v) = ((spec.heads + kv) * e, (spec.heads + spec.kv_heads + kv) * e);
                for (c, keys) in keys[kv * e * n..].chunks_exact_mut(n).take(e).enumerate() {
                    rows().for_each(|(row, position)| keys[position] = row[k + c]);
                }
                let values = &mut values[kv * n * wide..];
                rows().for_each(|(row, position)| values[position * wide..][..e].copy_from_slice(&row[v..v + e]));
            }
        });
        Ok(())
    }

    fn decode_attention(&self, operands: DecodeAttention<Self>) -> Result<()> {
        let DecodeAttention { o, qkv, cache, table } = operands;
        check(qkv, cache, table)?;
        let spec = cache.spec;
        expect("decode", "o", o.shape(), (qkv.rows(), spec.heads * spec.head_dim))?;
        let (rows, width) = (qkv.rows(), spec.heads * spec.head_dim);
        let slots = table.slots.buffer()[..rows].par_iter().zip(&table.positions.buffer()[..rows]);
        let tasks = o.buffer[..rows * width].par_chunks_exact_mut(width).zip(slots).enumerate();
        tasks.with_min_len(4).for_each_init(Vec::new, |scratch, (t, (o, (&slot, &position)))| {
            let q = &qkv.buffer[t * spec.width()..][..width];
            attend(o, scratch, q, cache, (slot as usize, position as usize), &spec);
            self.store(o);
        });
        Ok(())
    }
}

/// The rows of each of `count` slots, which lie next to each other; `slots` are below `count`. Fails where they lie apart.
fn runs(slots: &[u32], count: usize) -> Result<Vec<Range<usize>>> {
    let mut runs = vec![0..0; count];
    for (t, &slot) in slots.iter().enumerate() {
        let run = &mut runs[slot as usize];
        if *run == (0..0) {
            *run = t..t;
        }
        expect("decode", "rows of a slot: the next", t, run.end)?;
        run.end += 1;
    }
    Ok(runs)
}

simd! {
    /// All query heads of one row, those of a key/value head together.
    fn attend<'a>(o: &'a mut [f32], scratch: &'a mut Vec<f32>, q: &'a [f32], cache: &'a KvCache<Cpu>, at: (usize, usize), spec: &'a AttentionSpec) {
        let ((slot, position), heads) = (at, spec.heads / spec.kv_heads);
        let (e, (n, wide)) = (spec.head_dim, strides(cache.length, spec));
        let seen = spec.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
        // Whole vectors that cover them.
        let (first, last) = (seen.start / LANES * LANES, seen.end.next_multiple_of(LANES));
        scratch.resize(heads * (n + wide + e), 0.0);
        let (scores, rest) = scratch.split_at_mut(heads * n);
        let (y, scaled) = rest.split_at_mut(heads * wide);
        let rows = o.chunks_exact_mut(heads * e).zip(q.chunks_exact(heads * e)).enumerate();
        for (kv, (o, q)) in rows {
            let row = slot * spec.kv_heads + kv;
            let (k, v) = (&cache.k.buffer[row * n * e..], &cache.v.buffer[row * n * wide..]);
            scaled.iter_mut().zip(q).for_each(|(to, q)| *to = spec.scale * q);
            multiply((&mut scores[first..], n), (scaled, e), (&k[first..], n), (heads, last - first), e, false);
            for scores in scores.chunks_mut(n) {
                softmax(&mut scores[first..last], seen.start - first..seen.end - first, spec.softcap);
            }
            let (scores, v) = (&scores[seen.start..], &v[seen.start * wide..]);
            multiply((y, wide), (scores, n), (v, wide), (heads, wide), seen.len(), false);
            for (o, y) in o.chunks_exact_mut(e).zip(y.chunks_exact(wide)) {
                o.copy_from_slice(&y[..e]);
            }
        }
    }
}

/// Scores of the keys `seen` become probabilities in place, those of the other keys zero; s is whole vectors long. Sums run in
/// sixteen parts by position.
#[inline(always)]
fn softmax(s: &mut [f32], seen: Range<usize>, softcap: Option<f32>) {
    if let Some(cap) = softcap {
        s[seen.clone()].iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
    s[..seen.start].fill(f32::NEG_INFINITY);
    s[seen.end..].fill(f32::NEG_INFINITY);
    let max = maximum(s);
    let mut sums = [0.0f32; LANES];
    for vector in s.chunks_exact_mut(LANES) {
        for l in 0..LANES {
            vector[l] = exp(vector[l] - max);
            sums[l] += vector[l];
        }
    }
    let inverse = 1.0 / folded(sums);
    s.iter_mut().for_each(|s| *s *= inverse);
}
