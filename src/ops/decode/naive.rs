//! Decoding in plain loops: attention's last row.

use crate::ops::attention::{AttentionSpec, Segment, naive as attention};

/// Overwrites `o` (h·e) of the newest of one sequence's rows `qkv` (n, (h+2k)·e).
pub fn forward(o: &mut [f32], qkv: &[f32], spec: &AttentionSpec) {
    let n = qkv.len() / spec.width();
    // The newest row answers all that came before it.
    let newest = Segment { rows: n - 1..n, prompt: 0..n - 1, seen_until: n };
    let (mut all, mut lse) = (vec![0.0; n * o.len()], vec![0.0; n * spec.heads]);
    attention::forward(&mut all, &mut lse, qkv, &[newest], spec);
    o.copy_from_slice(&all[(n - 1) * o.len()..]);
}
