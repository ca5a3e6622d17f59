//! The folders of `tests/golden`, opened on any backend, and a joint step on them told as `tests/golden-joint` tells it.

#![allow(dead_code)] // each test target uses its own part of this

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ares::judge::Thresholds;
use ares::model::{Adapter, AdapterGrad, AdapterInit, HostTensor, Keep, Transformer, Workspace};
use ares::ops::Ops;
use ares::repair::objective::coupling;
use ares::repair::policy_step::{PolicyItem, PolicyTerms, policy_step};
use ares::repair::reward_step::{RewardItem, RewardKind, RewardTerms, reward_step};
use ares::repair::side::{Half, Side};
use ares::repair::{LogpScale, RepairConfig, RetainLoss, UnlearnLoss};
use serde::Deserialize;

#[derive(Deserialize)]
pub struct Golden {
    policy: String,
    reward: String,
    objective: Objective,
    pub failures: Vec<Failure>,
    retain: Vec<Retain>,
    replay: Vec<Replay>,
    /// Of the failures that train the policy, in order.
    pub coupling: Vec<f64>,
    pub terms: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
pub struct Objective {
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
pub struct Failure {
    pub verdict: ares::judge::Verdict,
    prompt: Vec<u32>,
    rejected: Vec<u32>,
    chosen: Option<Vec<u32>>,
    /// How many tokens of `rejected` stand before `chosen`.
    forced: usize,
    /// ℓ_0(y⁻)
    logprob_0: f64,
}

#[derive(Deserialize)]
pub struct Retain {
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

#[derive(Deserialize)]
pub struct Replay {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
    /// r_0 of (chosen, rejected), where it is worth holding.
    anchors: [Option<f64>; 2],
}

/// The folder of the tests' data: ARES_TESTS where a test runs elsewhere than it was built.
pub fn tests() -> PathBuf {
    std::env::var_os("ARES_TESTS").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), PathBuf::from)
}

pub type Gradients = BTreeMap<String, HostTensor>;

/// A folder of `tests/golden`: a model with its adapter; one without gets a random one.
pub struct Opened<B: Ops> {
    pub dir: PathBuf,
    pub model: Transformer<B>,
    pub adapter: Adapter<B>,
}

impl<B: Ops> Opened<B> {
    pub fn new(ops: &B, name: &str) -> Self {
        let dir = tests().join("golden").join(name);
        let model = Transformer::open(ops, &dir).unwrap();
        let random = || model.new_adapter(12, 24.0, AdapterInit::Random { seed: 3 });
        let adapter = dir.join("adapter");
        let adapter = if adapter.is_dir() { model.open_adapter(&adapter) } else { random() }.unwrap();
        Opened { dir, model, adapter }
    }

    pub fn workspace(&self, rows: usize, keep: Keep) -> Workspace<B> {
        Workspace::new(&self.model.ops, &self.model.config, self.adapter.rank(), rows, keep).unwrap()
    }

    /// By PEFT name.
    pub fn gradients(&self, grad: &AdapterGrad<B>) -> Gradients {
        self.adapter.gradients_to_file(&self.model.ops, grad).unwrap().tensors
    }

    /// What `step` gives, and the gradients it leaves.
    pub fn train<T>(&self, step: impl FnOnce(&mut Half<'_, B>) -> T) -> (T, Gradients) {
        let mut side = Side::new(&self.model, &self.adapter, false).unwrap();
        let mut workspace = self.workspace(256, Keep::Everything);
        let given = step(&mut Half::new(&self.model, &self.adapter, &mut side, &mut workspace).unwrap());
        (given, self.gradients(&side.grad))
    }
}

impl Golden {
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
            paired: None,
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
}

/// What one joint step says.
pub struct Step {
    pub policy: PolicyTerms,
    pub reward: RewardTerms,
    /// One coupling weight per failure.
    pub weights: Vec<f64>,
    pub gradients: [(&'static str, Gradients); 2],
}

impl Golden {
    pub fn open(variant: &str) -> Golden {
        let file = tests().join(format!("golden-joint/{variant}.json"));
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    }

    /// The same objective on the weakened suite's models, which are four times as wide.
    pub fn of_the_suite(self) -> Golden {
        let [policy, reward] = ["policy", "reward"].map(|side| format!("../../models/framing/{side}"));
        Golden { policy, reward, ..self }
    }

    /// The step at `batch_tokens` rows at a time: small, it runs in several pieces.
    pub fn step<B: Ops>(&self, ops: &B, batch_tokens: usize) -> Step {
        let (config, thresholds, items) = (self.config(batch_tokens), self.thresholds(), self.reward_items());
        let ((reward, read), reward_gradients) =
            Opened::new(ops, &self.reward).train(|half| reward_step(half, &items, &config, &thresholds, true).unwrap());
        let trains = |f: &Failure| f.verdict.trains_policy();
        let read: Vec<f64> = self.failures.iter().zip(read).filter(|(f, _)| trains(f)).map(|(_, r)| r).collect();
        let (coupled, _) = coupling(&read, &thresholds);
        let mut coupled = coupled.into_iter().filter(|_| self.objective.coupling);
        // Those that train no policy term have no weight.
        let weight = |f: &Failure| if trains(f) { coupled.next().unwrap_or(1.0) } else { f64::NAN };
        let weights: Vec<f64> = self.failures.iter().map(weight).collect();
        let items = self.policy_items(&weights);
        let (policy, policy_gradients) =
            Opened::new(ops, &self.policy).train(|half| policy_step(half, &items, &config).unwrap());
        Step { policy, reward, weights, gradients: [("policy", policy_gradients), ("reward", reward_gradients)] }
    }
}
