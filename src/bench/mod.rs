//! How fast: one joint step, scoring, decoding, each operation alone, and loading, on any device, at the shapes of any models.

mod list;
pub(crate) mod load;
pub mod ops;
pub(crate) mod plan;
pub(crate) mod products;
mod timing;

use std::ops::Range;
use std::time::Instant;

use serde::Serialize;

pub(crate) use self::timing::{KernelShare, Spread, Timing, read_latency};

use self::timing::{Done, time};
use crate::error::{Error, Result};
use crate::judge::Thresholds;
use crate::model::batch::plan as batches;
use crate::model::flops::{flops, spared};
use crate::model::lanes::side_by_side;
use crate::model::{
    Adapter, AdapterInit, AnswerTokens, Batch, Continue, Decoding, Generator, Heads, Keep, ModelConfig, Transformer,
    Workspace,
};
use crate::ops::{AdamWSpec, Measured, Ops};
use crate::repair::policy_step::{self, PolicyItem, policy_step};
use crate::repair::reward_step::{self, RewardItem, RewardKind, reward_step};
use crate::repair::side::{Half, Side};
use crate::repair::{Recompute, RepairConfig};

// What is timed, and how often; as a doc comment this would take the place of the command's own help.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Workload {
    /// Packed rows per model and repeat, at least --length
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub(crate) tokens: usize,
    /// Length of one sequence, half of it prompt; 2 or more
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) length: usize,
    /// Step on sequences that share nothing but their first token, every other row a target
    #[arg(long)]
    pub(crate) unshared: bool,
    /// LoRA rank
    #[arg(long, default_value_t = 16, value_name = "R")]
    pub(crate) rank: usize,
    /// Packed rows of one forward
    #[arg(long, default_value_t = 16384, value_name = "N")]
    pub(crate) batch_tokens: usize,
    /// What the step's backward computes once more instead of reading it
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub(crate) recompute: Recompute,
    /// Sequences that decode at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) sequences: usize,
    /// Of which so many, one after the other, answer the same prompt
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) answers: usize,
    /// Tokens that each of those sequences gets
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub(crate) new_tokens: usize,
    /// Untimed repeats before those that count
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) warmup: usize,
    /// Timed repeats, of which the median counts
    #[arg(long, default_value_t = 7, value_name = "N")]
    pub(crate) repeats: usize,
    #[arg(skip)]
    pub(crate) seed: u64,
}

/// `count` ids that differ by `salt`.
fn tokens(config: &ModelConfig, salt: usize, count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + salt * 104_729 + i * i * 31) % config.vocab_size) as u32).collect()
}

/// One model with all that a step needs.
struct Trainee<'a, B: Ops> {
    model: &'a Transformer<B>,
    adapter: Adapter<B>,
    side: Side<B>,
}

impl<'a, B: Ops> Trainee<'a, B> {
    fn new(model: &'a Transformer<B>, load: &Workload) -> Result<Self> {
        let adapter = model.new_adapter(load.rank, 2.0 * load.rank as f64, AdapterInit::Random { seed: load.seed })?;
        Ok(Trainee { side: Side::new(model, &adapter, false)?, model, adapter })
    }

    fn half<'w>(&'w mut self, workspace: &'w mut Workspace<B>) -> Result<Half<'w, B>> {
        Half::new(self.model, &self.adapter, &mut self.side, workspace)
    }

    /// The gradients' norm: reading it waits for the device.
    fn update(&mut self, step: usize) -> Result<()> {
        let spec =
            AdamWSpec { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.0, clip: 1.0, step: step as u32 + 1 };
        let norm = self.side.moments.step(&self.model.ops, &mut self.adapter, &self.side.grad, spec)?;
        if norm.is_finite() {
            return Ok(());
        }
        Err(Error::NotFinite {
            what: "gradient norm of a random step".into(),
            found: norm.to_string(),
            remedy: "this is a fault in ares: please report it".into(),
        })
    }
}

/// Prompts with two answers each, of which `item` makes what a step takes; even ones are failures, unshared ones all.
fn items<T>(
    config: &ModelConfig,
    load: &Workload,
    repeat: usize,
    item: impl Fn(bool, Vec<u32>, [Vec<u32>; 2]) -> T,
) -> Vec<T> {
    let prompt = if load.unshared { 1 } else { load.length / 2 };
    let answer = load.length - prompt;
    let count = (load.tokens / (load.length + answer)).max(1);
    let ids = |i: usize, part: usize, n: usize| tokens(config, repeat % 3 * 1000 + i * 3 + part, n);
    let made = |i: usize| {
        item(load.unshared || i.is_multiple_of(2), ids(i, 0, prompt), [ids(i, 1, answer), ids(i, 2, answer)])
    };
    (0..count).map(made).collect()
}

