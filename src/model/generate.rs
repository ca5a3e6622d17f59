//! Batched generation with a KV cache. A finished sequence's slot is refilled at once; its prompt runs packed with those of
//! other newcomers, and its last prompt token is the first one decoded. Answers to one prompt that follow each other read it once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::adapter::Adapter;
use super::batch::{AnswerTokens, Batch, Heads};
use super::block::Keys;
use super::config::ModelConfig;
use super::lanes::side_by_side;
use super::subject::{Decoding, Finish};
use super::transformer::Transformer;
use super::workspace::{Stream, Workspace};
use crate::backend::{Indices, Tensor};
use crate::error::Result;
use crate::ops::{Advance, History, KvCache, NormForward, Ops, SampleSpec, SampleTable, SampleTokens, SlotTable};

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
    /// It ends here because its next token's logits were not all finite.
    pub broken: bool,
}

/// Caches and tables for a fixed number of slots.
pub struct Generator<B: Ops> {
    caches: Vec<KvCache<B>>,
    table: SlotTable<B>,
    keys: SampleTable<B>,
    logits: Tensor<B, f32>, // (S, V)
    next: Indices<B>,       // (S, 1)
    history: History<B>,
    /// Where prompts go: what was read once goes to a slot of each table.
    prefill: Vec<SlotTable<B>>,
    /// Rows that are read at a time.
    reading: usize,
    /// One captured step per number of rows, for one call of `generate`.
    graphs: BTreeMap<usize, B::Graph>,
    slots: usize,
    /// Positions that a sequence may reach.
    pub(super) length: usize,
}

/// A slot at work.
struct Active {
    request: usize,
    /// The first of the requests whose prompt was read with this one's, and the positions that they have in common.
    reading: (usize, u32),
    slot: u32,
    token: u32,
    position: u32,
    result: Continued,
}

/// What the lanes of one call of `generate` share.
struct Shared<F> {
    /// Requests without a slot yet.
    waiting: VecDeque<usize>,
    finished: usize,
    done: F,
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
            next: Indices::with_capacity(ops, slots)?,
            history: History::with_capacity(ops, slots)?,
            prefill: Vec::new(),
            reading: prefill,
            graphs: BTreeMap::new(),
            slots,
            length,
        })
    }
}

impl<B: Ops> Transformer<B> {
    /// Continues every request; results in order, the same at any number of slots and of lanes, of which a device that runs one pass at
    /// a time takes the first. `done` is called with the number finished and may stop everything by an error.
    pub fn generate(
        &self,
        lanes: &mut [(&mut Workspace<B>, &mut Generator<B>)],
        requests: &[Continue],
        adapter: Option<&Adapter<B>>,
        decoding: &Decoding,
        done: impl FnMut(usize) -> Result<()> + Send,
    ) -> Result<Vec<Continued>> {
        let _stage = crate::backend::stage(c"generate");
        let lanes = if self.in_lanes() { lanes } else { lanes.split_at_mut(lanes.len().min(1)).0 };
        let length = lanes.iter().map(|(_, generator)| generator.length).min().unwrap_or_default();
        let room = |r: &Continue| r.forced < decoding.max_new_tokens && (1..length).contains(&r.tokens.len());
        let waiting: VecDeque<usize> = (0..requests.len()).filter(|&i| room(&requests[i])).collect();
        let finished = requests.len() - waiting.len();
        let shared = &Mutex::new(Shared { waiting, finished, done });
        let each: Vec<()> = vec![(); lanes.len()];
        let found = side_by_side(lanes, &each, |(ws, generator), ()| {
            // A captured step holds the adapter's memory and the sampling settings of its call.
            generator.graphs.clear();
            let (free, active) = ((0..generator.slots as u32).rev().collect(), Vec::new());
            Lane { model: self, ws, generator, requests, adapter, decoding, shared, free, active }.run()
        });
        let mut results: Vec<Continued> = requests.iter().map(Continue::start).collect();
        found?.into_iter().flatten().for_each(|(request, result)| results[request] = result);
        Ok(results)
    }
}

