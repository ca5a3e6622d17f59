//! The whole joint step against the framework: terms, coupling weights and every LoRA gradient of both models, as
//! `scripts/golden_joint.py` computed them in float64 with torch, transformers and PEFT. Every term is on; the variants differ in
//! what the objective may be told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ares::backend::Cpu;
use ares::judge::Thresholds;
use ares::model::{Adapter, AdapterFile, AdapterGrad, HostTensor, Transformer, Workspace};
use ares::repair::objective::coupling;
use ares::repair::policy_step::{PolicyItem, PolicyTerms, policy_step};
use ares::repair::reward_step::{RewardItem, RewardKind, RewardTerms, reward_step};
use ares::repair::trainer::Half;
use ares::repair::{LogpScale, RepairConfig, RetainLoss, UnlearnLoss};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Loss terms and weights: absolute. The engine computes in f32, and a summed log-probability is about 50.
const TERM_LIMIT: f64 = 1e-5;
/// Gradients: relative to the largest element of their tensor.
const GRADIENT_LIMIT: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    policy: String,
    reward: String,
    objective: Objective,
    failures: Vec<Failure>,
    retain: Vec<Retain>,
    replay: Vec<Replay>,
    /// Of the failures that train the policy, in order.
    coupling: Vec<f64>,
    terms: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Objective {
    weights: BTreeMap<String, f64>,
    likelihood: UnlearnLoss,
    logp: LogpScale,
    b: f64,
    margin: f64,
    retain: RetainLoss,
    coupling: bool,
    tau_r: f64,
    mu_0: f64,
    s: f64,
}

#[derive(Deserialize)]
struct Failure {
    verdict: ares::judge::Verdict,
    prompt: Vec<u32>,
    rejected: Vec<u32>,
    chosen: Option<Vec<u32>>,
    /// How many tokens of `rejected` stand before `chosen`.
    forced: usize,
    /// ℓ_0(y⁻)
    logprob_0: f64,
}

#[derive(Deserialize)]
struct Retain {
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

#[derive(Deserialize)]
struct Replay {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
    /// r_0 of (chosen, rejected), where it is worth holding.
    anchors: [Option<f64>; 2],
}

/// One model with its adapter and a place for gradients.
struct Side {
    model: Transformer<Cpu>,
    adapter: Adapter<Cpu>,
    grad: AdapterGrad<Cpu>,
    workspace: Workspace<Cpu>,
    tokens: u64,
}

impl Side {
    fn open(name: &str, capacity: usize) -> Side {
        let dir = tests().join("golden").join(name);
        let model = Transformer::open(&Cpu::new(), &dir).unwrap();
        let file = AdapterFile::open(&dir.join("adapter"), &model.config).unwrap();
        let score = model.score_weights().unwrap();
        let adapter = Adapter::load(&model.ops, &model.config, &file, score.as_deref()).unwrap();
        let grad = AdapterGrad::new(&model.ops, &adapter, false).unwrap();
        let workspace = Workspace::new(&model.ops, &model.config, adapter.rank(), capacity, true).unwrap();
        Side { model, adapter, grad, workspace, tokens: 0 }
    }

    fn half(&mut self) -> Half<'_, Cpu> {
        let Side { model, adapter, grad, workspace, tokens } = self;
        Half { model, adapter, grad, workspace, tokens }
    }

    fn gradients(&self) -> BTreeMap<String, HostTensor> {
        self.adapter.gradients_to_file(&self.model.ops, &self.model.config, &self.grad).unwrap().tensors
    }
}

impl Golden {
    /// `batch_tokens` small: the step runs in several pieces; large: in one.
    fn config(&self, batch_tokens: usize) -> RepairConfig {
        let o = &self.objective;
        RepairConfig {
            unlearn: o.likelihood,
            logp: o.logp,
            retain: o.retain,
            npo_beta: o.b,
            margin: o.margin,
            lambda_npo: o.weights["npo"],
            lambda_safe: o.weights["safe"],
            lambda_retain: o.weights["retain"],
            lambda_bt: o.weights["bt"],
            lambda_center: o.weights["center"],
            lambda_replay: o.weights["replay"],
            lambda_anchor: o.weights["anchor"],
            batch_tokens,
            ..RepairConfig::default()
        }
    }

