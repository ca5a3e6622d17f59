//! Batched generation with a KV cache. A finished sequence's slot is refilled at once; its prompt runs packed with those of
//! other newcomers, and its last prompt token is the first one decoded.

use std::collections::{BTreeMap, VecDeque};

use super::adapter::Adapter;
use super::batch::{AnswerTokens, Batch, Heads};
use super::config::ModelConfig;
use super::subject::{Decoding, Finish};
use super::transformer::Transformer;
use super::workspace::Workspace;
use crate::backend::Tensor;
use crate::error::Result;
use crate::ops::{History, KvCache, Ops, SampleSpec, SampleTable, SlotTable};

/// One sequence to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct Continue {
    /// At least one token; forced tokens of the answer stand at its end.
    pub tokens: Vec<u32>,
    /// How many of `tokens` belong to the answer.
    pub forced: usize,
    /// Keys this sequence's random numbers.
    pub id: u64,
}

/// What a sequence became.
#[derive(Debug, Clone, PartialEq)]
pub struct Continued {
    /// The answer's ids: forced ones, then new ones, the end-of-turn token included.
    pub tokens: Vec<u32>,
    pub(crate) finish: Finish,
}

/// Caches and tables for a fixed number of slots.
pub struct Generator<B: Ops> {
    caches: Vec<KvCache<B>>,
    table: SlotTable<B>,
    keys: SampleTable<B>,
    logits: Tensor<B, f32>, // (S, V)
    next: Tensor<B, u32>,   // (S, 1)
    history: History<B>,
    prefill: SlotTable<B>,
    /// One captured step per number of active slots, for one call of `generate`.
    graphs: BTreeMap<usize, B::Graph>,
    slots: usize,
    length: usize,
}

/// A slot at work.
struct Slot {
    index: usize,
    slot: u32,
    token: u32,
    position: u32,
}

impl<B: Ops> Generator<B> {
    /// `slots` sequences at a time, of at most `length` tokens each; prompts are read `prefill` rows at a time at most.
    pub fn new(ops: &B, config: &ModelConfig, slots: usize, length: usize, prefill: usize) -> Result<Self> {
        let caches = (0..config.layers).map(|l| ops.kv_cache(slots, length, config.block_spec(l).attention));
        Ok(Generator {
            caches: caches.collect::<Result<_>>()?,
            table: SlotTable::with_capacity(ops, slots)?,
            keys: SampleTable::with_capacity(ops, slots)?,
            logits: Tensor::zeros(ops, slots, config.vocab_size)?,
            next: Tensor::zeros(ops, slots, 1)?,
            history: History::with_capacity(ops, slots)?,
            prefill: SlotTable::with_capacity(ops, prefill)?,
            graphs: BTreeMap::new(),
            slots,
            length,
        })
    }

    /// Positions that a sequence may reach.
    pub(crate) fn length(&self) -> usize {
        self.length
    }
}