impl Continue {
    /// Its answer before any new token.
    fn start(&self) -> Continued {
        let tokens = self.tokens[self.tokens.len() - self.forced..].to_vec();
        Continued { tokens, finish: Finish::Length, broken: false }
    }
}

/// A prompt that is read now, and whose it is.
struct Reading<'a> {
    /// The first request.
    first: usize,
    tokens: &'a [u32],
    slots: Vec<u32>,
}

/// One call of `generate`, or its part on one thread.
struct Lane<'a, B: Ops, F> {
    model: &'a Transformer<B>,
    ws: &'a mut Workspace<B>,
    generator: &'a mut Generator<B>,
    requests: &'a [Continue],
    adapter: Option<&'a Adapter<B>>,
    decoding: &'a Decoding,
    shared: &'a Mutex<Shared<F>>,
    free: Vec<u32>,
    active: Vec<Active>,
}

impl<'a, B: Ops, F: FnMut(usize) -> Result<()>> Lane<'a, B, F> {
    /// Until nobody waits: requests with their results.
    fn run(mut self) -> Result<Vec<(usize, Continued)>> {
        let mut results = Vec::new();
        loop {
            self.admit()?;
            if self.active.is_empty() {
                return Ok(results);
            }
            let columns = self.decode()?;
            let before = results.len();
            self.take(columns, &mut results);
            let Shared { finished, done, .. } = &mut *self.shared();
            *finished += results.len() - before;
            done(*finished)?;
        }
    }

    /// Gives free slots to waiting requests and runs their prompts, all but the last token, into the caches.
    fn admit(&mut self) -> Result<()> {
        // A few newcomers at a time make poor products: wait until a quarter of the slots is free.
        let waiting = self.shared().waiting.len();
        let enough = (self.generator.slots / 4).min(waiting).max(1);
        if !self.active.is_empty() && self.free.len() < enough {
            return Ok(());
        }
        loop {
            let (batch, read) = self.newcomers();
            if read.is_empty() {
                break;
            }
            // Prompts of one token leave nothing to read.
            if !batch.is_empty() {
                self.prefill(&batch, &read)?;
            }
        }
        // Those that share a prompt lie next to each other.
        self.active.sort_by_key(|active| active.request);
        Ok(())
    }

    fn shared(&self) -> MutexGuard<'_, Shared<F>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As many of those who wait as there are slots for and as are read at once; one that must read nothing is ready.
    fn newcomers(&mut self) -> (Batch, Vec<Reading<'a>>) {
        let (mut batch, mut read) = (Batch::default(), Vec::<Reading>::new());
        let (limit, requests) = (self.ws.capacity.min(self.generator.reading), self.requests);
        let waiting = &mut self.shared.lock().unwrap_or_else(PoisonError::into_inner).waiting;
        while let (Some(&request), Some(&slot)) = (waiting.front(), self.free.last()) {
            let Some((&token, tokens)) = requests[request].tokens.split_last() else { break };
            let common = tokens.len() as u32;
            let reading = match read.last_mut() {
                Some(last) if last.tokens == tokens => {
                    last.slots.push(slot);
                    last.first
                }
                _ if !batch.is_empty() && batch.len() + tokens.len() > limit => break,
                _ => {
                    batch.push(&[], &[AnswerTokens::new(tokens)], Heads::Ends);
                    read.push(Reading { first: request, tokens, slots: vec![slot] });
                    request
                }
            };
            waiting.pop_front();
            self.free.pop();
            let result = requests[request].start();
            self.active.push(Active { request, reading: (reading, common), slot, token, position: common, result });
        }
        (batch, read)
    }

