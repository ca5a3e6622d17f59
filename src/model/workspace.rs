//! Everything a model writes while it runs: room for `capacity` packed rows, of which a step uses as many as it needs.

use super::batch::{Batch, DeviceBatch};
use super::block::{BlockScratch, SavedAttention, SavedRest, Widths};
use super::config::ModelConfig;
use super::tensors::tensors;
use crate::backend::Tensor;
use crate::error::Result;
use crate::ops::{HeadRows, Ops};

/// What a forward leaves for its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// No backward follows.
    Nothing,
    /// The input of every block, from which backward computes the rest of it once more: the same bits for at most half as much
    /// arithmetic again, in a fraction of the memory.
    Inputs,
    Everything,
}

/// Memory for forward, and for backward where it was asked for.
pub struct Workspace<B: Ops> {
    pub(super) batch: DeviceBatch<B>,
    /// One per block where backward will need them, else one for all; a deeper model may have left more.
    pub(super) saved: Vec<(SavedAttention<B>, SavedRest<B>)>,
    /// One per block where backward computes the rest again, else none.
    pub(super) inputs: Vec<BlockInput<B>>,
    pub(super) scratch: BlockScratch<B>,
    pub(super) stream: Stream<B>,
    pub(super) head: HeadSpace<B>,
    pub(super) head_rows: HeadRows<B>,
    pub(super) chunk: Tensor<B>, // (chunk rows, V)
    /// For KL(π_0‖π_θ) only, allocated at its first use: with a second chunk, of π_0's logits.
    pub(super) kl: Option<(KlSpace<B>, Tensor<B>)>,
    /// Packed rows that it has room for.
    pub capacity: usize,
    /// Of the adapters it has room for; 0: none.
    pub(super) rank: usize,
    /// Of `saved`, how many the model uses.
    pub(super) blocks: usize,
    keep: Keep,
}

tensors! {
    /// What a block is computed from.
    pub(super) struct BlockInput(rows: usize, hidden: usize) {
        x: B::Act = [rows, hidden],
    }
}

tensors! {
    /// What goes from block to block.
    pub(super) struct Stream(rows: usize, back: usize, w: &Widths) {
        out: B::Act = [rows, w.hidden], // residual stream, where blocks share their activations
        dx: B::Act = [back, w.hidden], // its gradient
        d_o: B::Act = [back, w.heads * w.head_dim], // the gradient of what attention made
    }
}

tensors! {
    /// What the heads write.
    pub(super) struct HeadSpace(rows: usize, back: usize, w: &Widths, units: usize) {
        x_in: B::Act = [rows, w.hidden], // of the last block's input, the rows that the head reads
        o: B::Act = [rows, w.heads * w.head_dim], // of what its attention made
        d_o: B::Act = [back, w.heads * w.head_dim],
        x: B::Act = [rows, w.hidden], // its output
        rstd: f32 = [rows, 1],
        h: B::Act = [rows, w.hidden], // normed
        units: f32 = [rows, units], // of a score head's first layer
        dh: B::Act = [back, w.hidden],
        dx: B::Act = [back, w.hidden],
        weights: f32 = [back, 1],
        d_units: f32 = [back, units],
    }
}

tensors! {
    /// What the KL term needs beside the head's tensors.
    pub(super) struct KlSpace(rows: usize, hidden: usize) {
        h: B::Act = [rows, hidden], // π_θ's normed rows
        h0: B::Act = [rows, hidden], // π_0's
        dh: B::Act = [rows, hidden],
        kl: f32 = [rows, 1],
    }
}

impl ModelConfig {
    /// Columns of a block's tensors, with adapters of `rank`.
    pub(super) fn widths(&self, rank: usize) -> Widths {
        let (h, k, e) = (self.heads, self.kv_heads, self.head_dim);
        Widths {
            hidden: self.hidden_size,
            qkv: (h + 2 * k) * e,
            heads: h,
            head_dim: e,
            raw: if self.traits.qk_norm { (h + k) * e } else { 0 },
            normed: if self.traits.post_norms { self.hidden_size } else { 0 },
            feed_forward: self.intermediate_size,
            rank,
        }
    }
}

impl<B: Ops> Workspace<B> {
    /// Room for `capacity` packed rows of a model with adapters of `rank` (0: none).
    pub fn new(ops: &B, config: &ModelConfig, rank: usize, capacity: usize, keep: Keep) -> Result<Self> {
        let (widths, [blocks, inputs, back]) = (config.widths(rank), keep.counts(config, capacity));
        Ok(Workspace {
            batch: DeviceBatch::with_capacity(ops, capacity)?,
            saved: (0..blocks).map(|_| saved(ops, capacity, &widths)).collect::<Result<_>>()?,
            inputs: (0..inputs).map(|_| BlockInput::new(ops, capacity, widths.hidden)).collect::<Result<_>>()?,
            scratch: BlockScratch::new(ops, capacity, back, &widths)?,
            stream: Stream::new(ops, capacity, back, &widths)?,
            head: HeadSpace::new(ops, capacity, back, &widths, config.score_units())?,
            head_rows: HeadRows::with_capacity(ops, capacity)?,
            chunk: Tensor::zeros(ops, chunk_rows::<B>(config, capacity), config.vocab_size)?,
            kl: None,
            capacity,
            rank,
            blocks,
            keep,
        })
    }

