//! The optimiser loop. A step: reward model forward and backward (the coupling weight needs r_φ), then the policy, so that only
//! one model's activations live; then AdamW on each.

use std::collections::{BTreeMap, BTreeSet};

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::config::{Coupling, Method, Phase, Recipe};
use super::data::Shuffle;
use super::objective::coupling;
use super::policy_step::{PolicyItem, policy_step};
use super::prepared::{Prepared, PreparedFailure};
use super::reward_step::{RewardItem, RewardKind, reward_step};
use super::room;
use super::side::{Half, Side};
use crate::error::{Error, Result};
use crate::judge::{Judge, Thresholds};
use crate::model::{AdapterInit, Decoding, Pair, Pretrained, Workspace};
use crate::ops::{AdamWSpec, Ops};

mod state;

/// Tokens of y⁻ that may stand before y⁺ at most.
const LONGEST_PREFIX: usize = 32;

/// One optimiser step of one method: a line of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepMetrics {
    pub method: String,
    pub seed: u64,
    /// From 1.
    pub step: u64,
    /// Of the models that were trained: loss terms, unweighted, by the names that the method gives them; `coupling`, the mean weight before it is divided by it;
    /// `sample_reward`, the mean of `rlhf`'s samples under the unrepaired reward model; `loss`, what was minimised.
    pub terms: BTreeMap<String, Option<f64>>,
    /// Mean over the step's failures of ℓ(y⁺) and ℓ(y⁻), each the mean log-probability per token.
    pub logp_chosen: Option<f64>,
    pub logp_rejected: Option<f64>,
    /// Before clipping, per model.
    pub grad_norm_policy: Option<f64>,
    pub grad_norm_reward: Option<f64>,
    /// Of the whole step, resampling and generation included.
    pub seconds: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// Of a loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round: Option<u64>,
}

impl StepMetrics {
    /// What was minimised.
    pub fn loss(&self) -> f64 {
        self.terms.get("loss").copied().flatten().unwrap_or(f64::NAN)
    }

    fn add_loss(&mut self, loss: f64) {
        let sum = self.terms.entry("loss".into()).or_insert(Some(0.0));
        *sum = sum.map(|sum| sum + loss);
    }

    pub(super) fn add<const N: usize>(&mut self, terms: [(&str, f64); N]) {
        self.terms.extend(terms.map(|(name, value)| (name.to_string(), Some(value))));
    }
}

/// What a repair cost and how it went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RepairOutcome {
    pub steps: usize,
    pub(crate) tokens_policy: u64,
    pub(crate) tokens_reward: u64,
    pub(crate) tokens_generated: u64,
    pub(crate) seconds: f64,
    pub(crate) warnings: Vec<String>,
    #[serde(skip)]
    pub history: Vec<StepMetrics>,
}

/// What a repair works on: the pair, who judges its answers, and the scale of its rewards.
pub struct Setting<'a, B: Ops> {
    pub pair: &'a mut Pair<B>,
    pub judge: &'a mut dyn Judge,
    pub thresholds: Thresholds,
    pub decoding: Decoding,
}

/// One method at work on one pair. The adapters live in the pair: its `Current` version is what is being trained.
pub struct Trainer<'a, B: Ops> {
    pub(super) pair: &'a mut Pair<B>,
    pub(super) judge: &'a mut dyn Judge,
    pub(super) data: Prepared,
    pub(super) config: Recipe,
    pub(super) thresholds: Thresholds,
    pub(super) decoding: Decoding,
    pub(super) policy: Option<Side<B>>,
    pub(super) reward: Option<Side<B>>,
    /// What both run in, in turn.
    pub(super) workspace: Workspace<B>,
    pub(super) outcome: RepairOutcome,
    pub(super) failures: Shuffle,
    reward_failures: Shuffle,
    method: Method,
    pub(super) retain: Shuffle,
    replay: Shuffle,
    prefixes: ChaCha8Rng,
    /// Permutes coupling weights.
    weights: ChaCha8Rng,
}