    /// Packed forward that fills the caches: of the last block nothing but keys and values is wanted.
    fn prefill(&mut self, batch: &Batch, read: &[Reading]) -> Result<()> {
        let Transformer { ops, config, embed, blocks, .. } = self.model;
        let copies = read.iter().map(|reading| reading.slots.len()).max().unwrap_or_default();
        while self.generator.prefill.len() < copies {
            self.generator.prefill.push(SlotTable::with_capacity(ops, self.generator.reading)?);
        }
        let positions: Vec<u32> = read.iter().flat_map(|reading| 0..reading.tokens.len() as u32).collect();
        for (copy, table) in self.generator.prefill[..copies].iter_mut().enumerate() {
            // Whoever needs no further copy gets its last one again.
            let slot = |reading: &Reading| reading.slots[copy.min(reading.slots.len() - 1)];
            let slots = read.iter().flat_map(|reading| std::iter::repeat_n(slot(reading), reading.tokens.len()));
            table.set(ops, &slots.collect::<Vec<u32>>(), &positions)?;
        }
        self.ws.load(ops, batch)?;
        let Workspace { batch, saved, scratch, stream: Stream { out, .. }, .. } = &mut *self.ws;
        let Generator { caches, prefill, .. } = &mut *self.generator;
        let (s, rest) = &mut saved[0];
        ops.embed(&mut s.x, &batch.tokens, embed, config.embedding_scale)?;
        for (l, (block, cache)) in blocks.iter().zip(caches).enumerate() {
            let (lora, rope) = (self.adapter.map(|a| &a.blocks[l]), self.model.rope(l));
            if l + 1 < blocks.len() {
                block.forward(ops, out, (s, rest), scratch, lora, rope, Keys::Packed(&batch.packing))?;
            } else {
                block.qkv_forward(ops, s, lora, &batch.packing.positions, rope)?;
            }
            for table in &prefill[..copies] {
                ops.cache_append(cache, &s.qkv, table)?;
            }
            std::mem::swap(out, &mut s.x);
        }
        Ok(())
    }

    /// The next tokens of every active slot, as many steps as the backend takes at once, the caches have room for and anybody
    /// wants.
    fn decode(&mut self) -> Result<Vec<Vec<u32>>> {
        let Lane { model: Transformer { ops, config, .. }, ws, generator, requests, decoding, active, .. } = self;
        // Idle slots fill the step up; what they write is overwritten by whoever comes next.
        let rows = B::replayed_rows(active.len()).min(generator.slots);
        let column = |of: fn(&Active) -> u32| {
            let at_work = active.iter().map(of);
            at_work.chain(std::iter::repeat(0)).take(rows).collect::<Vec<u32>>()
        };
        let slots: Vec<u32> = active.iter().map(|row| row.slot).chain(self.free.iter().copied()).take(rows).collect();
        let mut ids: Vec<u64> = active.iter().map(|row| requests[row.request].id).collect();
        ids.resize(rows, 0);
        generator.table.slots.set(ops, &slots, generator.slots)?;
        let length = generator.length.min(config.max_position_embeddings);
        generator.table.positions.set(ops, &column(|row| row.position), length)?;
        let shared = active.chunk_by(|a, b| a.reading == b.reading).map(|rows| (rows.len(), rows[0].reading.1));
        generator.table.share(ops, shared.chain(vec![(1, 0); rows - active.len()]))?;
        generator.keys.set(ops, &ids, &column(|row| row.position + 1))?;
        generator.logits.set_rows(rows)?;
        generator.next.set(ops, &vec![0; rows], config.vocab_size + 1)?;
        generator.history.clear(ops, rows)?;
        ws.batch.tokens.set(ops, &column(|row| row.token), config.vocab_size)?;
        ws.set_rows(rows, rows)?;
        let wanted = |a: &Active| decoding.max_new_tokens - a.result.tokens.len();
        let most = active.iter().map(wanted).max().unwrap_or_default();
        let furthest = active.iter().map(|a| a.position as usize).max().unwrap_or_default();
        let steps = B::BURST.min(most).min(generator.length.saturating_sub(furthest)).max(1);
        for _ in 0..steps {
            self.step(rows)?;
        }
        let history = self.generator.history.tokens.read(ops)?;
        Ok(history.chunks_exact(B::BURST).map(|row| row[..steps].to_vec()).collect())
    }

