use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, AttentionSpec, Packing, Segment, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::expect;
use crate::ops::product::{add_scaled, dot, exp, simd};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Attention for Cpu {
    fn attention_forward(
        &self,
        o: &mut Tensor<Self>,
        lse: &mut Tensor<Self, f32>,
        qkv: &Tensor<Self>,
        packing: &Packing<Self>,
        spec: AttentionSpec,
    ) -> Result<()> {
        check(o, lse, qkv, packing, &spec)?;
        let (h, e) = (spec.heads, spec.head_dim);
        // A segment's rows are contiguous, so tasks own disjoint pieces of o and lse.
        let rows = packing.rows();
        let o = split(&mut o.buffer[..rows * h * e], h * e, &packing.segments);
        let lse = split(&mut lse.buffer[..rows * h], h, &packing.segments);
        let tasks = packing.segments.par_iter().zip(o).zip(lse);
        tasks.for_each(|((segment, o), lse)| {
            SCRATCH.with_borrow_mut(|scratch| {
                simd(|| segment_forward(o, lse, &qkv.buffer, segment, &spec, scratch));
            });
            self.store(o);
        });
        Ok(())
    }

    fn attention_backward(
        &self,
        dqkv: &mut Tensor<Self>,
        d_o: &Tensor<Self>,
        o: &Tensor<Self>,
        lse: &Tensor<Self, f32>,
        qkv: &Tensor<Self>,
        packing: &Packing<Self>,
        spec: AttentionSpec,
    ) -> Result<()> {
        check(o, lse, qkv, packing, &spec)?;
        expect("attention", "do", d_o.shape(), o.shape())?;
        expect("attention", "dqkv", dqkv.shape(), qkv.shape())?;
        let rows = packing.rows();
        // Answers of one group add to the same prompt keys: a task owns a whole group.
        let groups: Vec<Segment> = packing.groups.iter().map(|g| whole(&packing.segments[g.clone()])).collect();
        let parts = split(&mut dqkv.buffer[..rows * spec.width()], spec.width(), &groups);
        packing.groups.par_iter().zip(&groups).zip(parts).for_each(|((group, whole), dqkv)| {
            let known = Known { d_o: &d_o.buffer, o: &o.buffer, lse: &lse.buffer, qkv: &qkv.buffer };
            SCRATCH.with_borrow_mut(|scratch| {
                simd(|| {
                    dqkv.fill(0.0);
                    for segment in &packing.segments[group.clone()] {
                        segment_backward(dqkv, whole.rows.start, &known, segment, &spec, scratch);
                    }
                });
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

/// One head's keys and values of one segment, both ways round: sums over positions and sums over channels each run along
/// contiguous memory.
#[derive(Default)]
pub(crate) struct Scratch {
    k: Vec<f32>,   // (n, e)
    k_t: Vec<f32>, // (e, n)
    v: Vec<f32>,   // (n, e)
    v_t: Vec<f32>, // (e, n)
    s: Vec<f32>,   // (n) scores, then probabilities
    d: Vec<f32>,   // (n) gradients of the probabilities, then of the scores
    dk: Vec<f32>,  // (n, e)
    dv: Vec<f32>,  // (n, e)
}

impl Scratch {
    /// Gathers head `kv` of the keys that `segment` sees: its prompt's, then its own. Index in here = position.
    #[inline(always)]
    fn gather(&mut self, qkv: &[f32], segment: &Segment, kv: usize, spec: &AttentionSpec) -> usize {
        let (e, width) = (spec.head_dim, spec.width());
        let n = segment.prompt.len() + segment.rows.len();
        let (k_at, v_at) = ((spec.heads + kv) * e, (spec.heads + spec.kv_heads + kv) * e);
        for buffer in [&mut self.k, &mut self.k_t, &mut self.v, &mut self.v_t, &mut self.dk, &mut self.dv] {
            buffer.clear();
            buffer.resize(n * e, 0.0);
        }
        self.s.resize(n.max(self.s.len()), 0.0);
        self.d.resize(n.max(self.d.len()), 0.0);
        for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
            let row = &qkv[row * width..][..width];
            self.k[j * e..][..e].copy_from_slice(&row[k_at..][..e]);
            self.v[j * e..][..e].copy_from_slice(&row[v_at..][..e]);
            for c in 0..e {
                self.k_t[c * n + j] = row[k_at + c];
                self.v_t[c * n + j] = row[v_at + c];
            }
        }
        n
    }
}

#[inline(always)]
fn segment_forward(
    o: &mut [f32],
    lse: &mut [f32],
    qkv: &[f32],
    segment: &Segment,
    spec: &AttentionSpec,
    scratch: &mut Scratch,
) {
    let (h, e, width) = (spec.heads, spec.head_dim, spec.width());
    for kv in 0..spec.kv_heads {
        let n = scratch.gather(qkv, segment, kv, spec);
        for (i, row) in segment.rows.clone().enumerate() {
            let seen = seen(segment.prompt.len() + i, n, spec);
            for head in heads_of(kv, spec) {
                let q = &qkv[row * width + head * e..][..e];
                let s = &mut scratch.s[..seen.len()];
                weighted_columns(s, q, &scratch.k_t[seen.start..], n, spec.scale);
                lse[i * h + head] = softmax(s, spec.softcap);
                weighted_rows(&mut o[i * h * e + head * e..][..e], s, &scratch.v[seen.start * e..], e);
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

/// Adds one segment's share to its group's `dqkv`, whose first row is packed row `first`.
#[inline(always)]
fn segment_backward(
    dqkv: &mut [f32],
    first: usize,
    known: &Known,
    segment: &Segment,
    spec: &AttentionSpec,
    scratch: &mut Scratch,
) {
    let (h, e, width) = (spec.heads, spec.head_dim, spec.width());
    for kv in 0..spec.kv_heads {
        let n = scratch.gather(known.qkv, segment, kv, spec);
        let Scratch { k, k_t, v_t, s, d, dk, dv, .. } = scratch;
        for (i, row) in segment.rows.clone().enumerate() {
            let seen = seen(segment.prompt.len() + i, n, spec);
            let (s, d) = (&mut s[..seen.len()], &mut d[..seen.len()]);
            for head in heads_of(kv, spec) {
                let q = &known.qkv[row * width + head * e..][..e];
                let d_o = &known.d_o[(row * h + head) * e..][..e];
                let delta = dot(d_o, &known.o[(row * h + head) * e..][..e]);
                weighted_columns(s, q, &k_t[seen.start..], n, spec.scale);
                weighted_columns(d, d_o, &v_t[seen.start..], n, 1.0);
                gradient_of_scores(s, d, known.lse[row * h + head], delta, spec);
                weighted_rows(&mut dqkv[(row - first) * width + head * e..][..e], d, &k[seen.start * e..], e);
                for (j, (p, ds)) in s.iter().zip(d.iter()).enumerate() {
                    let at = (seen.start + j) * e;
                    add_scaled(&mut dv[at..][..e], d_o, *p);
                    add_scaled(&mut dk[at..][..e], q, *ds);
                }
            }
        }
        let (k_at, v_at) = ((h + kv) * e, (h + spec.kv_heads + kv) * e);
        for (j, row) in segment.prompt.clone().chain(segment.rows.clone()).enumerate() {
            let row = &mut dqkv[(row - first) * width..][..width];
            add_scaled(&mut row[k_at..][..e], &dk[j * e..][..e], 1.0);
            add_scaled(&mut row[v_at..][..e], &dv[j * e..][..e], 1.0);
        }
    }
}

/// The query heads that read key/value head `kv`.
pub(crate) fn heads_of(kv: usize, spec: &AttentionSpec) -> Range<usize> {
    let per = spec.heads / spec.kv_heads;
    kv * per..(kv + 1) * per
}

/// Keys that position `at` of `n` sees.
fn seen(at: usize, n: usize, spec: &AttentionSpec) -> Range<usize> {
    let end = if spec.causal { at + 1 } else { n };
    spec.window.map_or(0, |window| (at + 1).saturating_sub(window))..end
}

/// s[j] = scale·Σ_c x[c]·m[c·stride + j], four channels at a time so that s is read and written a quarter as often.
#[inline(always)]
pub(crate) fn weighted_columns(s: &mut [f32], x: &[f32], m: &[f32], stride: usize, scale: f32) {
    let n = s.len();
    s.fill(0.0);
    let blocks = x.chunks_exact(4);
    let (rest, done) = (blocks.remainder(), x.len() / 4 * 4);
    for (block, x) in blocks.enumerate() {
        let at = block * 4 * stride;
        let (m0, m1) = (&m[at..][..n], &m[at + stride..][..n]);
        let (m2, m3) = (&m[at + 2 * stride..][..n], &m[at + 3 * stride..][..n]);
        for j in 0..n {
            s[j] += x[0] * m0[j] + x[1] * m1[j] + (x[2] * m2[j] + x[3] * m3[j]);
        }
    }
    for (c, x) in rest.iter().enumerate() {
        add_scaled(s, &m[(done + c) * stride..][..n], *x);
    }
    s.iter_mut().for_each(|s| *s *= scale);
}

/// o[c] = Σ_j p[j]·m[j·stride + c].
#[inline(always)]
pub(crate) fn weighted_rows(o: &mut [f32], p: &[f32], m: &[f32], stride: usize) {
    let e = o.len();
    o.fill(0.0);
    let blocks = p.chunks_exact(4);
    let (rest, done) = (blocks.remainder(), p.len() / 4 * 4);
    for (block, p) in blocks.enumerate() {
        let at = block * 4 * stride;
        let (m0, m1) = (&m[at..][..e], &m[at + stride..][..e]);
        let (m2, m3) = (&m[at + 2 * stride..][..e], &m[at + 3 * stride..][..e]);
        for c in 0..e {
            o[c] += p[0] * m0[c] + p[1] * m1[c] + (p[2] * m2[c] + p[3] * m3[c]);
        }
    }
    for (j, p) in rest.iter().enumerate() {
        add_scaled(o, &m[(done + j) * stride..][..e], *p);
    }
}

/// Scores become probabilities in place; returns log Σ exp.
#[inline(always)]
pub(crate) fn softmax(s: &mut [f32], softcap: Option<f32>) -> f32 {
    if let Some(cap) = softcap {
        s.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
    let max = s.iter().fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max });
    s.iter_mut().for_each(|s| *s = exp(*s - max));
    let sum = total(s);
    let inverse = 1.0 / sum;
    s.iter_mut().for_each(|s| *s *= inverse);
    max + sum.ln()
}

/// Σ s in sixteen running sums.
#[inline(always)]
pub(crate) fn total(s: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let blocks = s.chunks_exact(16);
    let rest: f32 = blocks.remainder().iter().sum();
    for block in blocks {
        for i in 0..16 {
            sums[i] += block[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `s`: raw scores → probabilities; `d`: do·v → gradient of the raw scores, scale included.
#[inline(always)]
fn gradient_of_scores(s: &mut [f32], d: &mut [f32], lse: f32, delta: f32, spec: &AttentionSpec) {
    match spec.softcap {
        None => {
            for (s, d) in s.iter_mut().zip(d) {
                *s = exp(*s - lse);
                *d = *s * (*d - delta) * spec.scale;
            }
        }
        Some(cap) => {
            for (s, d) in s.iter_mut().zip(d) {
                let tanh = (*s / cap).tanh();
                *s = exp(cap * tanh - lse);
                *d = *s * (*d - delta) * (1.0 - tanh * tanh) * spec.scale;
            }
        }
    }
}