fn policy_item(failure: bool, prompt: Vec<u32>, [first, second]: [Vec<u32>; 2]) -> PolicyItem {
    let item = PolicyItem { prompt, ..PolicyItem::default() };
    match failure {
        true => PolicyItem { rejected: Some((first, -3.0, 1.0)), chosen: Some((second, 0)), ..item },
        false => PolicyItem { retain: Some(first), ..item },
    }
}

fn reward_item(failure: bool, prompt: Vec<u32>, [rejected, chosen]: [Vec<u32>; 2]) -> RewardItem {
    let replay = RewardKind::Replay { anchors: [Some(0.1), Some(-0.1)] };
    let kind = if failure { RewardKind::Failure } else { replay };
    RewardItem { prompt, rejected, chosen: Some(chosen), kind }
}

impl Done {
    /// Adds the arithmetic of one item, as the step packs it.
    fn add(&mut self, config: &ModelConfig, rank: usize, prompt: &[u32], answers: &[AnswerTokens], heads: Heads) {
        let mut batch = Batch::default();
        batch.push(prompt, answers, heads);
        self.tokens += batch.len() as u64;
        self.flops += flops(config, &batch, rank, true);
    }
}

/// One whole joint step: reward forward and backward, policy forward and backward, both optimisers.
pub(crate) fn step<B: Measured>(policy: &Transformer<B>, reward: &Transformer<B>, load: &Workload) -> Result<Timing> {
    let mut step = Step::new(policy, reward, load)?;
    step.allocate()?;
    time(&policy.ops, "step", load, |i| step.run(i))
}

/// A pair that is trained, again and again.
struct Step<'a, B: Ops> {
    policy: Trainee<'a, B>,
    reward: Trainee<'a, B>,
    workspace: Workspace<B>,
    config: RepairConfig,
    load: &'a Workload,
}

impl<'a, B: Ops> Step<'a, B> {
    fn new(policy: &'a Transformer<B>, reward: &'a Transformer<B>, load: &'a Workload) -> Result<Self> {
        let config = RepairConfig { batch_tokens: load.batch_tokens, ..RepairConfig::default() };
        let workspace = Workspace::new(&policy.ops, &policy.config, 0, 0, load.recompute.keep())?;
        Ok(Step { policy: Trainee::new(policy, load)?, reward: Trainee::new(reward, load)?, workspace, config, load })
    }

    /// Makes the workspace as large as either model asks.
    fn allocate(&mut self) -> Result<()> {
        let Step { policy, reward, workspace, load, .. } = self;
        [policy, reward].into_iter().try_for_each(|Trainee { model, adapter, .. }| {
            workspace.fit(&model.ops, &model.config, adapter.rank(), load.batch_tokens)
        })
    }

    fn run(&mut self, repeat: usize) -> Result<Done> {
        let Step { policy, reward, workspace, config, load } = self;
        let thresholds = Thresholds { tau_h: 0.5, tau_r: 0.0, mu_0: 0.0, s: 1.0 };
        let pairs = items(&reward.model.config, load, repeat, reward_item);
        let items = items(&policy.model.config, load, repeat, policy_item);
        reward_step(&mut reward.half(workspace)?, &pairs, config, &thresholds, true)?;
        policy_step(&mut policy.half(workspace)?, &items, config)?;
        reward.update(repeat)?;
        policy.update(repeat)?;
        let mut done = Done::default();
        for p in &pairs {
            done.add(&reward.model.config, load.rank, &p.prompt, &reward_step::answers(p), Heads::Ends);
        }
        for p in &items {
            done.add(&policy.model.config, load.rank, &p.prompt, &policy_step::answers(p), Heads::Targets);
        }
        Ok(done)
    }
}

/// Rewards of `tokens / length` answers.
pub(crate) fn score<B: Measured>(reward: &Transformer<B>, load: &Workload) -> Result<Timing> {
    let mut scoring = Scoring::new(reward, load)?;
    time(&reward.ops, "score", load, |i| scoring.run(i))
}

/// A reward model that scores, again and again.
struct Scoring<'a, B: Ops> {
    reward: &'a Transformer<B>,
    load: &'a Workload,
    /// Rows of a pass.
    limit: usize,
    workspaces: Vec<Workspace<B>>,
}

impl<'a, B: Ops> Scoring<'a, B> {
    fn new(reward: &'a Transformer<B>, load: &'a Workload) -> Result<Self> {
        let rows = load.batch_tokens.min(load.tokens);
        let lanes = reward.lanes(rows);
        let limit = rows.div_ceil(lanes);
        let one = |_| Workspace::new(&reward.ops, &reward.config, 0, limit.max(load.length), Keep::Nothing);
        Ok(Scoring { reward, load, limit, workspaces: (0..lanes).map(one).collect::<Result<_>>()? })
    }