    /// One token for every row, left on the device. Everything that changes between steps lies in device memory, and
    /// buffers end where they began, so the step can be replayed.
    fn step(&mut self, rows: usize) -> Result<()> {
        let (Transformer { ops, embed, blocks, norm, config, .. }, w) = (self.model, self.model.lm_weight()?);
        let Workspace { batch, saved, scratch, stream: Stream { out, .. }, head, .. } = &mut *self.ws;
        let Generator { caches, table, keys, logits, next, history, graphs, .. } = &mut *self.generator;
        let (s, rest) = &mut saved[0];
        let Decoding { temperature, top_k, top_p, seed, .. } = *self.decoding;
        // As good as greedy; its inverse is finite.
        let temperature = if temperature > 0.0 { temperature.max(1e-30) } else { 0.0 };
        ops.replay(graphs.entry(rows).or_default(), || {
            ops.embed(&mut s.x, &batch.tokens, embed, config.embedding_scale)?;
            for (l, (block, cache)) in blocks.iter().zip(&mut *caches).enumerate() {
                let (lora, rope) = (self.adapter.map(|a| &a.blocks[l]), self.model.rope(l));
                block.forward(ops, out, (s, rest), scratch, lora, rope, Keys::Cached(cache, table))?;
                std::mem::swap(out, &mut s.x);
            }
            let (y, rstd, spec) = (&mut head.h, &mut head.rstd, config.norm_spec());
            ops.norm_forward(NormForward { y, rstd, x: &s.x, w: norm, residual: None, spec })?;
            if blocks.len() % 2 == 1 {
                std::mem::swap(out, &mut s.x);
            }
            let spec = SampleSpec { temperature, top_k, top_p, seed };
            let (h, softcap) = (&head.h, config.logit_cap);
            ops.sample(SampleTokens { tokens: next, logits, h, table: keys, w, softcap, spec })?;
            let (tokens, drawn) = (&mut batch.tokens, &mut keys.positions);
            ops.advance(Advance { history, tokens, positions: &mut table.positions, drawn, next })
        })
    }

    /// Gives every active request its new tokens, and frees the slots of those that end with them.
    fn take(&mut self, columns: Vec<Vec<u32>>, results: &mut Vec<(usize, Continued)>) {
        let (decoding, length) = (self.decoding, self.generator.length);
        let over = |at: &Active| {
            let full = at.result.tokens.len() >= decoding.max_new_tokens || at.position as usize + 1 >= length;
            at.result.finish == Finish::Stop || at.result.broken || full
        };
        for (mut at, tokens) in std::mem::take(&mut self.active).into_iter().zip(columns) {
            for token in tokens {
                if over(&at) {
                    break; // what ran on for nothing
                }
                if token as usize == self.model.config.vocab_size {
                    at.result.broken = true;
                    break;
                }
                at.result.tokens.push(token);
                (at.token, at.position) = (token, at.position + 1);
                if self.model.config.eos_token_ids.contains(&token) && !decoding.ignore_eos {
                    at.result.finish = Finish::Stop;
                }
            }
            if over(&at) {
                self.free.push(at.slot);
                results.push((at.request, at.result));
            } else {
                self.active.push(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::Cuda;
    use crate::backend::cuda::counter::Counter;
    use crate::backend::cuda::driver::DeviceInfo;
    use crate::model::{BlankWeights, Keep, RandomWeights};

    /// Sixty-four answers that end one after the other: a step of each power of two is recorded, no other.
    #[test]
    fn few_different_steps_are_recorded() {
        let mut config = ModelConfig::open(Path::new("models/framing/policy")).unwrap();
        config.max_position_embeddings = 512;
        let counter = Counter::new(DeviceInfo::h200());
        let ops = Cuda::new(counter.clone());
        let model = Transformer::load(&ops, config.clone(), &BlankWeights(RandomWeights::new(&config, 0))).unwrap();
        let mut generator = Generator::new(&ops, &config, 64, 512, 512).unwrap();
        let mut ws = Workspace::new(&ops, &config, 0, 512, Keep::Nothing).unwrap();
        let requests: Vec<_> =
            (0..64).map(|i| Continue { tokens: vec![1; 8 * i as usize + 1], forced: 8 * i as usize, id: i }).collect();
        let decoding = Decoding { ignore_eos: true, ..Decoding::greedy(504) };
        let lanes = &mut [(&mut ws, &mut generator)];
        let done = model.generate(lanes, &requests, None, &decoding, |_| Ok(())).unwrap();
        assert!(done.iter().all(|done| done.tokens.len() == 504));
        assert_eq!(counter.counts().captures, 7);
    }
}
