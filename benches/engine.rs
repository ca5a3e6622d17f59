//! Scoring, one joint step, and generation, each as a share of its bound: the time that the FLOPs of its products (and for
//! generation the bytes of its weights) need at rates measured here, on this machine and beside it, divided by the time it took.
//!
//! `cargo bench --bench engine -- step` runs those whose name holds `step`. The shares are printed at the end.

mod checkpoint;
mod rates;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ares::backend::Cpu;
use ares::judge::Thresholds;
use ares::model::{
    Adapter, AdapterGrad, AdapterInit, AnswerTokens, Batch, Continue, Decoding, Generator, Heads, ModelConfig, Moments,
    Transformer, Workspace,
};
use ares::ops::{AdamWSpec, Cost, attention, decode, lm_head, lora};
use ares::repair::RepairConfig;
use ares::repair::policy_step::{PolicyItem, policy_step};
use ares::repair::reward_step::{RewardItem, RewardKind, reward_step};
use ares::repair::side::Half;
use criterion::{Criterion, criterion_group, criterion_main};
use rates::Bench;

const ACT: u64 = size_of::<f32>() as u64;
const RANK: usize = 16;
/// Sequences generated side by side, and how far.
const SLOTS: usize = 64;
const NEW_TOKENS: usize = 16;

/// A pair of models and the lengths of what it reads.
struct Shape {
    name: &'static str,
    policy: PathBuf,
    reward: PathBuf,
    /// Prompts of a step; each has two answers.
    prompts: usize,
    prompt: usize,
    answer: usize,
}

fn engine(criterion: &mut Criterion) {
    let mut bench = Bench::new(criterion);
    let folder = tempfile::tempdir().unwrap();
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/framing");
    checkpoint::write(&folder.path().join("policy"), false);
    checkpoint::write(&folder.path().join("reward"), true);
    let shapes = [
        Shape {
            name: "suite",
            policy: suite.join("policy"),
            reward: suite.join("reward"),
            prompts: 16,
            prompt: 31,
            answer: 25,
        },
        Shape {
            name: "0.5B, 4 layers",
            policy: folder.path().join("policy"),
            reward: folder.path().join("reward"),
            prompts: 2,
            prompt: 30,
            answer: 34,
        },
    ];
    for shape in &shapes {
        score(&mut bench, shape);
        step(&mut bench, shape);
        generate(&mut bench, shape);
    }
    bench.print();
}

/// `count` token ids of one sequence among many.
fn tokens(seed: usize, count: usize) -> Vec<u32> {
    (0..count).map(|i| 10 + ((seed * 7919 + i * 104_729) % 900) as u32).collect()
}

/// Products of all blocks and attention, forward only. `rank` 0: no adapter.
fn trunk(config: &ModelConfig, rows: u64, pairs: u64, rank: u64) -> Cost {
    let products = products(config).map(|(n, k, parts)| lora::forward_cost(rows, n, k, parts, rank, ACT));
    let (heads, kv_heads, e) = (config.heads as u64, config.kv_heads as u64, config.head_dim as u64);
    let block = products.into_iter().fold(attention::forward_cost(rows, pairs, heads, kv_heads, e, ACT), |a, b| a + b);
    flops(times(block, config.layers as u64))
}

/// Activations stay in caches or not: only products count.
fn flops(cost: Cost) -> Cost {
    Cost { bytes: 0, ..cost }
}

/// The same, backward.
fn trunk_backward(config: &ModelConfig, rows: u64, pairs: u64) -> Cost {
    let products = products(config).map(|(n, k, parts)| lora::backward_cost(rows, n, k, parts, RANK as u64, ACT));
    let (heads, kv_heads, e) = (config.heads as u64, config.kv_heads as u64, config.head_dim as u64);
    let block = products.into_iter().fold(attention::backward_cost(rows, pairs, heads, kv_heads, e, ACT), |a, b| a + b);
    flops(times(block, config.layers as u64))
}

/// (outputs, inputs, projections) of a block's four products.
fn products(config: &ModelConfig) -> [(u64, u64, u64); 4] {
    let (c, f, e) = (config.hidden_size as u64, config.intermediate_size as u64, config.head_dim as u64);
    let (q, kv) = (config.heads as u64 * e, config.kv_heads as u64 * e);
    [(q + 2 * kv, c, 3), (c, q, 1), (2 * f, c, 2), (c, f, 1)]
}

