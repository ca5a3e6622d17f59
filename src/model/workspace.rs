//! Everything a model writes while it runs: allocated once for `capacity` packed rows; a step uses as many as it needs.

use super::batch::{Batch, DeviceBatch};
use super::block::{Saved, Scratch, Widths};
use super::config::ModelConfig;
use crate::backend::Tensor;
use crate::error::Result;
use crate::ops::{HeadRows, Ops};

/// Memory for forward, and for backward where it was asked for.
pub struct Workspace<B: Ops> {
    pub(super) batch: DeviceBatch<B>,
    /// One per block where backward will need them, else one for all.
    pub(super) saved: Vec<Saved<B>>,
    pub(super) scratch: Scratch<B>,
    pub(super) last: Tensor<B>, // (T, C) residual stream behind the last block
    pub(super) dx: Tensor<B>,   // (T, C) its gradient
    pub(super) head: HeadSpace<B>,
    capacity: usize,
    rank: usize,
}

/// What the heads write.
pub(super) struct HeadSpace<B: Ops> {
    pub(crate) x: Tensor<B>,            // (R, C) gathered rows of the residual stream
    pub(crate) rstd: Tensor<B, f32>,    // (R, 1)
    pub(crate) h: Tensor<B>,            // (R, C) normed
    pub(crate) dh: Tensor<B>,           // (R, C)
    pub(crate) dx: Tensor<B>,           // (R, C)
    pub(crate) weights: Tensor<B, f32>, // (R, 1)
    pub(crate) rows: HeadRows<B>,
    pub(crate) chunk: Tensor<B>,         // (chunk rows, V)
    pub(crate) scores: Tensor<B, f32>,   // (R, labels)
    pub(crate) d_scores: Tensor<B, f32>, // (R, labels)
    /// For KL(π_0‖π_θ) only, allocated at its first use.
    pub(crate) kl: Option<KlSpace<B>>,
}

/// What the KL term needs besides.
pub(super) struct KlSpace<B: Ops> {
    pub(crate) h: Tensor<B>,       // (R, C) π_θ's normed rows
    pub(crate) h0: Tensor<B>,      // (R, C) π_0's
    pub(crate) dh: Tensor<B>,      // (R, C)
    pub(crate) kl: Tensor<B, f32>, // (R, 1)
    pub(crate) chunk0: Tensor<B>,  // (chunk rows, V)
}

impl<B: Ops> KlSpace<B> {
    pub(crate) fn with_capacity(ops: &B, rows: usize, hidden: usize, vocab: usize) -> Result<Self> {
        let act = || Tensor::zeros(ops, rows, hidden);
        let chunk0 = Tensor::zeros(ops, B::lm_head_chunk(vocab).min(rows), vocab)?;
        Ok(KlSpace { h: act()?, h0: act()?, dh: act()?, kl: Tensor::zeros(ops, rows, 1)?, chunk0 })
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
            raw: if self.qk_norm { (h + k) * e } else { 0 },
            feed_forward: self.intermediate_size,
            rank,
        }
    }
}

impl<B: Ops> Workspace<B> {
    /// Room for `capacity` packed rows of a model with adapters of `rank` (0: none). With `backward` every block's activations
    /// are kept.
    pub fn new(ops: &B, config: &ModelConfig, rank: usize, capacity: usize, backward: bool) -> Result<Self> {
        let widths = config.widths(rank);
        let blocks = if backward { config.layers } else { 1 };
        let hidden = config.hidden_size;
        let (labels, vocab) = (config.labels(), config.vocab_size);
        let act = |rows| Tensor::zeros(ops, rows, hidden);
        let back = if backward { capacity } else { 0 };
        let chunk = if config.is_causal() { B::lm_head_chunk(vocab).min(capacity) } else { 0 };
        let head = HeadSpace {
            x: act(capacity)?,
            rstd: Tensor::zeros(ops, capacity, 1)?,
            h: act(capacity)?,
            dh: act(back)?,
            dx: act(back)?,
            weights: Tensor::zeros(ops, back, 1)?,
            rows: HeadRows::with_capacity(ops, capacity)?,
            chunk: Tensor::zeros(ops, chunk, vocab)?,
            scores: Tensor::zeros(ops, capacity, labels)?,
            d_scores: Tensor::zeros(ops, back, labels)?,
            kl: None,
        };
        Ok(Workspace {
            batch: DeviceBatch::with_capacity(ops, capacity)?,
            saved: (0..blocks).map(|_| Saved::with_capacity(ops, capacity, &widths)).collect::<Result<_>>()?,
            scratch: Scratch::with_capacity(ops, capacity, &widths, backward)?,
            last: act(capacity)?,
            dx: act(back)?,
            head,
            capacity,
            rank,
        })
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Of the adapters it has room for; 0: none.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Loads a batch's tables and sets every tensor to its rows.
    pub(super) fn load(&mut self, ops: &B, batch: &Batch) -> Result<()> {
        self.batch.set(ops, batch)?;
        self.set_rows(batch.len())?;
        self.head.set_rows(batch.rows.len())
    }

    pub(super) fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.saved.iter_mut().try_for_each(|saved| saved.set_rows(rows))?;
        self.scratch.set_rows(rows)?;
        self.last.set_rows(rows)?;
        if self.dx.capacity() > 0 { self.dx.set_rows(rows) } else { Ok(()) }
    }
}

impl<B: Ops> HeadSpace<B> {
    pub(crate) fn set_rows(&mut self, rows: usize) -> Result<()> {
        [&mut self.x, &mut self.h].into_iter().try_for_each(|t| t.set_rows(rows))?;
        [&mut self.rstd, &mut self.scores].into_iter().try_for_each(|t| t.set_rows(rows))?;
        self.rows.set_rows(rows)?;
        if self.dh.capacity() == 0 {
            return Ok(());
        }
        [&mut self.dh, &mut self.dx].into_iter().try_for_each(|t| t.set_rows(rows))?;
        [&mut self.weights, &mut self.d_scores].into_iter().try_for_each(|t| t.set_rows(rows))
    }
}
