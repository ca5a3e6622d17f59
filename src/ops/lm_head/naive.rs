//! The language-model head in plain loops, all logits at once.

use crate::ops::product::naive as product;

/// Overwrites `logprob`, `lse`, `log_rest` (R each) and `dh` (R, C).
pub fn forward(
    logprob: &mut [f32],
    lse: &mut [f32],
    log_rest: &mut [f32],
    dh: &mut [f32],
    h: &[f32],
    targets: &[u32],
    w: &[f32],
    softcap: Option<f32>,
) {
    let (rows, cols) = (targets.len(), h.len() / targets.len());
    let vocab = w.len() / cols;
    let mut logits = vec![0.0; rows * vocab];
    product::forward(&mut logits, h, w, cols);
    let slopes = cap(&mut logits, softcap);
    for r in 0..rows {
        let (l, target) = (&mut logits[r * vocab..][..vocab], targets[r] as usize);
        let others: Vec<f32> = (0..vocab).filter(|id| *id != target).map(|id| l[id]).collect();
        lse[r] = log_sum_exp(l);
        logprob[r] = l[target] - lse[r];
        log_rest[r] = log_sum_exp(&others) - lse[r];
        // ∂log p/∂l = 1[target] − p; at the target 1 − p, which must not come out of a subtraction.
        for id in 0..vocab {
            l[id] = if id == target { log_rest[r].exp() } else { -(l[id] - lse[r]).exp() };
            l[id] *= slopes[r * vocab + id];
        }
    }
    product::backward(dh, &logits, w, cols);
}

/// Overwrites `kl` (R) with Σ π_0·(log π_0 − log π_θ) and `dh` (R, C) with (π_θ − π_0)ᵀW.
pub fn kl(kl: &mut [f32], dh: &mut [f32], h: &[f32], h0: &[f32], w: &[f32], softcap: Option<f32>) {
    let (rows, cols) = (kl.len(), h.len() / kl.len());
    let vocab = w.len() / cols;
    let (mut logits, mut logits0) = (vec![0.0; rows * vocab], vec![0.0; rows * vocab]);
    product::forward(&mut logits, h, w, cols);
    product::forward(&mut logits0, h0, w, cols);
    let slopes = cap(&mut logits, softcap);
    cap(&mut logits0, softcap);
    for r in 0..rows {
        let (l, l0) = (&mut logits[r * vocab..][..vocab], &logits0[r * vocab..][..vocab]);
        let (lse, lse0) = (log_sum_exp(l), log_sum_exp(l0));
        kl[r] = 0.0;
        for id in 0..vocab {
            let (logp, logp0) = (l[id] - lse, l0[id] - lse0);
            kl[r] += logp0.exp() * (logp0 - logp);
            l[id] = (logp.exp() - logp0.exp()) * slopes[r * vocab + id];
        }
    }
    product::backward(dh, &logits, w, cols);
}

fn log_sum_exp(l: &[f32]) -> f32 {
    let max = l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max + l.iter().map(|l| (l - max).exp()).sum::<f32>().ln()
}

/// Caps `logits`; returns ∂(capped)/∂(uncapped) of each.
fn cap(logits: &mut [f32], softcap: Option<f32>) -> Vec<f32> {
    let Some(cap) = softcap else { return vec![1.0; logits.len()] };
    let capped = |l: &mut f32| {
        let tanh = (*l / cap).tanh();
        *l = cap * tanh;
        1.0 - tanh * tanh
    };
    logits.iter_mut().map(capped).collect()
}
