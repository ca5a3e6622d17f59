use rayon::prelude::*;

use super::{Decode, KvCache, SlotTable, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::attention::cpu::{heads_of, softmax, weighted_columns, weighted_rows};
use crate::ops::product::simd;
use crate::ops::{AttentionSpec, expect};

// Keys lie (slot, kv head, channel, position), so that scores are sums of contiguous columns; values lie
// (slot, kv head, position, channel).

impl Decode for Cpu {
    fn kv_cache(&self, slots: usize, length: usize, spec: AttentionSpec) -> Result<KvCache<Self>> {
        let rows = slots * spec.kv_heads;
        let zeros = || Tensor::zeros(self, rows, length * spec.head_dim);
        Ok(KvCache { k: zeros()?, v: zeros()?, slots, length })
    }

    fn cache_append(
        &self,
        cache: &mut KvCache<Self>,
        qkv: &Tensor<Self>,
        table: &SlotTable<Self>,
        spec: AttentionSpec,
    ) -> Result<()> {
        check(qkv, table, &spec)?;
        let (e, n, width) = (spec.head_dim, cache.length, spec.width());
        let mut of_slot = vec![Vec::new(); cache.slots];
        let rows = qkv.buffer.chunks_exact(width).take(qkv.rows());
        for ((row, &slot), &position) in rows.zip(&table.slots.buffer).zip(&table.positions.buffer) {
            of_slot[slot as usize].push((row, position as usize));
        }
        // Slot by slot: what a thread writes, channels far apart, is its own; and first writes to fresh memory are dear.
        let size = spec.kv_heads * n * e;
        let slots = cache.k.buffer.par_chunks_exact_mut(size).zip(cache.v.buffer.par_chunks_exact_mut(size));
        slots.zip(&of_slot).with_min_len(4).for_each(|((keys, values), rows)| {
            for &(row, position) in rows {
                for kv in 0..spec.kv_heads {
                    let k = &row[(spec.heads + kv) * e..][..e];
                    let v = &row[(spec.heads + spec.kv_heads + kv) * e..][..e];
                    k.iter().enumerate().for_each(|(c, k)| keys[(kv * e + c) * n + position] = *k);
                    values[(kv * n + position) * e..][..e].copy_from_slice(v);
                }
            }
        });
        Ok(())
    }

    fn decode_attention(
        &self,
        o: &mut Tensor<Self>,
        qkv: &Tensor<Self>,
        cache: &KvCache<Self>,
        table: &SlotTable<Self>,
        spec: AttentionSpec,
    ) -> Result<()> {
        check(qkv, table, &spec)?;
        expect("decode", "o", o.shape(), (qkv.rows(), spec.heads * spec.head_dim))?;
        let (rows, width) = (qkv.rows(), spec.heads * spec.head_dim);
        let slots = table.slots.buffer[..rows].par_iter().zip(&table.positions.buffer[..rows]);
        let tasks = o.buffer[..rows * width].par_chunks_exact_mut(width).zip(slots).enumerate();
        tasks.with_min_len(4).for_each(|(t, (o, (&slot, &position)))| {
            let q = &qkv.buffer[t * spec.width()..][..width];
            attend(o, q, cache, slot as usize, position as usize, &spec);
            self.store(o);
        });
        Ok(())
    }
}

simd! {
    fn attend<'a>(o: &'a mut [f32], q: &'a [f32], cache: &'a KvCache<Cpu>, slot: usize, position: usize, spec: &'a AttentionSpec) {
        let (e, n) = (spec.head_dim, cache.length);
        let first = spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut scores = vec![0.0; position + 1 - first];
        for kv in 0..spec.kv_heads {
            let at = (slot * spec.kv_heads + kv) * n * e;
            for head in heads_of(kv, spec) {
                weighted_columns(&mut scores, &q[head * e..][..e], &cache.k.buffer[at + first..], n, spec.scale);
                softmax(&mut scores, spec.softcap);
                weighted_rows(&mut o[head * e..][..e], &scores, &cache.v.buffer[at + first * e..], e);
            }
        }
    }
}