fn times(cost: Cost, count: u64) -> Cost {
    Cost { flops: cost.flops * count, bytes: cost.bytes * count }
}

fn open(dir: &Path) -> Transformer<Cpu> {
    Transformer::open(&Cpu::new(), dir).unwrap()
}

/// Both answers of every prompt, scored in one packed batch.
fn score(bench: &mut Bench, shape: &Shape) {
    let model = open(&shape.reward);
    let mut batch = Batch::default();
    for i in 0..shape.prompts {
        let answers = [tokens(3 * i + 1, shape.answer), tokens(3 * i + 2, shape.answer)];
        batch.push(&tokens(3 * i, shape.prompt), &answers.each_ref().map(|a| AnswerTokens::new(a)), Heads::Ends);
    }
    let mut ws = Workspace::new(&model.ops, &model.config, 0, batch.len(), false).unwrap();
    let cost = trunk(&model.config, batch.len() as u64, batch.pairs(), 0);
    bench.time(&format!("{}/score", shape.name), cost, || {
        model.forward_scores(&mut ws, &batch, None).unwrap();
    });
}

/// A model in training.
struct Side {
    model: Transformer<Cpu>,
    adapter: Adapter<Cpu>,
    grad: AdapterGrad<Cpu>,
    moments: Moments<Cpu>,
    workspace: Workspace<Cpu>,
    tokens: u64,
}

impl Side {
    fn open(dir: &Path, rows: usize) -> Side {
        let model = open(dir);
        let (init, score) = (AdapterInit::Random { seed: 1 }, model.score_weights().unwrap());
        let adapter = Adapter::new(&model.ops, &model.config, RANK, 32.0, init, score.as_deref()).unwrap();
        let grad = AdapterGrad::new(&model.ops, &adapter, false).unwrap();
        let moments = Moments::new(&model.ops, &adapter).unwrap();
        let workspace = Workspace::new(&model.ops, &model.config, RANK, rows, true).unwrap();
        Side { model, adapter, grad, moments, workspace, tokens: 0 }
    }

    fn half(&mut self) -> Half<'_, Cpu> {
        self.grad.clear(&self.model.ops).unwrap();
        let Side { model, adapter, grad, workspace, tokens, .. } = self;
        Half { model, adapter, grad, workspace, tokens }
    }

    fn update(&mut self) {
        // A step too small to lead anywhere: every repeat does the same work.
        let spec = AdamWSpec { lr: 1e-9, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.0, clip: 1.0, step: 9 };
        self.moments.step(&self.model.ops, &mut self.adapter, &self.grad, spec).unwrap();
    }
}

/// Failures with both answers, as many validated pairs and as many answers to retain: every term of the objective.
fn step(bench: &mut Bench, shape: &Shape) {
    let config = RepairConfig { batch_tokens: 2048, ..RepairConfig::default() };
    let thresholds = Thresholds { tau_h: 0.5, tau_r: 0.0, mu_0: 0.0, s: 1.0 };
    let (rewards, policies) = (reward_items(shape), policy_items(shape));
    let [mut policy, mut reward] = [&shape.policy, &shape.reward].map(|dir| Side::open(dir, config.batch_tokens));
    let cost = step_cost(&policy.model.config, &reward.model.config, &policies, &rewards);
    bench.time(&format!("{}/step", shape.name), cost, || {
        reward_step(&mut reward.half(), &rewards, &config, &thresholds, true).unwrap();
        policy_step(&mut policy.half(), &policies, &config).unwrap();
        reward.update();
        policy.update();
    });
}

fn reward_items(shape: &Shape) -> Vec<RewardItem> {
    let item = |i: usize, kind| RewardItem {
        prompt: tokens(3 * i, shape.prompt),
        rejected: tokens(3 * i + 1, shape.answer),
        chosen: Some(tokens(3 * i + 2, shape.answer)),
        kind,
    };
    let n = shape.prompts;
    let replay = RewardKind::Replay { anchors: [Some(0.1), Some(-0.1)] };
    (0..n).map(|i| item(i, RewardKind::Failure)).chain((n..2 * n).map(|i| item(i, replay))).collect()
}

