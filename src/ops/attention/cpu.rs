use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::products::{LANES, ROWS, add_transposed, multiply};
use super::{Attention, AttentionBackward, AttentionForward, AttentionSpec, Segment, check};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::product::{add_scaled, dot, exp, simd};

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

/// One head's keys and values of one segment, both ways round, and a tile of four of its query rows: sums over positions and
/// sums over channels each run along contiguous memory. `n` positions in rows of `stride`, `e` channels in rows of `width`.
#[derive(Default)]
pub(crate) struct Scratch {
    n: usize,
    stride: usize,
    width: usize,
    k: Vec<f32>,   // (n, e)
    k_t: Vec<f32>, // (e, n)
    v: Vec<f32>,   // (n, e)
    v_t: Vec<f32>, // (e, n)
    dk: Vec<f32>,  // (n, e)
    dv: Vec<f32>,  // (n, e)
    q: Vec<f32>,   // (4, e) query rows, scaled
    d_o: Vec<f32>, // (4, e)
    y: Vec<f32>,   // (4, e) rows of o, then of dq
    s: Vec<f32>,   // (4, n) scores, then probabilities
    d: Vec<f32>,   // (4, n) gradients of the probabilities, then of the scores
}

/// A query of the tile: packed row within the segment, its head, and the keys that it sees.
struct Query {
    row: usize,
    head: usize,
    seen: Range<usize>,
}

impl Scratch {
    /// Gathers head `kv` of the keys that `segment` sees: its prompt's, then its own. Index in here = position.
    #[inline(always)]
    fn gather(&mut self, qkv: &[f32], segment: &Segment, kv: usize, spec: &AttentionSpec, backward: bool) {
        let (e, columns) = (spec.head_dim, spec.width());
        self.n = segment.prompt.len() + segment.rows.len();
        (self.stride, self.width) = (self.n.next_multiple_of(LANES), e.next_multiple_of(LANES));
        let (n, stride, width) = (self.n, self.stride, self.width);
        let fit = |buffer: &mut Vec<f32>, len: usize| {
            buffer.clear();
            buffer.resize(len, 0.0);
        };
        [&mut self.k_t, &mut self.v].into_iter().for_each(|buffer| fit(buffer, stride * width));
        if backward {
            [&mut self.k, &mut self.v_t].into_iter().for_each(|buffer| fit(buffer, stride * width));
            [&mut self.dk, &mut self.dv].into_iter().for_each(|buffer| fit(buffer, n * width));
        }
        [&mut self.q, &mut self.d_o, &mut self.y].into_iter().for_each(|buffer| fit(buffer, ROWS * width));
        [&mut self.s, &mut self.d].into_iter().for_each(|buffer| fit(buffer, ROWS * stride));
        let (k_at, v_at) = ((spec.heads + kv) * e, (spec.heads + spec.kv_heads + kv) * e);
        for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
            let row = &qkv[row * columns..][..columns];
            let (k, v) = (&row[k_at..][..e], &row[v_at..][..e]);
            self.v[j * width..][..e].copy_from_slice(v);
            k.iter().enumerate().for_each(|(c, k)| self.k_t[c * stride + j] = *k);
            if backward {
                self.k[j * width..][..e].copy_from_slice(k);
                v.iter().enumerate().for_each(|(c, v)| self.v_t[c * stride + j] = *v);
            }
        }
    }

    /// The tile's queries from number `first` on (row by row, the heads of `kv` within a row), how many there are (the last one
    /// stands in for those past the end), and all keys any of them sees.
    #[inline(always)]
    fn tile(
        &self,
        first: usize,
        segment: &Segment,
        kv: usize,
        spec: &AttentionSpec,
    ) -> ([Query; ROWS], usize, Range<usize>) {
        let per = spec.heads / spec.kv_heads;
        let count = ROWS.min(segment.rows.len() * per - first);
        let queries = std::array::from_fn(|i| {
            let index = first + i.min(count - 1);
            let (row, head) = (index / per, kv * per + index % per);
            Query { row, head, seen: seen(segment.prompt.len() + row, self.n, spec) }
        });
        let start = queries.iter().map(|q: &Query| q.seen.start).min().unwrap_or(0);
        let end = queries.iter().map(|q| q.seen.end).max().unwrap_or(0);
        (queries, count, start..end)
    }
}

