//! Attention in plain loops: one row, one head, one key at a time.

use super::{AttentionSpec, Segment};
use crate::ops::product::naive::dot;

/// Overwrites `o` (T, h·e) and `lse` (T, h).
pub fn forward(o: &mut [f32], lse: &mut [f32], qkv: &[f32], segments: &[Segment], spec: &AttentionSpec) {
    let e = spec.head_dim;
    o.fill(0.0);
    for (segment, i, head) in queries(segments, spec) {
        let [q, ..] = columns(i, head, spec);
        let keys = keys(segment, i, spec);
        let scores: Vec<f32> =
            keys.iter().map(|j| score(dot(&qkv[q..][..e], key(qkv, *j, head, spec)), spec).0).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let at = i * spec.heads + head;
        lse[at] = max + scores.iter().map(|s| (s - max).exp()).sum::<f32>().ln();
        for (j, s) in keys.into_iter().zip(scores) {
            let [_, _, v] = columns(j, head, spec);
            let p = (s - lse[at]).exp();
            for c in 0..e {
                o[at * e + c] += p * qkv[v + c];
            }
        }
    }
}

/// Overwrites `dqkv` (T, (h+2k)·e).
pub fn backward(
    dqkv: &mut [f32],
    d_o: &[f32],
    o: &[f32],
    lse: &[f32],
    qkv: &[f32],
    segments: &[Segment],
    spec: &AttentionSpec,
) {
    let e = spec.head_dim;
    dqkv.fill(0.0);
    for (segment, i, head) in queries(segments, spec) {
        let at = i * spec.heads + head;
        let (d_o, o) = (&d_o[at * e..][..e], &o[at * e..][..e]);
        let [q, ..] = columns(i, head, spec);
        for j in keys(segment, i, spec) {
            let [_, k, v] = columns(j, head, spec);
            let (s, slope) = score(dot(&qkv[q..][..e], &qkv[k..][..e]), spec);
            let p = (s - lse[at]).exp();
            let ds = p * (dot(d_o, &qkv[v..][..e]) - dot(d_o, o)) * slope;
            for c in 0..e {
                dqkv[q + c] += ds * qkv[k + c];
                dqkv[k + c] += ds * qkv[q + c];
                dqkv[v + c] += p * d_o[c];
            }
        }
    }
}

/// Every row with its segment, for every head.
pub fn queries<'a>(segments: &'a [Segment], spec: &AttentionSpec) -> impl Iterator<Item = (&'a Segment, usize, usize)> {
    let heads = spec.heads;
    let rows = segments.iter().flat_map(|segment| segment.rows.clone().map(move |row| (segment, row)));
    rows.flat_map(move |(segment, row)| (0..heads).map(move |head| (segment, row, head)))
}

/// Where q, k and v of query head `head` begin in row `row` of q∣k∣v; several query heads share a key/value head.
pub fn columns(row: usize, head: usize, spec: &AttentionSpec) -> [usize; 3] {
    let kv = head * spec.kv_heads / spec.heads;
    [head, spec.heads + kv, spec.heads + spec.kv_heads + kv].map(|head| row * spec.width() + head * spec.head_dim)
}

fn key<'a>(qkv: &'a [f32], row: usize, head: usize, spec: &AttentionSpec) -> &'a [f32] {
    let [_, k, _] = columns(row, head, spec);
    &qkv[k..][..spec.head_dim]
}

/// Keys that row `i` of `segment` sees: of its prompt and of its own, none ahead where causal, none `window` positions away.
pub fn keys(segment: &Segment, i: usize, spec: &AttentionSpec) -> Vec<usize> {
    let own = segment.prompt.len() + i - segment.rows.start;
    let sees = |at: usize| (!spec.causal || at <= own) && spec.window.is_none_or(|window| at.abs_diff(own) < window);
    let sequence = segment.prompt.clone().chain(segment.rows.clone()).enumerate();
    sequence.filter(|(at, _)| sees(*at)).map(|(_, key)| key).collect()
}

/// s of q·k, and ds/d(q·k).
pub fn score(qk: f32, spec: &AttentionSpec) -> (f32, f32) {
    let s = spec.scale * qk;
    match spec.softcap {
        None => (s, spec.scale),
        Some(cap) => (cap * (s / cap).tanh(), spec.scale * (1.0 - (s / cap).tanh().powi(2))),
    }
}