    /// Makes it what [`Workspace::new`] would for this model, from the memory that it has: models that run in turn share one,
    /// which is as large as the largest. What stood in it is gone.
    pub fn fit(&mut self, ops: &B, config: &ModelConfig, rank: usize, capacity: usize) -> Result<()> {
        let (widths, [blocks, inputs, back]) = (config.widths(rank), self.keep.counts(config, capacity));
        if capacity > self.batch.capacity() {
            self.batch = DeviceBatch::with_capacity(ops, capacity)?;
            self.head_rows = HeadRows::with_capacity(ops, capacity)?;
        }
        for (attention, rest) in self.saved.iter_mut().take(blocks) {
            attention.fit(ops, capacity, &widths)?;
            rest.fit(ops, capacity, &widths)?;
        }
        let more = (self.saved.len()..blocks).map(|_| saved(ops, capacity, &widths));
        self.saved.extend(more.collect::<Result<Vec<_>>>()?);
        self.inputs.iter_mut().try_for_each(|input| input.fit(ops, capacity, widths.hidden))?;
        let more = (self.inputs.len()..inputs).map(|_| BlockInput::new(ops, capacity, widths.hidden));
        self.inputs.extend(more.collect::<Result<Vec<_>>>()?);
        self.scratch.fit(ops, capacity, back, &widths)?;
        self.stream.fit(ops, capacity, back, &widths)?;
        self.head.fit(ops, capacity, back, &widths, config.score_units())?;
        self.chunk.fit(ops, chunk_rows::<B>(config, capacity), config.vocab_size)?;
        (self.capacity, self.rank, self.blocks) = (capacity, rank, blocks);
        Ok(())
    }

    /// Loads a batch's tables and sets every tensor to its rows.
    pub(super) fn load(&mut self, ops: &B, batch: &Batch) -> Result<()> {
        self.batch.set(ops, batch)?;
        self.set_rows(batch.len(), batch.rows.len())
    }

    /// `rows` packed ones, `read` of which a head reads.
    pub(super) fn set_rows(&mut self, rows: usize, read: usize) -> Result<()> {
        for (attention, rest) in &mut self.saved[..self.blocks] {
            attention.set_rows(rows)?;
            rest.set_rows(rows)?;
        }
        self.inputs.iter_mut().try_for_each(|input| input.set_rows(rows))?;
        self.scratch.set_rows(rows)?;
        self.stream.set_rows(rows)?;
        self.head_rows.set_rows(read)?;
        self.head.set_rows(read)
    }

    /// Makes space for the KL term of `rows` head rows.
    pub(super) fn set_kl_rows(&mut self, ops: &B, config: &ModelConfig, rows: usize) -> Result<()> {
        let (rooms, logits) = (self.capacity, chunk_rows::<B>(config, self.capacity));
        let (space, chunk) = match &mut self.kl {
            Some(kl) => kl,
            none => none.insert((KlSpace::new(ops, 0, config.hidden_size)?, Tensor::zeros(ops, 0, config.vocab_size)?)),
        };
        space.fit(ops, rooms, config.hidden_size)?;
        chunk.fit(ops, logits, config.vocab_size)?;
        space.set_rows(rows)
    }
}

impl Keep {
    /// Blocks whose activations are kept, blocks whose inputs are, rows of what backward writes.
    fn counts(self, config: &ModelConfig, capacity: usize) -> [usize; 3] {
        match self {
            Keep::Nothing => [1, 0, 0],
            Keep::Inputs => [1, config.layers, capacity],
            Keep::Everything => [config.layers, 0, capacity],
        }
    }
}

/// What backward needs of one block.
fn saved<B: Ops>(ops: &B, rows: usize, widths: &Widths) -> Result<(SavedAttention<B>, SavedRest<B>)> {
    Ok((SavedAttention::new(ops, rows, widths)?, SavedRest::new(ops, rows, widths)?))
}

/// Rows of logits that the head takes at once; a score head takes none.
fn chunk_rows<B: Ops>(config: &ModelConfig, capacity: usize) -> usize {
    if config.is_causal() { B::lm_head_chunk(config.vocab_size).min(capacity) } else { 0 }
}