impl<'a, B: Ops> Trainer<'a, B> {
    /// Trains on with the adapters that the pair has; a model that is trained and has none gets one that begins as `init` says.
    /// Without `init` the pair's adapters go, and what is trained begins as the original.
    pub fn new(
        setting: Setting<'a, B>,
        data: &Prepared,
        method: Method,
        config: &Recipe,
        init: Option<AdapterInit>,
    ) -> Result<Self> {
        let Setting { pair, judge, thresholds, decoding } = setting;
        let seed = config.seed;
        if init.is_none() {
            (pair.policy.adapter, pair.reward.adapter) = (None, None);
        }
        let side = |model: &mut Pretrained<B>, trained, salt| -> Result<Option<Side<B>>> {
            model.release();
            if trained && model.adapter.is_none() {
                // Two models of the same shape must not begin with the same A.
                let mut init = init.unwrap_or(AdapterInit::Zero { seed });
                let (AdapterInit::Zero { seed } | AdapterInit::Random { seed }) = &mut init;
                *seed = seed.wrapping_mul(2).wrapping_add(salt);
                model.adapter = Some(model.transformer.new_adapter(config.rank, config.alpha, init)?);
            }
            let adapter = model.adapter.as_ref().filter(|_| trained);
            adapter.map(|adapter| Side::new(&model.transformer, adapter, config.train_head)).transpose()
        };
        let head = &pair.reward.transformer.config;
        if config.train_head && method.trains_reward() && !head.has_plain_head() {
            let remedy = "leave train_head out: the adapter of such a reward model carries no head";
            return Err(Error::file(&head.file, "a plain score head, to train it", remedy)(
                "more than one matrix `score`",
            ));
        }
        let policy = side(&mut pair.policy, method.trains_policy(), 0)?;
        let reward = side(&mut pair.reward, method.trains_reward(), 1)?;
        let trained = [(&policy, &pair.policy), (&reward, &pair.reward)].into_iter().filter_map(|(side, model)| {
            side.as_ref().and(model.adapter.as_ref()).map(|adapter| (&model.transformer, adapter.rank()))
        });
        let workspace = room::of(&pair.policy.transformer, trained, config)?;
        let random = |stream: u64| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            random
        };
        Ok(Trainer {
            failures: Shuffle::new(data.failures.len(), seed, 0),
            reward_failures: Shuffle::new(data.failures.len(), seed, 4),
            retain: Shuffle::new(data.retain.len(), seed, 1),
            replay: Shuffle::new(data.replay.len(), seed, 2),
            prefixes: random(3),
            weights: random(5),
            pair,
            judge,
            data: data.clone(),
            method,
            config: config.of(method),
            thresholds,
            decoding,
            policy,
            reward,
            workspace,
            outcome: RepairOutcome::default(),
        })
    }

    /// The next step; `None` after the last one.
    pub fn advance(&mut self) -> Result<Option<&StepMetrics>> {
        let phase = self.method.phase(self.outcome.steps, self.config.steps);
        let Some((phase, step)) = phase.filter(|_| !self.data.failures.is_empty()) else { return Ok(None) };
        let metrics = self.step(phase, step)?;
        self.outcome.steps += 1;
        self.outcome.seconds += metrics.seconds.unwrap_or_default();
        self.outcome.history.push(metrics);
        Ok(self.outcome.history.last())
    }

    /// What it cost and how it went.
    pub fn finish(mut self) -> RepairOutcome {
        [self.outcome.tokens_policy, self.outcome.tokens_reward] = self.tokens_of();
        self.outcome.warnings.extend(displacement(&self.outcome.history));
        self.outcome
    }

    /// Steps made, with their metrics.
    pub fn history(&self) -> &[StepMetrics] {
        &self.outcome.history
    }

    /// Packed rows that policy and reward model have been trained on.
    fn tokens_of(&self) -> [u64; 2] {
        [&self.policy, &self.reward].map(|side| side.as_ref().map_or(0, |side| side.tokens))
    }

    /// One step of the method; `step` counts those of the trained model.
    fn step(&mut self, phase: Phase, step: usize) -> Result<StepMetrics> {
        let started = std::time::Instant::now();
        let before = self.tokens_of();
        let mut metrics = StepMetrics {
            method: self.method.name().to_string(),
            seed: self.config.seed,
            step: self.outcome.steps as u64 + 1,
            ..StepMetrics::default()
        };
        let every = self.config.resample;
        if phase == Phase::Samples {
            self.rlhf_step(step, &mut metrics)?;
        } else {
            // Where both take turns, once for both.
            let due = self.config.items > 0 && !(self.method == Method::Alternating && phase == Phase::Policy);
            if due && every > 0 && step > 0 && step.is_multiple_of(every) {
                self.resample(step)?;
            }
            self.forward_backward(phase, &mut metrics)?;
        }
        self.update(phase, step, &mut metrics)?;
        let seconds = started.elapsed().as_secs_f64();
        metrics.seconds = Some(seconds);
        let tokens = self.tokens_of().iter().sum::<u64>() - before.iter().sum::<u64>();
        metrics.tokens_per_second = Some(tokens as f64 / seconds);
        Ok(metrics)
    }

    /// Draws the step's items and runs both halves; gradients are left in the sides. Each half draws from the failures that carry
    /// its terms, in an order of its own, so that its items never depend on what the other half does.
    pub(crate) fn forward_backward(&mut self, phase: Phase, metrics: &mut StepMetrics) -> Result<()> {
        let (failures, items) = (&self.data.failures, self.config.items);
        let (mut wrong, mut replay, mut harmful, mut retain) = Default::default();
        if phase != Phase::Policy {
            wrong = self.reward_failures.draw_where(items, |i| failures[i].trains_reward);
            replay = self.replay.draw(self.config.replay_items);
        }
        if phase != Phase::Reward {
            harmful = self.failures.draw_where(items, |i| failures[i].trains_policy);
            retain = self.retain.draw(self.config.retain_items);
        }
        let (mut weights, mut mean) = (vec![1.0; harmful.len()], 1.0);
        if let (Some(side), Some(adapter)) = (&mut self.reward, &self.pair.reward.adapter) {
            let half = &mut Half::new(&self.pair.reward.transformer, adapter, side, &mut self.workspace)?;
            let mut known = BTreeMap::new();
            if phase != Phase::Policy {
                let failure = |&i: &usize| RewardItem { kind: RewardKind::Failure, ..failures[i].reward.clone() };
                let replayed = replay.iter().map(|&i| self.data.replay[i].clone());
                let items: Vec<RewardItem> = wrong.iter().map(failure).chain(replayed).collect();
                let (t, read) = reward_step(half, &items, &self.config, &self.thresholds, true)?;
                known.extend(wrong.iter().copied().zip(read));
                metrics.add_loss(t.loss(&self.config));
                metrics.add([("bt", t.bt), ("center", t.center), ("replay", t.replay), ("anchor", t.anchor)]);
            }
            if self.method.coupling() != Coupling::Off {
                read_others(half, failures, &harmful, &mut known, &self.config, &self.thresholds)?;
                let rewards: Vec<f64> = harmful.iter().map(|i| known[i]).collect();
                (weights, mean) = coupling(&rewards, &self.thresholds);
            }
        }
        if self.method.coupling() == Coupling::Shuffled {
            weights.shuffle(&mut self.weights);
        }
        if phase == Phase::Reward {
            return Ok(());
        }
        let items = self.policy_items(&harmful, &weights, &retain);
        if let (Some(side), Some(adapter)) = (&mut self.policy, &self.pair.policy.adapter) {
            let half = &mut Half::new(&self.pair.policy.transformer, adapter, side, &mut self.workspace)?;
            let terms = policy_step(half, &items, &self.config)?;
            metrics.add_loss(terms.loss(&self.config));
            let unlearn = if self.method == Method::Dpo { "dpo" } else { "npo" };
            metrics.add([(unlearn, terms.npo), ("safe", terms.safe), ("retain", terms.retain)]);
            metrics.terms.insert("coupling".into(), terms.coupling.map(|_| mean));
            (metrics.logp_chosen, metrics.logp_rejected) = (terms.logp_chosen, terms.logp_rejected);
        }
        Ok(())
    }

    fn policy_items(&mut self, failures: &[usize], weights: &[f64], retain: &[usize]) -> Vec<PolicyItem> {
        let mut items = Vec::new();
        for (&i, &w) in failures.iter().zip(weights) {
            let failure = &self.data.failures[i];
            let forced = self.prefixes.random_bool(self.config.forced_prefix);
            // The end-of-turn token is no prefix: at most all tokens before it.
            let longest = (failure.rejected.len().saturating_sub(1)).clamp(1, LONGEST_PREFIX);
            let k = self.prefixes.random_range(1..=longest).min(failure.rejected.len());
            let drawn = if forced { k } else { 0 };
            let context = failure.source.forced.map_or(drawn, |k| k.min(failure.rejected.len()));
            let behind = |chosen: &Vec<u32>| ([&failure.rejected[..context], chosen].concat(), context);
            let unlearned = self.config.lambda_npo > 0.0;
            items.push(PolicyItem {
                prompt: failure.prompt.clone(),
                rejected: unlearned.then(|| (failure.rejected.clone(), failure.start_logprob, w)),
                chosen: failure.chosen.as_ref().map(behind),
                paired: (self.method == Method::Dpo).then_some(failure.chosen_logprob),
                retain: None,
            });
        }
        let keep = |&i: &usize| {
            let kept = &self.data.retain[i];
            PolicyItem { prompt: kept.prompt.clone(), retain: Some(kept.answer.clone()), ..PolicyItem::default() }
        };
        items.extend(retain.iter().map(keep));
        items
    }

    /// AdamW with the step's learning rate, of each model that is trained. A gradient norm that is not finite ends the repair.
    fn update(&mut self, phase: Phase, step: usize, metrics: &mut StepMetrics) -> Result<()> {
        let spec = |update: u32| AdamWSpec {
            lr: self.config.learning_rate(step) as f32,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            decay: self.config.decay as f32,
            clip: self.config.clip as f32,
            step: update,
        };
        let (reward, policy) = (&mut self.pair.reward, &mut self.pair.policy);
        let sides = [
            (reward, &mut self.reward, &mut metrics.grad_norm_reward, matches!(phase, Phase::Both | Phase::Reward)),
            (policy, &mut self.policy, &mut metrics.grad_norm_policy, phase != Phase::Reward),
        ];
        for (model, side, found, moves) in sides {
            let (Some(side), Some(adapter)) = (side.as_mut().filter(|_| moves), &mut model.adapter) else { continue };
            let norm = side.moments.step(&model.transformer.ops, adapter, &side.grad, spec(side.updates + 1))?;
            side.updates += 1;
            if !norm.is_finite() {
                return Err(Error::NotFinite {
                    what: format!("step {step}: gradient norm of {}", model.dir.display()),
                    found: norm.to_string(),
                    remedy: "lower --lr".into(),
                });
            }
            *found = Some(f64::from(norm));
        }
        Ok(())
    }

    /// Gradients of the last `forward_backward` under PEFT's names: (policy, reward model).
    pub(crate) fn gradients(&self) -> Result<[Option<crate::model::AdapterFile>; 2]> {
        let file = |side: &Option<Side<B>>, model: &Pretrained<B>| {
            let trained = side.as_ref().zip(model.adapter.as_ref());
            trained.map(|(side, adapter)| adapter.gradients_to_file(&model.transformer.ops, &side.grad)).transpose()
        };
        Ok([file(&self.policy, &self.pair.policy)?, file(&self.reward, &self.pair.reward)?])
    }
}