fn policy_items(shape: &Shape) -> Vec<PolicyItem> {
    let failure = |i: usize| PolicyItem {
        prompt: tokens(3 * i, shape.prompt),
        rejected: Some((tokens(3 * i + 1, shape.answer), -2.0, 1.0)),
        chosen: Some((tokens(3 * i + 2, shape.answer), 0)),
        retain: None,
    };
    let retain = |i: usize| PolicyItem {
        prompt: tokens(3 * i, shape.prompt),
        retain: Some(tokens(3 * i + 1, shape.answer)),
        ..PolicyItem::default()
    };
    let n = shape.prompts;
    (0..n).map(failure).chain((n..2 * n).map(retain)).collect()
}

/// Forward and backward of both models, and of the language model's head.
fn step_cost(policy: &ModelConfig, reward: &ModelConfig, policies: &[PolicyItem], rewards: &[RewardItem]) -> Cost {
    let (mut of_policy, mut of_reward) = (Batch::default(), Batch::default());
    for item in policies {
        let answers = [item.rejected.as_ref().map(|r| &r.0), item.chosen.as_ref().map(|c| &c.0), item.retain.as_ref()];
        let answers: Vec<_> = answers.into_iter().flatten().map(|a| AnswerTokens::new(a)).collect();
        of_policy.push(&item.prompt, &answers, Heads::Targets);
    }
    for item in rewards {
        let answers: Vec<_> = [&item.rejected].into_iter().chain(&item.chosen).map(|a| AnswerTokens::new(a)).collect();
        of_reward.push(&item.prompt, &answers, Heads::Ends);
    }
    let both = |config: &ModelConfig, batch: &Batch| {
        let (rows, pairs) = (batch.len() as u64, batch.pairs());
        trunk(config, rows, pairs, RANK as u64) + trunk_backward(config, rows, pairs)
    };
    let (vocab, c) = (policy.vocab_size as u64, policy.hidden_size as u64);
    let head = lm_head::cost(of_policy.rows.len() as u64, vocab, c, ACT);
    both(policy, &of_policy) + both(reward, &of_reward) + flops(head)
}

/// `SLOTS` answers of `NEW_TOKENS` tokens, greedy: prompts at once, then one token of each at a time.
fn generate(bench: &mut Bench, shape: &Shape) {
    let model = open(&shape.policy);
    let (ops, config) = (&model.ops, &model.config);
    let request = |id: usize| Continue { tokens: tokens(id, shape.prompt), forced: 0, id: id as u64 };
    let requests: Vec<Continue> = (0..SLOTS).map(request).collect();
    let decoding = Decoding { ignore_eos: true, ..Decoding::greedy(NEW_TOKENS) };
    let rows = SLOTS * shape.prompt;
    let mut ws = Workspace::new(ops, config, 0, rows, false).unwrap();
    let mut generator = Generator::new(ops, config, SLOTS, shape.prompt + NEW_TOKENS + 1, rows).unwrap();
    let cost = generate_cost(config, shape.prompt as u64);
    bench.time(&format!("{}/generate", shape.name), cost, || {
        model.generate(&mut ws, &mut generator, &requests, None, &decoding, |_| Ok(())).unwrap();
    });
}

/// The prompts' forward, then per token the blocks' products, attention through the cache, and the head.
fn generate_cost(config: &ModelConfig, prompt: u64) -> Cost {
    let slots = SLOTS as u64;
    let spec = attention_spec(config);
    let mut cost = trunk(config, slots * (prompt - 1), slots * prompt * (prompt - 1) / 2, 0);
    for at in prompt..prompt + NEW_TOKENS as u64 {
        let products = products(config).map(|(n, k, parts)| lora::forward_cost(slots, n, k, parts, 0, ACT));
        let block = products.into_iter().fold(decode::cost(slots, slots * at, &spec, ACT), |a, b| a + b);
        let head = lora::forward_cost(slots, config.vocab_size as u64, config.hidden_size as u64, 0, 0, ACT);
        cost = cost + times(block, config.layers as u64) + head;
    }
    cost
}

fn attention_spec(config: &ModelConfig) -> ares::ops::AttentionSpec {
    let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
    ares::ops::AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, window: None, softcap: None, causal: true }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = engine
}
criterion_main!(benches);
