//! Sampling in plain loops.

use super::{SampleSpec, uniform};
use crate::ops::product::naive as product;

/// Overwrites `tokens` (S) from hidden rows `h` (S, C); row i draws with (seed, `ids[i]`, `positions[i]`), and is V where a logit is
/// not finite.
pub fn forward(
    tokens: &mut [u32],
    h: &[f32],
    ids: &[u64],
    positions: &[u32],
    w: &[f32],
    softcap: Option<f32>,
    spec: SampleSpec,
) {
    let cols = h.len() / tokens.len();
    let mut logits = vec![0.0; w.len() / cols];
    for i in 0..tokens.len() {
        product::forward(&mut logits, &h[i * cols..][..cols], w, cols);
        if !logits.iter().all(|l| l.is_finite()) {
            tokens[i] = logits.len() as u32;
            continue;
        }
        if let Some(cap) = softcap {
            logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
        }
        let u = uniform(spec.seed, [ids[i] as u32, (ids[i] >> 32) as u32], positions[i]);
        tokens[i] = draw(&distribution(&logits, spec), u);
    }
}

/// The token at which the running sum of probabilities passes `u`.
fn draw(kept: &[(u32, f64)], u: f32) -> u32 {
    let mut sum = 0.0;
    let passed = kept.iter().find(|(_, p)| {
        sum += p;
        sum > f64::from(u)
    });
    passed.or(kept.last()).expect("a vocabulary has tokens").0
}

/// The tokens that may be drawn and their probabilities: by id where all are kept, else from the largest down.
pub fn distribution(logits: &[f32], spec: SampleSpec) -> Vec<(u32, f64)> {
    let mut tokens: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|l| f64::from(*l))).collect();
    let largest = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if spec.temperature == 0.0 {
        tokens.sort_by(largest);
        return vec![(tokens[0].0, 1.0)];
    }
    let max = tokens.iter().map(|(_, l)| *l).fold(f64::NEG_INFINITY, f64::max);
    for (_, weight) in &mut tokens {
        *weight = ((*weight - max) / f64::from(spec.temperature)).exp();
    }
    let total = |tokens: &[(u32, f64)]| tokens.iter().map(|(_, weight)| weight).sum::<f64>();
    if spec.top_k > 0 || spec.top_p < 1.0 {
        tokens.sort_by(largest);
        tokens.truncate(if spec.top_k > 0 { spec.top_k } else { tokens.len() });
        let (enough, mut sum) = (f64::from(spec.top_p) * total(&tokens), 0.0);
        let kept = tokens.iter().take_while(|(_, weight)| {
            let more = sum < enough;
            sum += weight;
            more
        });
        tokens.truncate(kept.count().max(1));
    }
    let all = total(&tokens);
    tokens.into_iter().map(|(id, weight)| (id, weight / all)).collect()
}
