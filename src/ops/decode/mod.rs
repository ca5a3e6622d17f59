//! One new token per sequence: its key and value join the cache, its query reads all of the cache up to its position.

mod cpu;
pub(crate) mod cuda;
pub mod naive;

use super::{AttentionSpec, Cost, expect};
use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;

/// Keys and values of one layer for a fixed number of slots; how they lie in memory is the backend's own affair.
pub struct KvCache<B: Backend> {
    k: Tensor<B>,
    v: Tensor<B>,
    slots: usize,
    /// Positions per slot.
    length: usize,
    spec: AttentionSpec,
}

/// Where rows go: which slot, at which position; and which of them continue the same prompt.
pub struct SlotTable<B: Backend> {
    pub(crate) slots: Indices<B>,
    pub(crate) positions: Indices<B>,
    /// Of each row the first one that continues the same prompt.
    leads: Indices<B>,
    /// Positions that these have in common.
    common: Indices<B>,
}

impl<B: Backend> SlotTable<B> {
    /// Room for `rows` rows.
    pub fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        let column = || Indices::with_capacity(backend, rows);
        Ok(SlotTable { slots: column()?, positions: column()?, leads: column()?, common: column()? })
    }

    /// Overwrites all with rows that share nothing.
    pub fn set(&mut self, backend: &B, slots: &[u32], positions: &[u32]) -> Result<()> {
        self.slots.refill(backend, slots)?;
        self.positions.refill(backend, positions)?;
        self.share(backend, vec![(1, 0); slots.len()])
    }

    /// Says which rows continue the same prompt: runs of rows at the same position, and at how many positions the slots of each run
    /// hold the same keys and values.
    pub fn share(&mut self, backend: &B, runs: impl IntoIterator<Item = (usize, u32)>) -> Result<()> {
        let (mut leads, mut common) = (Vec::new(), Vec::new());
        for (rows, positions) in runs {
            leads.extend(vec![leads.len() as u32; rows]);
            common.extend(vec![positions; rows]);
        }
        self.leads.refill(backend, &leads)?;
        self.common.refill(backend, &common)
    }
}

pub struct DecodeAttention<'a, B: Backend> {
    pub o: &'a mut Tensor<B>, // (T, h·e) overwritten
    pub qkv: &'a Tensor<B>,   // (T, (h+2k)·e)
    pub cache: &'a KvCache<B>,
    pub table: &'a SlotTable<B>,
}

/// Forward only: nothing is trained through a cache.
pub trait Decode: Backend {
    /// An empty cache of one layer.
    fn kv_cache(&self, slots: usize, length: usize, spec: AttentionSpec) -> Result<KvCache<Self>>;

    /// Writes the keys and values of `qkv` (T, (h+2k)·e) to their slots and positions. Rows of one slot lie next to each other.
    fn cache_append(&self, cache: &mut KvCache<Self>, qkv: &Tensor<Self>, table: &SlotTable<Self>) -> Result<()>;

    /// Each row attends to its slot's positions 0..=its own, appended before.
    fn decode_attention(&self, operands: DecodeAttention<Self>) -> Result<()>;
}

fn check<B: Backend>(qkv: &Tensor<B>, cache: &KvCache<B>, table: &SlotTable<B>) -> Result<()> {
    let (slots, positions) = (table.slots.bound(), table.positions.bound());
    expect("decode", "slots and positions within the cache", slots <= cache.slots && positions <= cache.length, true)?;
    expect("decode", "qkv columns", qkv.cols(), cache.spec.width())?;
    expect("decode", "leads among the rows", table.leads.bound() <= qkv.rows(), true)?;
    let columns = [&table.slots, &table.positions, &table.leads, &table.common].map(Indices::rows);
    expect("decode", "table", columns, [qkv.rows(); 4])
}

/// Reads every key and value in sight once. `pairs`: sum over rows of the positions they see; `read`: those that no row before has in
/// common with them.
pub fn cost(rows: u64, [pairs, read]: [u64; 2], spec: &AttentionSpec, act: u64) -> Cost {
    let (h, kv, e) = (spec.heads as u64, spec.kv_heads as u64, spec.head_dim as u64);
    Cost { flops: 4 * pairs * h * e, bytes: act * (2 * read * kv * e + rows * e * (2 * h + 2 * kv)) }
}