    fn run(&mut self, repeat: usize) -> Result<Done> {
        let Scoring { reward, load, limit, workspaces } = self;
        let count = (load.tokens / load.length).max(1);
        let batch = |range: Range<usize>| {
            let mut batch = Batch::default();
            for n in range {
                let ids = tokens(&reward.config, repeat % 3 * 1000 + n, load.length);
                let (prompt, answer) = ids.split_at(load.length / 2);
                batch.push(prompt, &[AnswerTokens::new(answer)], Heads::Ends);
            }
            batch
        };
        let batches: Vec<Batch> = batches(&vec![load.length; count], *limit).into_iter().map(batch).collect();
        side_by_side(workspaces, &batches, |workspace, batch| reward.forward_scores(workspace, batch, None))?;
        let mut done = Done::default();
        for batch in &batches {
            done.tokens += batch.len() as u64;
            done.flops += flops(&reward.config, batch, 0, false);
        }
        Ok(done)
    }
}

/// `sequences` continued greedily by `new_tokens` each, after prompts of `length`, which are read first.
pub(crate) fn generate<B: Measured>(policy: &Transformer<B>, load: &Workload) -> Result<Timing> {
    let mut generation = Generation::new(policy, load)?;
    time(&policy.ops, "generate", load, |i| generation.run(i, &mut |_| Ok(())))
}

/// The same from the device's first look at its tokens on: decoding alone, without the prompts.
pub(crate) fn decode<B: Measured>(policy: &Transformer<B>, load: &Workload) -> Result<Timing> {
    if load.new_tokens <= B::BURST {
        let (least, found) = (B::BURST + 1, load.new_tokens);
        return Err(Error::Usage(format!(
            "--new-tokens: expected {least} or more to time decoding here, found {found}"
        )));
    }
    let (ops, profiled) = (&policy.ops, load.warmup + load.repeats);
    let mut generation = Generation::new(policy, load)?;
    time(ops, "decode", load, |i| {
        let mut begin = None;
        let mut first = |_| match begin.replace(begin.unwrap_or_else(Instant::now)) {
            // What ran before is not decoding.
            None if i == profiled => ops.profile_begin(),
            _ => Ok(()),
        };
        let whole = generation.run(i, &mut first)?;
        let seconds = begin.map(|begin| begin.elapsed().as_secs_f64());
        let before = generation.arithmetic(i, B::BURST);
        Ok(Done { tokens: whole.tokens - before.tokens, flops: whole.flops - before.flops, seconds })
    })
}

/// A policy that answers, again and again.
struct Generation<'a, B: Ops> {
    policy: &'a Transformer<B>,
    load: &'a Workload,
    lanes: Vec<(Workspace<B>, Generator<B>)>,
}

impl<'a, B: Ops> Generation<'a, B> {
    fn new(policy: &'a Transformer<B>, load: &'a Workload) -> Result<Self> {
        let (ops, config, lanes) = (&policy.ops, &policy.config, policy.decoding_lanes(load.sequences));
        let (slots, length) = (load.sequences.div_ceil(lanes), load.length + load.new_tokens);
        let rows = (load.batch_tokens / lanes).max(slots).max(load.length);
        let lane = |_| {
            let workspace = Workspace::new(ops, config, 0, rows, Keep::Nothing)?;
            Ok((workspace, Generator::new(ops, config, slots, length, rows)?))
        };
        Ok(Generation { policy, load, lanes: (0..lanes).map(lane).collect::<Result<_>>()? })
    }

    fn prompt(&self, repeat: usize, n: usize) -> Vec<u32> {
        tokens(&self.policy.config, repeat % 3 * 1000 + n / self.load.answers, self.load.length)
    }

    /// `look` is called each time the host looks at what was decoded.
    fn run(&mut self, repeat: usize, look: &mut (dyn FnMut(usize) -> Result<()> + Send)) -> Result<Done> {
        let request = |n| Continue { tokens: self.prompt(repeat, n), forced: 0, id: n as u64 };
        let requests: Vec<Continue> = (0..self.load.sequences).map(request).collect();
        let decoding = Decoding { ignore_eos: true, ..Decoding::greedy(self.load.new_tokens) };
        let mut lanes: Vec<_> = self.lanes.iter_mut().map(|(workspace, generator)| (workspace, generator)).collect();
        self.policy.generate(&mut lanes, &requests, None, &decoding, look)?;
        Ok(self.arithmetic(repeat, self.load.new_tokens))
    }

    /// Prompts and their first `count` tokens, the latter counted as if they had been read at once.
    fn arithmetic(&self, repeat: usize, count: usize) -> Done {
        let (mut whole, mut prompts) = (Batch::default(), Batch::default());
        for n in (0..self.load.sequences).step_by(self.load.answers) {
            let (prompt, answer) = (self.prompt(repeat, n), vec![0; count]);
            let answers = vec![AnswerTokens::new(&answer); self.load.answers.min(self.load.sequences - n)];
            whole.push(&prompt, &answers, Heads::Targets);
            prompts.push(&[], &[AnswerTokens::new(&prompt[..prompt.len() - 1])], Heads::Ends);
        }
        let config = &self.policy.config;
        let flops = flops(config, &whole, 0, false) - spared(config, &prompts);
        Done { tokens: (self.load.sequences * count) as u64, flops, seconds: None }
    }
}
