//! The whole joint step against the framework: terms, coupling weights and every LoRA gradient of both models, as
//! `scripts/golden_joint.py` computed them in float64 with torch, transformers and PEFT. Every term is on; the variants differ in
//! what the objective may be told.

#[path = "common/joint.rs"]
mod joint;

use std::collections::BTreeMap;
use std::path::Path;

use ares::backend::Cpu;
use ares::model::HostTensor;
use joint::{Golden, Step, tests};
use safetensors::SafeTensors;

/// Loss terms and weights: absolute. The engine computes in f32, and a summed log-probability is about 50.
const TERM_LIMIT: f64 = 1e-5;
/// Gradients: relative to the largest element of their tensor.
const GRADIENT_LIMIT: f64 = 1e-4;

/// NaN is never close.
fn assert_close(what: &str, found: f64, expected: f64, limit: f64) {
    let difference = (found - expected).abs();
    assert!(difference <= limit, "{what}: expected {expected}, found {found}, apart {difference:e}");
}

#[test]
fn npo_with_mean_logprobs() {
    check("npo");
}

#[test]
fn npo_with_sums_and_kl() {
    check("sum-kl");
}

#[test]
fn unlikelihood_uncoupled() {
    check("unlikelihood");
}

fn check(variant: &str) {
    let golden = Golden::open(variant);
    for batch_tokens in [24, 4096] {
        let what = format!("{variant}, {batch_tokens} rows at a time");
        let step = golden.step(&Cpu::new(), batch_tokens);
        let trained = golden.failures.iter().zip(&step.weights).filter(|(f, _)| f.verdict.trains_policy());
        let found: Vec<f64> = trained.map(|(_, w)| *w).collect();
        assert_eq!(found.len(), golden.coupling.len());
        for (found, expected) in found.iter().zip(&golden.coupling) {
            assert_close(&format!("{what}, coupling"), *found, *expected, TERM_LIMIT);
        }
        check_terms(&what, &golden, &step);
        let expected = read_tensors(&tests().join(format!("golden-joint/{variant}.safetensors")));
        check_gradients(&what, step.gradients, expected);
    }
}

fn check_terms(what: &str, golden: &Golden, step: &Step) {
    let (policy, reward) = (&step.policy, &step.reward);
    let found = [
        ("npo", policy.npo),
        ("safe", policy.safe),
        ("retain", policy.retain),
        ("bt", reward.bt),
        ("center", reward.center),
        ("replay", reward.replay),
        ("anchor", reward.anchor),
    ];
    assert_eq!(found.len(), golden.terms.len());
    for (name, found) in found {
        assert_close(&format!("{what}, term {name}"), found, golden.terms[name], TERM_LIMIT);
    }
}

/// Every gradient of the file, and no other.
fn check_gradients(
    what: &str,
    found: [(&str, BTreeMap<String, HostTensor>); 2],
    mut expected: BTreeMap<String, HostTensor>,
) {
    for (side, tensors) in found {
        for (name, found) in tensors {
            let what = format!("{what}, d {side}.{name}");
            let expected = expected.remove(&format!("{side}.{name}")).unwrap_or_else(|| panic!("{what}: unexpected"));
            assert_eq!(found.shape, expected.shape, "{what}");
            let largest = expected.data.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            assert!(largest > 0.0, "{what}: a gradient of zeros proves nothing");
            for (found, expected) in found.data.iter().zip(&expected.data) {
                assert_close(&what, (*found).into(), (*expected).into(), GRADIENT_LIMIT * f64::from(largest));
            }
        }
    }
    assert!(expected.is_empty(), "{what}: the engine lacks gradients of {:?}", expected.keys());
}

fn read_tensors(file: &Path) -> BTreeMap<String, HostTensor> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, view): (String, safetensors::tensor::TensorView)| {
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (name, HostTensor { shape: view.shape().to_vec(), data })
    };
    tensors.tensors().into_iter().map(read).collect()
}