    fn thresholds(&self) -> Thresholds {
        let Objective { tau_r, mu_0, s, .. } = self.objective;
        Thresholds { tau_h: 0.5, tau_r, mu_0, s }
    }

    /// Failures first, as their r_φ(y⁻) are read for the coupling weight.
    fn reward_items(&self) -> Vec<RewardItem> {
        let failure = |f: &Failure| RewardItem {
            prompt: f.prompt.clone(),
            rejected: f.rejected.clone(),
            chosen: f.chosen.clone(),
            kind: if f.verdict.trains_reward() { RewardKind::Failure } else { RewardKind::Read },
        };
        let replay = |p: &Replay| RewardItem {
            prompt: p.prompt.clone(),
            rejected: p.rejected.clone(),
            chosen: Some(p.chosen.clone()),
            kind: RewardKind::Replay { anchors: p.anchors },
        };
        self.failures.iter().map(failure).chain(self.replay.iter().map(replay)).collect()
    }

    /// `weights`: one per failure.
    fn policy_items(&self, weights: &[f64]) -> Vec<PolicyItem> {
        let failure = |(f, &w): (&Failure, &f64)| PolicyItem {
            prompt: f.prompt.clone(),
            rejected: Some((f.rejected.clone(), f.logprob_0, w)),
            chosen: f.chosen.as_ref().map(|chosen| ([&f.rejected[..f.forced], chosen].concat(), f.forced)),
            retain: None,
        };
        let keep = |r: &Retain| PolicyItem {
            prompt: r.prompt.clone(),
            retain: Some(r.answer.clone()),
            ..PolicyItem::default()
        };
        let trained = self.failures.iter().zip(weights).filter(|(f, _)| f.verdict.trains_policy());
        trained.map(failure).chain(self.retain.iter().map(keep)).collect()
    }

    fn check_terms(&self, what: &str, policy: &PolicyTerms, reward: &RewardTerms) {
        let found = [
            ("npo", policy.npo),
            ("safe", policy.safe),
            ("retain", policy.retain),
            ("bt", reward.bt),
            ("center", reward.center),
            ("replay", reward.replay),
            ("anchor", reward.anchor),
        ];
        assert_eq!(found.len(), self.terms.len());
        for (name, found) in found {
            assert_close(&format!("{what}, term {name}"), found, self.terms[name], TERM_LIMIT);
        }
    }
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

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
    let file = tests().join(format!("golden-joint/{variant}.json"));
    let golden: Golden = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for batch_tokens in [24, 4096] {
        let what = format!("{variant}, {batch_tokens} rows at a time");
        let (mut policy, mut reward) = (Side::open(&golden.policy, 256), Side::open(&golden.reward, 256));
        let (config, thresholds) = (golden.config(batch_tokens), golden.thresholds());
        let items = golden.reward_items();
        let (reward_terms, read) = reward_step(&mut reward.half(), &items, &config, &thresholds, true).unwrap();
        let weight = |r: &f64| if golden.objective.coupling { coupling(*r, &thresholds) } else { 1.0 };
        let weights: Vec<f64> = read[..golden.failures.len()].iter().map(weight).collect();
        let trained = golden.failures.iter().zip(&weights).filter(|(f, _)| f.verdict.trains_policy());
        let found: Vec<f64> = trained.map(|(_, w)| *w).collect();
        assert_eq!(found.len(), golden.coupling.len());
        for (found, expected) in found.iter().zip(&golden.coupling) {
            assert_close(&format!("{what}, coupling"), *found, *expected, TERM_LIMIT);
        }
        let policy_terms = policy_step(&mut policy.half(), &golden.policy_items(&weights), &config).unwrap();
        golden.check_terms(&what, &policy_terms, &reward_terms);
        let expected = read_tensors(&tests().join(format!("golden-joint/{variant}.safetensors")));
        check_gradients(&what, [("policy", policy.gradients()), ("reward", reward.gradients())], expected);
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