/// Adds the r_φ(y⁻) of `harmful` that the step has not read yet to `known`: a score does not depend on its company.
fn read_others<B: Ops>(
    half: &mut Half<'_, B>,
    failures: &[PreparedFailure],
    harmful: &[usize],
    known: &mut BTreeMap<usize, f64>,
    config: &Recipe,
    thresholds: &Thresholds,
) -> Result<()> {
    let unread: BTreeSet<usize> = harmful.iter().copied().filter(|i| !known.contains_key(i)).collect();
    let alone = |&i: &usize| RewardItem { chosen: None, kind: RewardKind::Read, ..failures[i].reward.clone() };
    let items: Vec<RewardItem> = unread.iter().map(alone).collect();
    let (_, read) = reward_step(half, &items, config, thresholds, false)?;
    known.extend(unread.into_iter().zip(read));
    Ok(())
}

/// Both ℓ(y⁺) and ℓ(y⁻) falling from the first to the last quarter: probability mass went elsewhere.
fn displacement(history: &[StepMetrics]) -> Option<String> {
    let quarter = history.len() / 4;
    let mean = |steps: &[StepMetrics], f: fn(&StepMetrics) -> Option<f64>| {
        let values: Vec<f64> = steps.iter().filter_map(f).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let change = |f| Some(mean(&history[history.len() - quarter..], f)? - mean(&history[..quarter], f)?);
    let (chosen, rejected) = (change(|m| m.logp_chosen)?, change(|m| m.logp_rejected)?);
    (chosen < 0.0 && rejected < 0.0).then(|| {
        format!("displacement: log-probability of y+ ({chosen:+.2}) and of y- ({rejected:+.2}) both fell; lower --lambda-npo")
    })
}
