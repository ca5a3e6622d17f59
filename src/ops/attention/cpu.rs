use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::products::{LANES, multiply, multiply_transposed};
use super::{Attention, AttentionBackward, AttentionForward, AttentionSpec, Segment, check};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::product::{Rows, add_scaled, dot, exp, simd};

/// Queries of a tile: rows of one head, one after the other. Scores lie key by key, a tile's queries side by side in one widest
/// vector: what a softmax adds up goes down columns, and no sum crosses a vector.
const TILE: usize = LANES;
/// Keys whose probabilities are added up in one chain.
const CHAIN: usize = 256;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Attention for Cpu {
    fn attention_forward(&self, operands: AttentionForward<Self>) -> Result<()> {
        let AttentionForward { o, lse, qkv, packing, spec } = operands;
        check(&[o], lse, &[qkv], packing, &spec)?;
        let (h, e) = (spec.heads, spec.head_dim);
        // A segment's rows are contiguous, so tasks own disjoint pieces of o and lse.
        let rows = packing.rows();
        let o = split(&mut o.buffer[..rows * h * e], h * e, &packing.segments);
        let lse = split(&mut lse.buffer[..rows * h], h, &packing.segments);
        let tasks = packing.segments.par_iter().zip(o).zip(lse);
        tasks.for_each(|((segment, o), lse)| {
            SCRATCH.with_borrow_mut(|scratch| {
                segment_forward(o, lse, &qkv.buffer, segment, &spec, scratch);
            });
            self.store(o);
        });
        Ok(())
    }

    fn attention_backward(&self, operands: AttentionBackward<Self>) -> Result<()> {
        let AttentionBackward { dqkv, d_o, o, lse, qkv, packing, spec } = operands;
        check(&[o, d_o], lse, &[qkv, dqkv], packing, &spec)?;
        let rows = packing.rows();
        // Answers of one group add to the same prompt keys: a task owns a whole group.
        let groups: Vec<Segment> = packing.groups.iter().map(|g| whole(&packing.segments[g.clone()])).collect();
        let parts = split(&mut dqkv.buffer[..rows * spec.width()], spec.width(), &groups);
        packing.groups.par_iter().zip(&groups).zip(parts).for_each(|((group, whole), dqkv)| {
            let known = Known { d_o: &d_o.buffer, o: &o.buffer, lse: &lse.buffer, qkv: &qkv.buffer };
            SCRATCH.with_borrow_mut(|scratch| {
                dqkv.fill(0.0);
                for segment in &packing.segments[group.clone()] {
                    segment_backward(dqkv, whole.rows.start, &known, segment, &spec, scratch);
                }
            });
            self.store(dqkv);
        });
        Ok(())
    }
}

/// Rows of a whole group as one segment.
fn whole(segments: &[Segment]) -> Segment {
    let rows = segments.first().map_or(0, |s| s.rows.start)..segments.last().map_or(0, |s| s.rows.end);
    Segment { prompt: rows.start..rows.start, seen_until: rows.end, rows }
}

/// Cuts `values` (rows × cols) at segment borders.
fn split<'a>(mut values: &'a mut [f32], cols: usize, segments: &[Segment]) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(segments.len());
    for segment in segments {
        let (part, rest) = values.split_at_mut(segment.rows.len() * cols);
        parts.push(part);
        values = rest;
    }
    parts
}

/// The keys and values of one key/value head that a segment sees, its prompt's and then its own, so that an index is a position;
/// and a tile of queries. `e` channels in rows of `width`, whole vectors.
#[derive(Default)]
struct Scratch {
    e: usize,
    width: usize,
    k: Vec<f32>,    // (n, e)
    v: Vec<f32>,    // (n, e)
    dk: Vec<f32>,   // (n, e)
    dv: Vec<f32>,   // (n, e)
    q: Vec<f32>,    // (TILE, e) scaled
    q_t: Vec<f32>,  // (e, TILE)
    d_o: Vec<f32>,  // (TILE, e)
    d_ot: Vec<f32>, // (e, TILE)
    y: Vec<f32>,    // (TILE, e) o, or dq
    s: Vec<f32>,    // (n, TILE) scores, then probabilities
    d: Vec<f32>,    // (n, TILE) gradients of the probabilities, then of the scores
}

impl Scratch {
    #[inline(always)]
    fn gather(&mut self, qkv: &[f32], segment: &Segment, kv: usize, spec: &AttentionSpec) {
        let (e, columns, n) = (spec.head_dim, spec.width(), segment.prompt.len() + segment.rows.len());
        let width = e.next_multiple_of(LANES);
        if self.e != e {
            *self = Scratch { e, width, ..Scratch::default() }; // what lies between e and `width` stays zero
        }
        for buffer in [&mut self.k, &mut self.v, &mut self.dk, &mut self.dv] {
            buffer.resize(n * width, 0.0);
        }
        for buffer in [&mut self.q, &mut self.q_t, &mut self.d_o, &mut self.d_ot, &mut self.y] {
            buffer.resize(TILE * width, 0.0);
        }
        for buffer in [&mut self.s, &mut self.d] {
            buffer.resize(n * TILE, 0.0);
        }
        let (k_at, v_at) = ((spec.heads + kv) * e, (spec.heads + spec.kv_heads + kv) * e);
        for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
            let row = &qkv[row * columns..][..columns];
            self.k[j * width..][..e].copy_from_slice(&row[k_at..][..e]);
            self.v[j * width..][..e].copy_from_slice(&row[v_at..][..e]);
        }
    }
}