/// One row of e values per query, times `scale`, into `tile` (4, width); rows without a query become zeros.
#[inline(always)]
fn load<'a>(tile: &mut [f32], queries: &[Query], scale: f32, row: impl Fn(&Query) -> &'a [f32]) {
    let width = tile.len() / ROWS;
    for (r, tile) in tile.chunks_exact_mut(width).enumerate() {
        match queries.get(r).map(&row) {
            Some(row) => tile.iter_mut().zip(row).for_each(|(to, from)| *to = scale * from),
            None => tile.fill(0.0),
        }
    }
}

/// The whole vectors that cover a range.
fn whole_vectors(covered: &Range<usize>) -> Range<usize> {
    covered.start / LANES * LANES..covered.end.next_multiple_of(LANES)
}

/// Overwrites what a query does not see in the vectors that cover its tile's keys.
#[inline(always)]
fn blank(row: &mut [f32], seen: &Range<usize>, covered: &Range<usize>, value: f32) {
    let vectors = whole_vectors(covered);
    row[vectors.start..seen.start].fill(value);
    row[seen.end..vectors.end].fill(value);
}

simd! {
    fn segment_forward<'a>[simd](o: &'a mut [f32], lse: &'a mut [f32], qkv: &'a [f32], segment: &'a Segment, spec: &'a AttentionSpec, scratch: &'a mut Scratch) {
        let (h, e, columns) = (spec.heads, spec.head_dim, spec.width());
        let queries = segment.rows.len() * (h / spec.kv_heads);
        for kv in 0..spec.kv_heads {
            scratch.gather(qkv, segment, kv, spec, false);
            for first in (0..queries).step_by(ROWS) {
                let (queries, count, covered) = scratch.tile(first, segment, kv, spec);
                let queries = &queries[..count];
                let Scratch { k_t, v, q, y, s, stride, width, .. } = scratch;
                load(q, queries, spec.scale, |q| &qkv[(segment.rows.start + q.row) * columns + q.head * e..][..e]);
                multiply::<_, ROWS>(simd, s, q, (k_t, *stride), &(0..e), &covered);
                for (query, s) in queries.iter().zip(s.chunks_exact_mut(*stride)) {
                    lse[query.row * h + query.head] = softmax(s, &query.seen, &covered, spec.softcap);
                }
                multiply::<_, ROWS>(simd, y, s, (v, *width), &covered, &(0..*width));
                for (query, y) in queries.iter().zip(y.chunks_exact(*width)) {
                    o[(query.row * h + query.head) * e..][..e].copy_from_slice(&y[..e]);
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
    fn segment_backward<'a>[simd](dqkv: &'a mut [f32], first: usize, known: &'a Known<'a>, segment: &'a Segment, spec: &'a AttentionSpec, scratch: &'a mut Scratch) {
        let (h, e, columns) = (spec.heads, spec.head_dim, spec.width());
        let start = segment.rows.start;
        for kv in 0..spec.kv_heads {
            scratch.gather(known.qkv, segment, kv, spec, true);
            for index in (0..segment.rows.len() * (h / spec.kv_heads)).step_by(ROWS) {
                let (queries, count, covered) = scratch.tile(index, segment, kv, spec);
                let queries = &queries[..count];
                let Scratch { k, k_t, v_t, q, d_o, y, s, d, dk, dv, stride, width, .. } = scratch;
                load(q, queries, spec.scale, |q| &known.qkv[(start + q.row) * columns + q.head * e..][..e]);
                load(d_o, queries, 1.0, |q| &known.d_o[((start + q.row) * h + q.head) * e..][..e]);
                multiply::<_, ROWS>(simd, s, q, (k_t, *stride), &(0..e), &covered);
                multiply::<_, ROWS>(simd, d, d_o, (v_t, *stride), &(0..e), &covered);
                let rows = s.chunks_exact_mut(*stride).zip(d.chunks_exact_mut(*stride));
                for (query, (s, d)) in queries.iter().zip(rows) {
                    let at = (start + query.row) * h + query.head;
                    let delta = dot(&known.d_o[at * e..][..e], &known.o[at * e..][..e]);
                    let vectors = whole_vectors(&covered);
                    gradient_of_scores(&mut s[vectors.clone()], &mut d[vectors], known.lse[at], delta, spec);
                    blank(s, &query.seen, &covered, 0.0);
                    blank(d, &query.seen, &covered, 0.0);
                }
                multiply::<_, ROWS>(simd, y, d, (k, *width), &covered, &(0..*width));
                for (query, y) in queries.iter().zip(y.chunks_exact(*width)) {
                    let row = start + query.row - first;
                    let dq = &mut dqkv[row * columns + query.head * e..][..e];
                    dq.iter_mut().zip(y).for_each(|(dq, y)| *dq = spec.scale * y);
                }
                add_transposed(dv, s, d_o, &covered);
                add_transposed(dk, d, q, &covered);
            }
            let (k_at, v_at) = ((h + kv) * e, (h + spec.kv_heads + kv) * e);
            for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
                let row = &mut dqkv[(row - first) * columns..][..columns];
                add_scaled(&mut row[k_at..][..e], &scratch.dk[j * scratch.width..][..e], 1.0);
                add_scaled(&mut row[v_at..][..e], &scratch.dv[j * scratch.width..][..e], 1.0);
            }
        }
    }
}

/// Keys that position `at` of `n` sees.
fn seen(at: usize, n: usize, spec: &AttentionSpec) -> Range<usize> {
    let reach = spec.window.unwrap_or(n);
    let end = if spec.causal { at + 1 } else { at.saturating_add(reach).min(n) };
    (at + 1).saturating_sub(reach)..end
}

/// Scores of the keys `seen` become probabilities in place, those of the other keys in the vectors that cover `covered` zero;
/// returns log Σ exp. Sums run in sixteen parts by position, so they do not depend on `covered`.
#[inline(always)]
pub(crate) fn softmax(s: &mut [f32], seen: &Range<usize>, covered: &Range<usize>, softcap: Option<f32>) -> f32 {
    if let Some(cap) = softcap {
        s[seen.clone()].iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
    blank(s, seen, covered, f32::NEG_INFINITY);
    let s = &mut s[whole_vectors(covered)];
    let mut tops = [f32::NEG_INFINITY; LANES];
    for vector in s.chunks_exact(LANES) {
        for l in 0..LANES {
            tops[l] = if vector[l] > tops[l] { vector[l] } else { tops[l] };
        }
    }
    let max = tops.iter().fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max });
    let mut sums = [0.0f32; LANES];
    for vector in s.chunks_exact_mut(LANES) {
        for l in 0..LANES {
            vector[l] = exp(vector[l] - max);
            sums[l] += vector[l];
        }
    }
    let sum = sums.iter().sum::<f32>();
    let inverse = 1.0 / sum;
    s.iter_mut().for_each(|s| *s *= inverse);
    max + sum.ln()
}

/// `s`: raw scores → probabilities; `d`: do·v → gradient of the raw scores.
#[inline(always)]
fn gradient_of_scores(s: &mut [f32], d: &mut [f32], lse: f32, delta: f32, spec: &AttentionSpec) {
    match spec.softcap {
        None => {
            for (s, d) in s.iter_mut().zip(d) {
                *s = exp(*s - lse);
                *d = *s * (*d - delta);
            }
        }
        Some(cap) => {
            for (s, d) in s.iter_mut().zip(d) {
                let tanh = (*s / cap).tanh();
                *s = exp(cap * tanh - lse);
                *d = *s * (*d - delta) * (1.0 - tanh * tanh);
            }
        }
    }
}
