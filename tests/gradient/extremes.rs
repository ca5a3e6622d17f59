//! Softmax where f32's exponential overflows, underflows or cancels.

use ares::backend::Cpu;
use ares::ops::{Attention, AttentionSpec, HeadRows, LmHead};

use super::common::*;

/// log p and log(1 − p) of the first of the given logits.
fn head(logits: &[f32]) -> (f32, f32, Vec<f32>) {
    let mut out = HeadRows { logprob: nans(1, 1), lse: nans(1, 1), log_rest: nans(1, 1) };
    let (mut dh, mut chunk) = (nans(1, 1), nans(1, logits.len()));
    let w = weight(logits.len(), logits);
    Cpu::new().lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &tensor(1, &[1.0]), &indices(&[0]), &w).unwrap();
    (values(&out.logprob)[0], values(&out.log_rest)[0], values(&dh))
}

#[test]
fn log_probabilities_at_the_ends() {
    // Sure of the target: log(1 − p) is summed, not subtracted from 1.
    let (logprob, log_rest, _) = head(&[40.0, 0.0, 0.0]);
    assert_close("log p", &[logprob], &[0.0], 1e-15);
    assert_close("log(1 - p)", &[log_rest], &[2f64.ln() - 40.0], 1e-5);
    // Sure of another token.
    let (logprob, log_rest, _) = head(&[-60.0, 30.0, -60.0]);
    assert_close("log p", &[logprob], &[-90.0], 1e-5);
    assert_close("log(1 - p)", &[log_rest], &[0.0], 1e-15);
    // Beyond the exponential's range on both sides: finite, and the gradient row too.
    for logits in [[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0], [3e4, 3e4, 3e4], [-3e4, -3e4, -3e4]] {
        let (logprob, log_rest, dh) = head(&logits);
        assert!(logprob.is_finite() && logprob <= 0.0, "{logits:?}: log p {logprob}");
        assert!(log_rest <= 0.0, "{logits:?}: log(1 - p) {log_rest}"); // −∞ where nothing is left
        assert!(dh.iter().all(|v| v.is_finite()), "{logits:?}: g {dh:?}");
    }
    let (logprob, ..) = head(&[3e4, 3e4, 3e4]);
    assert_close("three alike", &[logprob], &[-(3f64.ln())], 4e-3); // lse itself is rounded to 2⁻⁹ up there
}

#[test]
fn nan_stays_nan() {
    let (logprob, log_rest, dh) = head(&[1.0, f32::NAN, 0.0]);
    assert!(logprob.is_nan() && log_rest.is_nan() && dh[0].is_nan(), "{logprob} {log_rest} {dh:?}");
    let (logprob, ..) = head(&[f32::NAN, 1.0, 0.0]);
    assert!(logprob.is_nan(), "{logprob}");
}

#[test]
fn attention_with_scores_beyond_the_exponential() {
    let spec =
        AttentionSpec { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, window: None, softcap: None, causal: true };
    let packing = packing(&[(2, &[2])]);
    for size in [1e2, 1e3, 1e4] {
        // q, k, v per row: the last row's scores are ±size², its own key's 0.
        #[rustfmt::skip]
        let qkv = [
            size, 0.0,   size, 0.0,  1.0, 2.0,
            size, 0.0,  -size, 0.0,  3.0, 4.0,
            size, 0.0,  -size, 0.0,  5.0, 6.0,
            size, 0.0,    0.0, 0.0,  7.0, 8.0,
        ];
        let (mut o, mut lse) = (nans(4, 2), nans(4, 1));
        let qkv = tensor(6, &qkv);
        Cpu::new().attention_forward(&mut o, &mut lse, &qkv, &packing, spec).unwrap();
        assert_close("the first key takes all", &values(&o), &[1.0, 2.0].repeat(4), 0.0);
        let square = f64::from(size) * f64::from(size);
        assert_close("lse", &values(&lse), &[square; 4], 0.0);
        let mut dqkv = nans(4, 6);
        Cpu::new().attention_backward(&mut dqkv, &tensor(2, &[1.0; 8]), &o, &lse, &qkv, &packing, spec).unwrap();
        assert!(values(&dqkv).iter().all(|v| v.is_finite()), "gradients at scores of {square:e}: {:?}", values(&dqkv));
    }
}