/// Up to `TILE` rows of e values, `stride` apart, times `scale`: into `rows` (TILE, width), zeros where there are no more, and
/// `turned` (width, TILE).
#[inline(always)]
fn load(rows: &mut [f32], turned: &mut [f32], (from, stride): Rows, (count, e): (usize, usize), scale: f32) {
    let width = rows.len() / TILE;
    for (i, row) in rows.chunks_exact_mut(width).enumerate() {
        match i < count {
            true => row[..e].iter_mut().zip(&from[i * stride..]).for_each(|(to, from)| *to = scale * from),
            false => row.fill(0.0),
        }
    }
    for (c, column) in turned.chunks_exact_mut(TILE).enumerate() {
        for i in 0..TILE {
            column[i] = rows[i * width + c];
        }
    }
}

/// A tile's queries: positions from `at` on, which see some of the keys `seen`.
struct Tile {
    at: usize,
    count: usize,
    seen: Range<usize>,
}

impl Tile {
    fn new(first: usize, segment: &Segment, spec: &AttentionSpec) -> Tile {
        let (before, count) = (segment.prompt.len(), TILE.min(segment.rows.len() - first));
        let (at, n) = (before + first, before + segment.rows.len());
        let reach = spec.window.unwrap_or(n);
        let last = if spec.causal { at + count } else { (at + count - 1).saturating_add(reach).min(n) };
        Tile { at, count, seen: (at + 1).saturating_sub(reach)..last }
    }

    /// Which of them see `key`.
    #[inline(always)]
    fn seeing(&self, key: usize, spec: &AttentionSpec) -> Range<usize> {
        let reach = spec.window.unwrap_or(usize::MAX);
        let first = if spec.causal { key } else { (key + 1).saturating_sub(reach) };
        let end = key.saturating_add(reach).saturating_sub(self.at).min(TILE);
        first.saturating_sub(self.at).min(end)..end
    }

    /// Soft-caps a key's scores and takes away those of queries that do not see it; returns the cap's slopes.
    #[inline(always)]
    fn mask(&self, s: &mut [f32], key: usize, spec: &AttentionSpec) -> Option<[f32; TILE]> {
        let slopes = spec.softcap.map(|cap| {
            let mut slopes = [0.0; TILE];
            for i in 0..TILE {
                let tanh = (s[i] / cap).tanh();
                (s[i], slopes[i]) = (cap * tanh, 1.0 - tanh * tanh);
            }
            slopes
        });
        let seeing = self.seeing(key, spec);
        if seeing != (0..TILE) {
            s[..seeing.start].fill(f32::NEG_INFINITY);
            s[seeing.end..].fill(f32::NEG_INFINITY);
        }
        slopes
    }

    /// Scores become e^(s − max), zero where a query does not see a key; returns each query's sum of them and log Σ exp. Chains
    /// begin at the same keys whichever the tile sees.
    #[inline(always)]
    fn softmax(&self, s: &mut [f32], spec: &AttentionSpec) -> ([f32; TILE], [f32; TILE]) {
        let (mut top, mut total, mut chain) = ([f32::NEG_INFINITY; TILE], [0.0; TILE], [0.0; TILE]);
        for (key, s) in self.seen.clone().zip(s.chunks_exact_mut(TILE)) {
            self.mask(s, key, spec);
            for i in 0..TILE {
                top[i] = if s[i] > top[i] { s[i] } else { top[i] };
            }
        }
        for (key, s) in self.seen.clone().zip(s.chunks_exact_mut(TILE)) {
            if key.is_multiple_of(CHAIN) {
                for i in 0..TILE {
                    total[i] += chain[i];
                }
                chain = [0.0; TILE];
            }
            for i in 0..TILE {
                s[i] = exp(s[i] - top[i]);
                chain[i] += s[i];
            }
        }
        for i in 0..TILE {
            total[i] += chain[i];
        }
        (total, std::array::from_fn(|i| top[i] + total[i].ln()))
    }

    /// `s`: scores → probabilities; `d`: do·v → gradient of the scores; zero where a query does not see a key.
    #[inline(always)]
    fn gradient_of_scores(
        &self,
        s: &mut [f32],
        d: &mut [f32],
        lse: &[f32; TILE],
        delta: &[f32; TILE],
        spec: &AttentionSpec,
    ) {
        let rows = s.chunks_exact_mut(TILE).zip(d.chunks_exact_mut(TILE));
        for (key, (s, d)) in self.seen.clone().zip(rows) {
            let slopes = self.mask(s, key, spec);
            for i in 0..TILE {
                s[i] = exp(s[i] - lse[i]);
                d[i] = s[i] * (d[i] - delta[i]);
            }
            if let Some(slopes) = slopes {
                d.iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope);
            }
        }
    }
}

