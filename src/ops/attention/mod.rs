//! Attention over packed sequences with grouped key/value heads: s = scale·q·kᵀ (soft-capped: c·tanh(s/c)),
//! p = softmax(s) over the keys a row may see, o = p·v, lse = log Σ exp s.
//!
//! Backward from o, do and lse, without a stored T×T matrix (FlashAttention, arXiv:2205.14135): p = exp(s − lse),
//! δ = do·o, ds = p·(do·vᵀ − δ), dq = scale·ds·k, dk = scale·dsᵀ·q, dv = pᵀ·do.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub mod naive;
pub(crate) mod products;
mod tables;

use std::ops::Range;

pub(crate) use tables::Tiles;

use super::{Cost, expect};
use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Usually head_dim^-½.
    pub scale: f32,
    /// A row sees keys fewer than `window` positions away: the last `window` ones, its own included, and where not `causal`
    /// as many ahead.
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    /// Whether a row sees only keys up to its own; else (encoders) all of its own segment, and of its prompt.
    pub causal: bool,
}

impl AttentionSpec {
    /// Columns of q∣k∣v.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Rows of one packed segment. A prompt's own `prompt` range is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub rows: Range<usize>,
    /// Rows of the prompt that this answer segment follows.
    pub prompt: Range<usize>,
    /// One past the last row that sees this segment's keys: the group's end for a prompt, the segment's end for an answer.
    pub seen_until: usize,
}

impl Segment {
    /// (row, key) pairs, where a row sees its last `window` positions and, unless `causal`, all of its own segment.
    pub(crate) fn pairs(&self, window: Option<usize>, causal: bool) -> u64 {
        let (own, before) = (self.rows.len(), self.prompt.len());
        let seen = |row: usize| before + if causal { row + 1 } else { own };
        (0..own).map(|row| seen(row).min(window.unwrap_or(usize::MAX)) as u64).sum()
    }
}

/// Which rows see which keys. In packed order row i sees key j iff j ≤ i and (j ≥ own start or j in its prompt); key j is seen
/// by the contiguous rows j..seen_until. Where not causal j ≤ i falls away for keys of the own segment.
pub struct Packing<B: Backend> {
    /// In packed order; they tile the rows.
    pub(crate) segments: Vec<Segment>,
    /// Segments of each group: a prompt, directly followed by its answers.
    pub(crate) groups: Vec<Range<usize>>,
    pub(crate) positions: Indices<B>, // of each row in its own sequence
    pub(crate) tiles: Tiles<B>,
}

impl<B: Backend> Packing<B> {
    /// Room for `rows` rows.
    pub fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        Ok(Packing {
            segments: Vec::new(),
            groups: Vec::new(),
            positions: Indices::with_capacity(backend, rows)?,
            tiles: Tiles::with_capacity(backend, rows)?,
        })
    }

    /// Overwrites all tables.
    pub fn set(
        &mut self,
        backend: &B,
        segments: Vec<Segment>,
        groups: Vec<Range<usize>>,
        positions: &[u32],
    ) -> Result<()> {
        self.positions.refill(backend, positions)?;
        self.tiles.set(backend, &segments)?;
        (self.segments, self.groups) = (segments, groups);
        Ok(())
    }

    /// (row, key) pairs of all segments.
    pub(crate) fn pairs(&self, spec: &AttentionSpec) -> u64 {
        self.segments.iter().map(|segment| segment.pairs(spec.window, spec.causal)).sum()
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub fn groups(&self) -> &[Range<usize>] {
        &self.groups
    }

    pub fn positions(&self) -> &Indices<B> {
        &self.positions
    }

    pub fn rows(&self) -> usize {
        self.positions.rows()
    }
}

pub struct AttentionForward<'a, B: Backend> {
    pub o: &'a mut Tensor<B>,        // (T, h·e) overwritten
    pub lse: &'a mut Tensor<B, f32>, // (T, h) overwritten
    pub qkv: &'a Tensor<B>,          // (T, (h+2k)·e) normed and rotated
    pub packing: &'a Packing<B>,
    pub spec: AttentionSpec,
}

pub struct AttentionBackward<'a, B: Backend> {
    pub dqkv: &'a mut Tensor<B>, // (T, (h+2k)·e) overwritten
    pub d_o: &'a Tensor<B>,      // (T, h·e)
    pub o: &'a Tensor<B>,        // (T, h·e)
    pub lse: &'a Tensor<B, f32>, // (T, h)
    pub qkv: &'a Tensor<B>,      // (T, (h+2k)·e)
    pub packing: &'a Packing<B>,
    pub spec: AttentionSpec,
}

pub trait Attention: Backend {
    fn attention_forward(&self, operands: AttentionForward<Self>) -> Result<()>;

    fn attention_backward(&self, operands: AttentionBackward<Self>) -> Result<()>;
}

/// `o` and `qkv` each with what has its shape.
fn check<B: Backend>(
    o: &[&Tensor<B>],
    lse: &Tensor<B, f32>,
    qkv: &[&Tensor<B>],
    packing: &Packing<B>,
    spec: &AttentionSpec,
) -> Result<()> {
    let rows = packing.rows();
    let shaped = |what, all: &[&Tensor<B>], cols| {
        all.iter().try_for_each(|tensor| expect("attention", what, tensor.shape(), (rows, cols)))
    };
    shaped("qkv", qkv, spec.width())?;
    shaped("o", o, spec.heads * spec.head_dim)?;
    expect("attention", "lse", lse.shape(), (rows, spec.heads))?;
    let fits = |s: &Segment| s.prompt.end <= s.rows.start && (s.rows.end..=rows).contains(&s.seen_until);
    let tiled = packing.segments.iter().try_fold(0, |at, s| (s.rows.start == at && fits(s)).then_some(s.rows.end));
    expect("attention", "rows tiled by segments", tiled, Some(rows))
}

/// `pairs`: sum over rows of the keys they see. Products only, two and five; forward: q, k, v in, o and lse out.
pub(crate) fn costs(rows: u64, pairs: u64, heads: u64, kv_heads: u64, head_dim: u64, act: u64) -> [Cost; 2] {
    let (acts, lse) = (act * rows * head_dim * (heads + kv_heads), 4 * rows * heads);
    [
        Cost { flops: 4 * pairs * heads * head_dim, bytes: 2 * acts + lse },
        Cost { flops: 10 * pairs * heads * head_dim, bytes: 4 * acts + lse },
    ]
}

#[cfg(test)]
mod tests {
    use super::Segment;

    #[test]
    fn pairs_are_those_that_the_rule_names() {
        for (own, before) in [(1, 0), (5, 0), (5, 3), (3, 7)] {
            let segment = Segment { rows: 20..20 + own, prompt: 0..before, seen_until: 20 + own };
            for window in [None, Some(1), Some(4), Some(100)] {
                let near = |row: usize, key: usize| window.is_none_or(|window| row - key < window);
                // Positions within the sequence: the prompt's first.
                let rows = before..before + own;
                let seen = rows.map(|row| (0..=row).filter(|&key| near(row, key)).count() as u64);
                assert_eq!(segment.pairs(window, true), seen.sum::<u64>(), "{segment:?} {window:?}");
            }
            assert_eq!(segment.pairs(None, false), (own * (before + own)) as u64);
        }
    }
}