impl<B: Ops> Transformer<B> {
    /// Continues every request; results in order, the same at any number of slots. `done` is called with the number finished and
    /// may stop everything by an error.
    pub fn generate(
        &self,
        ws: &mut Workspace<B>,
        generator: &mut Generator<B>,
        requests: &[Continue],
        adapter: Option<&Adapter<B>>,
        decoding: &Decoding,
        mut done: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Continued>> {
        let _stage = crate::backend::stage(c"generate");
        // A captured step holds the adapter's memory and the sampling settings of its call.
        generator.graphs.clear();
        let start =
            |r: &Continue| Continued { tokens: r.tokens[r.tokens.len() - r.forced..].to_vec(), finish: Finish::Length };
        let mut results: Vec<Continued> = requests.iter().map(start).collect();
        let room = |r: &Continue| r.forced < decoding.max_new_tokens && r.tokens.len() < generator.length;
        let mut waiting: VecDeque<usize> = (0..requests.len()).filter(|&i| room(&requests[i])).collect();
        let mut free: Vec<u32> = (0..generator.slots as u32).rev().collect();
        let mut active: Vec<Slot> = Vec::new();
        let mut finished = requests.len() - waiting.len();
        let length = generator.length;
        let over = |result: &Continued, slot: &Slot| {
            let full = result.tokens.len() >= decoding.max_new_tokens || slot.position as usize + 1 >= length;
            result.finish == Finish::Stop || full
        };
        while !active.is_empty() || !waiting.is_empty() {
            self.admit(ws, generator, requests, adapter, &mut waiting, &mut free, &mut active)?;
            let missing = |slot: &Slot| decoding.max_new_tokens - results[slot.index].tokens.len();
            let most = active.iter().map(missing).max().unwrap_or_default();
            let columns = self.decode_burst(ws, generator, requests, adapter, decoding, &active, most)?;
            for (slot, tokens) in active.iter_mut().zip(columns) {
                let result = &mut results[slot.index];
                for token in tokens {
                    if over(result, slot) {
                        break; // what ran on for nothing
                    }
                    result.tokens.push(token);
                    (slot.token, slot.position) = (token, slot.position + 1);
                    if self.config.eos_token_ids.contains(&token) && !decoding.ignore_eos {
                        result.finish = Finish::Stop;
                    }
                }
            }
            active.retain(|slot| {
                let over = over(&results[slot.index], slot);
                if over {
                    free.push(slot.slot);
                    finished += 1;
                }
                !over
            });
            done(finished)?;
        }
        Ok(results)
    }

    /// Gives free slots to waiting requests and runs their prompts, all but the last token, into the caches.
    fn admit(
        &self,
        ws: &mut Workspace<B>,
        generator: &mut Generator<B>,
        requests: &[Continue],
        adapter: Option<&Adapter<B>>,
        waiting: &mut VecDeque<usize>,
        free: &mut Vec<u32>,
        active: &mut Vec<Slot>,
    ) -> Result<()> {
        // A few newcomers at a time make poor products: wait until a quarter of the slots is free.
        let enough = (generator.slots / 4).min(waiting.len()).max(1);
        if !active.is_empty() && free.len() < enough {
            return Ok(());
        }
        let limit = ws.capacity().min(generator.prefill.slots.capacity());
        while !waiting.is_empty() && !free.is_empty() {
            let mut batch = Batch::default();
            let (mut slots, mut positions) = (Vec::new(), Vec::new());
            while let (Some(&index), false) = (waiting.front(), free.is_empty()) {
                let tokens = &requests[index].tokens;
                let rows = tokens.len() - 1;
                if !batch.is_empty() && batch.len() + rows > limit {
                    break;
                }
                waiting.pop_front();
                let slot = free.pop().unwrap_or_default();
                batch.push(&[], &[AnswerTokens::new(&tokens[..rows])], Heads::Ends);
                slots.extend(std::iter::repeat_n(slot, rows));
                positions.extend(0..rows as u32);
                active.push(Slot { index, slot, token: tokens[rows], position: rows as u32 });
            }
            if batch.is_empty() {
                continue;
            }
            generator.prefill.set(&self.ops, &slots, &positions)?;
            self.prefill(ws, &mut generator.caches, &generator.prefill, &batch, adapter)?;
        }
        // Rows in order of slots: a captured graph would find the same layout again.
        active.sort_by_key(|slot| slot.slot);
        Ok(())
    }

    /// Packed forward that fills the caches: of the last block nothing but keys and values is wanted.
    fn prefill(
        &self,
        ws: &mut Workspace<B>,
        caches: &mut [KvCache<B>],
        table: &SlotTable<B>,
        batch: &Batch,
        adapter: Option<&Adapter<B>>,
    ) -> Result<()> {
        ws.load(&self.ops, batch)?;
        let Workspace { batch, saved, scratch, last, .. } = ws;
        let s = &mut saved[0];
        self.ops.embed(&mut s.x, &batch.tokens, &self.embed)?;
        for (l, (block, cache)) in self.blocks.iter().zip(caches).enumerate() {
            let lora = adapter.map(|a| &a.blocks[l]);
            if l + 1 < self.blocks.len() {
                block.forward(&self.ops, last, s, scratch, lora, &self.rope, &batch.packing)?;
            } else {
                block.qkv_forward(&self.ops, s, lora, &batch.packing.positions, &self.rope)?;
            }
            self.ops.cache_append(cache, &s.qkv, table, block.spec.attention)?;
            std::mem::swap(last, &mut s.x);
        }
        Ok(())
    }

    /// The next tokens of every active slot, as many steps as the backend takes at once, the caches have room for and anybody wants
    /// (`most`).
    fn decode_burst(
        &self,
        ws: &mut Workspace<B>,
        generator: &mut Generator<B>,
        requests: &[Continue],
        adapter: Option<&Adapter<B>>,
        decoding: &Decoding,
        active: &[Slot],
        most: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let ops = &self.ops;
        let column = |f: fn(&Slot) -> u32| active.iter().map(f).collect::<Vec<u32>>();
        let positions = column(|s| s.position);
        let ids: Vec<u64> = active.iter().map(|s| requests[s.index].id).collect();
        let drawn: Vec<u32> = positions.iter().map(|p| p + 1).collect();
        generator.table.set(ops, &column(|s| s.slot), &positions)?;
        generator.keys.set(ops, &ids, &drawn)?;
        generator.logits.set_rows(active.len())?;
        generator.next.set_rows(active.len())?;
        generator.history.clear(ops, active.len())?;
        ws.batch.tokens.refill(ops, &column(|s| s.token))?;
        ws.set_rows(active.len())?;
        ws.head.set_rows(active.len())?;
        let furthest = positions.iter().max().map_or(0, |p| *p as usize);
        let steps = B::BURST.min(most).min(generator.length.saturating_sub(furthest)).max(1);
        for _ in 0..steps {
            self.decode_step(ws, generator, adapter, decoding, active.len())?;
        }
        let history = generator.history.tokens.read(ops)?;
        Ok(history.chunks_exact(B::BURST).map(|row| row[..steps].to_vec()).collect())
    }

    /// One token for every active slot, left on the device. Everything that changes between steps lies in device memory, and
    /// buffers end where they began, so the step can be replayed.
    fn decode_step(
        &self,
        ws: &mut Workspace<B>,
        generator: &mut Generator<B>,
        adapter: Option<&Adapter<B>>,
        decoding: &Decoding,
        active: usize,
    ) -> Result<()> {
        let (ops, w) = (&self.ops, self.lm_weight()?);
        let Workspace { batch, saved, scratch, last, head, .. } = ws;
        let Generator { caches, table, keys, logits, next, history, graphs, .. } = generator;
        let s = &mut saved[0];
        let Decoding { temperature, top_k, top_p, seed, .. } = *decoding;
        ops.replay(graphs.entry(active).or_default(), || {
            ops.embed(&mut s.x, &batch.tokens, &self.embed)?;
            for (l, (block, cache)) in self.blocks.iter().zip(&mut *caches).enumerate() {
                let lora = adapter.map(|a| &a.blocks[l]);
                block.decode(ops, last, s, scratch, cache, lora, &self.rope, table)?;
                std::mem::swap(last, &mut s.x);
            }
            ops.norm_forward(&mut head.h, &mut head.rstd, &s.x, &self.norm, self.config.norm_spec())?;
            if self.blocks.len() % 2 == 1 {
                std::mem::swap(last, &mut s.x);
            }
            ops.sample(next, logits, &head.h, keys, w, SampleSpec { temperature, top_k, top_p, seed })?;
            ops.advance(history, &mut batch.tokens, &mut table.positions, &mut keys.positions, next)
        })
    }
}