simd! {
    fn segment_forward<'a>(o: &'a mut [f32], lse: &'a mut [f32], qkv: &'a [f32], segment: &'a Segment, spec: &'a AttentionSpec, scratch: &'a mut Scratch) {
        let (h, e, columns) = (spec.heads, spec.head_dim, spec.width());
        for head in 0..h {
            if head.is_multiple_of(h / spec.kv_heads) {
                scratch.gather(qkv, segment, head / (h / spec.kv_heads), spec);
            }
            let Scratch { k, v, q, q_t, y, s, width, .. } = &mut *scratch;
            for first in (0..segment.rows.len()).step_by(TILE) {
                let tile = Tile::new(first, segment, spec);
                let (keys, from) = (tile.seen.len(), tile.seen.start * *width);
                load(q, q_t, (&qkv[(segment.rows.start + first) * columns + head * e..], columns), (tile.count, e), spec.scale);
                multiply((s, TILE), (&k[from..], *width), (q_t, TILE), (keys, TILE), e, false);
                let (sums, logs) = tile.softmax(s, spec);
                y.fill(0.0);
                multiply_transposed((y, *width), (s, TILE), (&v[from..], *width), (tile.count, *width), keys);
                for (i, y) in y.chunks_exact(*width).take(tile.count).enumerate() {
                    let at = (first + i) * h + head;
                    lse[at] = logs[i];
                    o[at * e..][..e].iter_mut().zip(y).for_each(|(o, y)| *o = y / sums[i]);
                }
            }
        }
    }
}

/// What backward reads.
struct Known<'a> {
    d_o: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
    qkv: &'a [f32],
}

simd! {
    /// Adds one segment's share to its group's `dqkv`, whose first row is packed row `first`.
    fn segment_backward<'a>(dqkv: &'a mut [f32], start: usize, known: &'a Known<'a>, segment: &'a Segment, spec: &'a AttentionSpec, scratch: &'a mut Scratch) {
        let (h, e, columns, per) = (spec.heads, spec.head_dim, spec.width(), spec.heads / spec.kv_heads);
        for kv in 0..spec.kv_heads {
            scratch.gather(known.qkv, segment, kv, spec);
            let Scratch { k, v, dk, dv, q, q_t, d_o, d_ot, y, s, d, width, .. } = &mut *scratch;
            [&mut *dk, &mut *dv].into_iter().for_each(|buffer| buffer.fill(0.0));
            let tiles = (0..segment.rows.len()).step_by(TILE);
            for (head, first) in (kv * per..(kv + 1) * per).flat_map(|head| tiles.clone().map(move |first| (head, first))) {
                let tile = Tile::new(first, segment, spec);
                let (keys, from, row) = (tile.seen.len(), tile.seen.start * *width, segment.rows.start + first);
                let at = |i: usize| (row + i) * h + head;
                load(q, q_t, (&known.qkv[row * columns + head * e..], columns), (tile.count, e), spec.scale);
                load(d_o, d_ot, (&known.d_o[at(0) * e..], h * e), (tile.count, e), 1.0);
                multiply((s, TILE), (&k[from..], *width), (q_t, TILE), (keys, TILE), e, false);
                multiply((d, TILE), (&v[from..], *width), (d_ot, TILE), (keys, TILE), e, false);
                let (mut lse, mut delta) = ([0.0; TILE], [0.0; TILE]);
                for i in 0..tile.count {
                    lse[i] = known.lse[at(i)];
                    delta[i] = dot(&known.d_o[at(i) * e..][..e], &known.o[at(i) * e..][..e]);
                }
                tile.gradient_of_scores(s, d, &lse, &delta, spec);
                y.fill(0.0);
                multiply_transposed((y, *width), (d, TILE), (&k[from..], *width), (tile.count, *width), keys);
                for (i, y) in y.chunks_exact(*width).take(tile.count).enumerate() {
                    let dq = &mut dqkv[(row + i - start) * columns + head * e..][..e];
                    dq.iter_mut().zip(y).for_each(|(dq, y)| *dq = spec.scale * y);
                }
                multiply((&mut dv[from..], *width), (s, TILE), (d_o, *width), (keys, *width), tile.count, true);
                multiply((&mut dk[from..], *width), (d, TILE), (q, *width), (keys, *width), tile.count, true);
            }
            let (k_at, v_at) = ((h + kv) * e, (h + spec.kv_heads + kv) * e);
            for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
                let row = &mut dqkv[(row - start) * columns..][..columns];
                add_scaled(&mut row[k_at..][..e], &dk[j * *width..][..e], 1.0);
                add_scaled(&mut row[v_at..][..e], &dv[j * *width..][..e], 1.0);
            }
        }
    }
}
