//! `ares bench`.

mod findings;
mod shape;

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use self::findings::{Baseline, Findings};
use self::shape::Shape;
use super::Session;
use super::device::OnDevice;
use crate::error::{Error, Result};
use crate::ops::Ops;
use crate::run::Suite;
use crate::run::speed::{self, Workload};

/// Time a joint step, scoring and decoding: median of repeats, and on a GPU each kernel's share
#[derive(Debug, Args)]
pub struct Bench {
    /// What to time
    #[arg(value_enum, default_values_t = [Task::Step, Task::Score, Task::Decode])]
    tasks: Vec<Task>,
    /// Policy: a model's folder, or a config.json, whose shape gets random weights (default: the suite's first pair)
    #[arg(long, value_name = "DIR|CONFIG.json")]
    policy: Option<PathBuf>,
    /// Reward model, likewise
    #[arg(long, value_name = "DIR|CONFIG.json")]
    reward: Option<PathBuf>,
    /// Keep only the first N layers of a config's shape
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Packed rows per model and repeat
    #[arg(long, default_value_t = 2048, value_name = "N")]
    tokens: usize,
    /// Length of one sequence, half of it prompt
    #[arg(long, default_value_t = 64, value_name = "N")]
    length: usize,
    /// LoRA rank
    #[arg(long, default_value_t = 16, value_name = "R")]
    rank: usize,
    /// Packed rows of one forward
    #[arg(long, default_value_t = 16384, value_name = "N")]
    batch_tokens: usize,
    /// Sequences that decode at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    sequences: usize,
    /// Tokens that each of them gets
    #[arg(long, default_value_t = 32, value_name = "N")]
    new_tokens: usize,
    #[arg(long, default_value_t = 2, value_name = "N")]
    warmup: usize,
    #[arg(long, default_value_t = 7, value_name = "N")]
    repeats: usize,
    /// Write every kernel's run as a Chrome/Perfetto trace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Put a baseline beside it: the JSON that scripts/baseline_hf.py wrote
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Task {
    Step,
    Score,
    Decode,
}

impl Bench {
    pub fn run(self, session: &Session) -> Result<()> {
        if self.length < 2 || self.tokens < self.length || self.rank == 0 || self.repeats == 0 || self.sequences == 0 {
            return Err(Error::Usage(format!(
                "expected --length of 2 or more, --tokens of at least --length, and --rank, --repeats and --sequences of 1 \
                 or more; found --length {}, --tokens {}, --rank {}, --repeats {}, --sequences {}",
                self.length, self.tokens, self.rank, self.repeats, self.sequences
            )));
        }
        let baseline = self.compare.as_deref().map(Baseline::read).transpose()?;
        let (policy, reward) = self.models()?;
        let workload = Workload {
            tokens: self.tokens,
            length: self.length,
            rank: self.rank,
            batch_tokens: self.batch_tokens,
            sequences: self.sequences,
            new_tokens: self.new_tokens,
            warmup: self.warmup,
            repeats: self.repeats,
            seed: session.seed(),
        };
        let work = Measure { session, tasks: &self.tasks, policy, reward, workload };
        let mut findings = session.device()?.run(work)?;
        if let Some(baseline) = baseline {
            findings.beside = findings.tasks.iter().filter_map(|t| baseline.beside(t)).collect();
        }
        if let Some(file) = &self.trace {
            findings.write_trace(file)?;
        }
        findings.kernel_tables().iter().for_each(|table| session.table(table));
        session.inform(&findings.table(), &findings)
    }

    fn models(&self) -> Result<(Shape, Shape)> {
        let suite = match (&self.policy, &self.reward) {
            (Some(_), Some(_)) => None,
            _ => Some(Suite::find(None)?),
        };
        let first = suite.as_ref().and_then(|suite| suite.pairs().into_iter().next());
        let open = |given: &Option<PathBuf>, own: Option<PathBuf>| match (given, own) {
            (Some(path), _) => Shape::of(path, self.layers),
            (None, Some(dir)) => Shape::of(&dir, self.layers),
            (None, None) => Err(Error::Usage("expected --policy and --reward: the suite has no pair".into())),
        };
        let (policy, reward) =
            (first.as_ref().map(|p| p.policy.dir.clone()), first.as_ref().map(|p| p.reward.dir.clone()));
        Ok((open(&self.policy, policy)?, open(&self.reward, reward)?))
    }
}

struct Measure<'a> {
    session: &'a Session,
    tasks: &'a [Task],
    policy: Shape,
    reward: Shape,
    workload: Workload,
}

impl OnDevice for Measure<'_> {
    type Output = Findings;

    fn run<B: Ops>(self, ops: &B) -> Result<Findings> {
        let (load, seed) = (&self.workload, self.workload.seed);
        let wants = |task: Task| self.tasks.contains(&task);
        let before = ops.rates()?;
        let mut tasks = Vec::new();
        let say = |what: &str| self.session.detail(&format!("timing {what}"));
        let reward = match wants(Task::Step) || wants(Task::Score) {
            true => Some(self.reward.load(ops, true, seed + 1)?),
            false => None,
        };
        if let (Some(reward), true) = (&reward, wants(Task::Score)) {
            say("score");
            tasks.push(speed::score(reward, load)?);
        }
        if wants(Task::Step) || wants(Task::Decode) {
            let policy = self.policy.load(ops, false, seed)?;
            if wants(Task::Decode) {
                say("decode");
                tasks.push(speed::decode(&policy, load)?);
            }
            if let (Some(reward), true) = (&reward, wants(Task::Step)) {
                say("step");
                tasks.push(speed::step(&policy, reward, load)?);
            }
        }
        // Before and after: a moment in which the machine was busy flatters nobody.
        let ceilings = before.zip(ops.rates()?).map(|(before, after)| before.best(after));
        if let Some(rates) = &ceilings {
            tasks.iter_mut().for_each(|timing| timing.hold_against(rates));
        }
        Ok(Findings {
            version: env!("CARGO_PKG_VERSION"),
            device: ops.describe(),
            policy: self.policy.name(),
            reward: self.reward.name(),
            workload: self.workload.clone(),
            read_latency_ms: speed::read_latency(ops)?,
            ceilings,
            tasks,
            beside: Vec::new(),
        })
    }
}
