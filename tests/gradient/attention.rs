//! Attention over packed groups, in every kind that a family may ask for.

use ares::backend::Cpu;
use ares::ops::{Attention, AttentionSpec, Packing};

use super::common::*;
use super::{assert_gradient, functional};

/// A group with a shared prompt and three answers, a lone sequence, a prompt without answer, a prompt of one row.
const GROUPS: &[Group] = &[(5, &[3, 7, 1]), (0, &[9]), (4, &[]), (1, &[2, 2])];

fn plain() -> AttentionSpec {
    AttentionSpec { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, window: None, softcap: None, causal: true }
}

fn kinds() -> Vec<(&'static str, AttentionSpec)> {
    vec![
        ("causal", plain()),
        ("one key/value head per query head", AttentionSpec { kv_heads: 4, ..plain() }),
        ("one key/value head for all", AttentionSpec { kv_heads: 1, head_dim: 5, ..plain() }),
        ("window", AttentionSpec { window: Some(4), ..plain() }),
        ("window of one", AttentionSpec { window: Some(1), ..plain() }),
        ("softcap", AttentionSpec { softcap: Some(0.9), ..plain() }),
        ("window and softcap", AttentionSpec { window: Some(3), softcap: Some(0.9), ..plain() }),
        ("both directions", AttentionSpec { causal: false, ..plain() }),
        ("both directions, window", AttentionSpec { causal: false, window: Some(3), ..plain() }),
        ("both directions, window of one", AttentionSpec { causal: false, window: Some(1), ..plain() }),
        (
            "both directions, window and softcap",
            AttentionSpec { causal: false, window: Some(2), softcap: Some(0.9), ..plain() },
        ),
    ]
}

/// o and lse.
fn forward(qkv: &[f32], packing: &Packing<Cpu>, spec: AttentionSpec) -> (Vec<f32>, Vec<f32>) {
    let rows = packing.rows();
    let (mut o, mut lse) = (nans(rows, spec.heads * spec.head_dim), nans(rows, spec.heads));
    Cpu::new().attention_forward(&mut o, &mut lse, &tensor(spec.width(), qkv), packing, spec).unwrap();
    (values(&o), values(&lse))
}

/// The definition, in f64, one row and one head at a time.
fn definition(qkv: &[f32], packing: &Packing<Cpu>, spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    let part = |row: usize, which: usize, head: usize| &qkv[row * spec.width()..][columns(spec, which, head)];
    for i in 0..packing.rows() {
        for head in 0..spec.heads {
            let kv = head * spec.kv_heads / spec.heads;
            let keys = keys_of(packing, i, spec);
            let score = |j: &usize| {
                let s = f64::from(spec.scale) * functional(part(i, 0, head), part(*j, 1, kv));
                spec.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
            };
            let exps: Vec<f64> = keys.iter().map(|j| score(j).exp()).collect();
            let sum: f64 = exps.iter().sum();
            lse.push(sum.ln());
            o.extend((0..spec.head_dim).map(|c| {
                let terms = keys.iter().zip(&exps).map(|(j, p)| p * f64::from(part(*j, 2, kv)[c]));
                terms.sum::<f64>() / sum
            }));
        }
    }
    (o, lse)
}

#[test]
fn forward_is_the_definition() {
    let packing = packing(GROUPS);
    for (kind, spec) in kinds() {
        let qkv: Vec<f32> = noise(1, packing.rows() * spec.width()).iter().map(|v| 2.0 * v).collect();
        let (o, lse) = forward(&qkv, &packing, spec);
        let (o_expected, lse_expected) = definition(&qkv, &packing, &spec);
        assert_close(&format!("{kind}: o"), &o, &o_expected, 2e-6);
        assert_close(&format!("{kind}: lse"), &lse, &lse_expected, 4e-6);
    }
}

#[test]
fn backward_is_the_gradient() {
    let (cpu, packing) = (Cpu::new(), packing(GROUPS));
    let rows = packing.rows();
    for (kind, spec) in kinds() {
        let columns = spec.heads * spec.head_dim;
        let (qkv, c) = (noise(2, rows * spec.width()), noise(3, rows * columns));
        let (o, lse) = forward(&qkv, &packing, spec);
        let (d_o, o, lse) = (tensor(columns, &c), tensor(columns, &o), tensor(spec.heads, &lse));
        let mut dqkv = nans(rows, spec.width());
        cpu.attention_backward(&mut dqkv, &d_o, &o, &lse, &tensor(spec.width(), &qkv), &packing, spec).unwrap();
        assert_gradient(kind, &values(&dqkv), &qkv, |qkv| functional(&c, &forward(qkv, &packing, spec).0));
    }
}
