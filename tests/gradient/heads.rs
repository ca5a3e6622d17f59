//! Rows by index, the language-model head with its three statistics, KL, and the score head.

use ares::backend::Cpu;
use ares::ops::{HeadRows, LmHead, Rows, ScoreHead};

use super::common::*;
use super::{added, assert_gradient, functional};

/// Rows, vocabulary, width; the chunk holds 5 rows, so that the last chunk is short.
const R: usize = 13;
const V: usize = 41;
const C: usize = 11;
const CHUNK: usize = 5;

#[test]
fn scatter_is_the_gradient_of_gather() {
    let (cpu, all) = (Cpu::new(), 9);
    let rows = indices(&[7, 0, 4, 8]);
    let (x, c) = (noise(1, all * C), noise(2, 4 * C));
    let mut dx = nans(all, C);
    cpu.scatter(&mut dx, &tensor(C, &c), &rows).unwrap();
    assert_gradient("gather dx", &values(&dx), &x, |x| {
        let mut y = nans(4, C);
        cpu.gather(&mut y, &tensor(C, x), &rows).unwrap();
        functional(&c, &values(&y))
    });
}

fn targets() -> Vec<u32> {
    (0..R as u32).map(|r| (r * 17 + 3) % V as u32).collect()
}

/// A head over `h`: log p, lse and log(1 − p) per row, and the rows g.
fn head(h: &[f32], w: &[f32]) -> (HeadRows<Cpu>, Vec<f32>) {
    let mut out = HeadRows { logprob: nans(R, 1), lse: nans(R, 1), log_rest: nans(R, 1) };
    let mut dh = nans(R, C);
    let (mut chunk, w) = (nans(CHUNK, V), weight(V, w));
    chunk.set_rows(0).unwrap(); // scratch: only its capacity counts
    Cpu::new().lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &tensor(C, h), &indices(&targets()), &w).unwrap();
    (out, values(&dh))
}

/// `factor(row)` times each row of `g`, by the op that losses use.
fn scaled(g: &[f32], factor: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut y = tensor(C, g);
    let weights: Vec<f32> = (0..R).map(factor).collect();
    Cpu::new().scale_rows(&mut y, &tensor(1, &weights)).unwrap();
    values(&y)
}

/// Logits of row `r` in f64.
fn logits(h: &[f32], w: &[f32], r: usize) -> Vec<f64> {
    w.chunks(C).map(|w| functional(&h[r * C..][..C], w)).collect()
}

fn lse(logits: &[f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
}

#[test]
fn lm_head() {
    let (h, w, c) = (noise(10, R * C), noise(11, V * C), noise(12, R));
    let (out, g) = head(&h, &w);
    let (logprob, lses, log_rest) = (values(&out.logprob), values(&out.lse), values(&out.log_rest));
    for r in 0..R {
        let (row, target) = (logits(&h, &w, r), targets()[r] as usize);
        let others: Vec<f64> = row.iter().enumerate().filter(|(id, _)| *id != target).map(|(_, l)| *l).collect();
        let expected = [row[target] - lse(&row), lse(&row), lse(&others) - lse(&row)];
        assert_close(&format!("row {r}"), &[logprob[r], lses[r], log_rest[r]], &expected, 2e-6);
    }
    // ∂ log p = g, ∂ log(1 − p) = −p/(1 − p)·g, ∂ lse = W[y] − g
    assert_gradient("log p", &scaled(&g, |r| c[r]), &h, |h| functional(&c, &values(&head(h, &w).0.logprob)));
    let odds = scaled(&g, |r| -c[r] * (logprob[r] - log_rest[r]).exp());
    assert_gradient("log(1 - p)", &odds, &h, |h| functional(&c, &values(&head(h, &w).0.log_rest)));
    let rows: Vec<f32> =
        targets().iter().flat_map(|y| &w[*y as usize * C..][..C]).zip(&g).map(|(w, g)| w - g).collect();
    assert_gradient("lse", &scaled(&rows, |r| c[r]), &h, |h| functional(&c, &values(&head(h, &w).0.lse)));
}

#[test]
fn lm_head_gives_the_same_numbers_without_gradient_rows() {
    let (h, w) = (noise(13, R * C), noise(14, V * C));
    let (out, _) = head(&h, &w);
    let mut alone = HeadRows { logprob: nans(R, 1), lse: nans(R, 1), log_rest: nans(R, 1) };
    let (mut chunk, w) = (nans(64, V), weight(V, &w));
    Cpu::new().lm_head_forward(&mut alone, None, &mut chunk, &tensor(C, &h), &indices(&targets()), &w).unwrap();
    for (a, b) in [(&out.logprob, &alone.logprob), (&out.lse, &alone.lse), (&out.log_rest, &alone.log_rest)] {
        assert_eq!(bits(&values(a)), bits(&values(b)), "another chunk size, no gradient rows");
    }
}

/// KL(π_0 ‖ π_θ) per row and its gradient rows.
fn kl(h: &[f32], h0: &[f32], w: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut kl, mut dh, mut chunk, mut chunk0) = (nans(R, 1), nans(R, C), nans(CHUNK, V), nans(CHUNK + 2, V));
    let (h, h0, w) = (tensor(C, h), tensor(C, h0), weight(V, w));
    Cpu::new().lm_head_kl(&mut kl, &mut dh, &mut chunk, &mut chunk0, &h, &h0, &w).unwrap();
    (values(&kl), values(&dh))
}

#[test]
fn lm_head_kl() {
    let (h, h0, w, c) = (noise(20, R * C), noise(21, R * C), noise(22, V * C), noise(23, R));
    let (found, dh) = kl(&h, &h0, &w);
    let expected: Vec<f64> = (0..R)
        .map(|r| {
            let (l, l0) = (logits(&h, &w, r), logits(&h0, &w, r));
            let (z, z0) = (lse(&l), lse(&l0));
            l.iter().zip(&l0).map(|(l, l0)| (l0 - z0).exp() * ((l0 - z0) - (l - z))).sum()
        })
        .collect();
    assert_close("KL", &found, &expected, 2e-6);
    assert_gradient("KL dh", &scaled(&dh, |r| c[r]), &h, |h| functional(&c, &kl(h, &h0, &w).0));

    let (same, dh) = kl(&h, &h, &w);
    assert_close("KL of a model with itself", &same, &[0.0; R], 1e-9);
    assert_close("its gradient", &dh, &[0.0; R * C], 1e-9);
}

#[test]
fn score_head() {
    let cpu = Cpu::new();
    for labels in [1, 3] {
        let (h, w, c) = (noise(30, R * C), noise(31, labels * C), noise(32, R * labels));
        let f = |h: &[f32], w: &[f32]| {
            let mut r = nans(R, labels);
            cpu.score_forward(&mut r, &tensor(C, h), &tensor(C, w)).unwrap();
            functional(&c, &values(&r))
        };
        let (mut dh, mut dw) = (nans(R, C), parameter(C, &noise(33, labels * C)));
        let (dr, h_saved, w_saved) = (tensor(labels, &c), tensor(C, &h), tensor(C, &w));
        cpu.score_backward(&mut dh, Some(&mut dw), &dr, &h_saved, &w_saved).unwrap();
        assert_gradient("score_head dh", &values(&dh), &h, |h| f(h, &w));
        assert_gradient("score_head dw", &added(&dw.buffer, 33), &w, |w| f(&h, w));
        let mut frozen = nans(R, C);
        cpu.score_backward(&mut frozen, None, &dr, &h_saved, &w_saved).unwrap();
        assert_eq!(bits(&values(&frozen)), bits(&values(&dh)), "dh of a frozen head");
    }
}
