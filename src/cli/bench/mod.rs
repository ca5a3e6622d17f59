//! `ares bench`.

mod findings;
mod subject;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;

use self::findings::{Baseline, Findings, Load, plan_tables, product_table};
use self::subject::Subject;
use super::Session;
use super::device::{Device, on_device};
use crate::backend::Cuda;
use crate::backend::cuda::counter::Counter;
use crate::backend::cuda::driver::DeviceInfo;
use crate::bench::load::KernelLoad;
use crate::bench::ops::OpTiming;
use crate::bench::plan::Planner;
use crate::bench::products::ProductTiming;
use crate::bench::{self, Timing, Workload};
use crate::error::{Error, Result};
use crate::ops::Measured;
use crate::ops::ceilings::Rates;
use crate::report::Table;
use crate::run::Suite;

/// Time a joint step, scoring, decoding, single operations and loading: medians, and shares of what the device can do
#[derive(Debug, Args)]
pub(crate) struct Bench {
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
    #[command(flatten)]
    workload: Workload,
    /// Time nothing: count the bytes and launches that step, score and generate would ask of a GPU, the one that is there or an H200
    #[arg(long, conflicts_with_all = ["trace", "compare"])]
    plan: bool,
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
    /// Prompts, then tokens one by one
    Generate,
    /// The tokens alone
    Decode,
    /// Each operation alone, at the policy's shapes
    Ops,
    /// Each matrix product of a layer by every tile that the GPU has, beside its prediction
    Products,
    /// Opening checkpoints, uploading them, loading compiled kernels
    Load,
}

impl Bench {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let workload = Workload { seed: session.seed(), ..self.workload.clone() };
        let Workload { tokens, length, rank, sequences, answers, repeats, .. } = workload;
        if length < 2 || tokens < length || [rank, repeats, sequences, answers].contains(&0) {
            return Err(Error::Usage(format!(
                "expected --length of 2 or more, --tokens of at least --length, and --rank, --repeats, --sequences and --answers of 1 \
                 or more; found --length {length}, --tokens {tokens}, --rank {rank}, --repeats {repeats}, --sequences {sequences}, \
                 --answers {answers}"
            )));
        }
        let baseline = self.compare.as_deref().map(Baseline::read).transpose()?;
        let (policy, reward) = self.models()?;
        if self.tasks.contains(&Task::Load) {
            policy.checkpoint().and(reward.checkpoint())?;
        }
        let device = session.device()?;
        if self.plan {
            return self.count(session, &device, &policy, &reward, &workload);
        }
        let products = match &device {
            _ if !self.tasks.contains(&Task::Products) => Vec::new(),
            Device::Cuda(cuda) => {
                let say = |name: &str| session.detail(&format!("timing {name}"));
                bench::products::time(cuda, &policy.config, &workload, say)?
            }
            Device::Cpu => {
                let what = "products: expected a GPU or the simulator, found the CPU";
                return Err(Error::Usage(format!("{what}; --plan predicts them without one")));
            }
        };
        let kernels = match &device {
            Device::Cuda(cuda) if self.tasks.contains(&Task::Load) => bench::load::kernels(cuda, session.kernels())?,
            _ => None,
        };
        let timer = Timer { session, tasks: &self.tasks, policy, reward, workload, kernels, products };
        let mut findings = on_device!(device, |ops| timer.findings(ops))?;
        if let Some(baseline) = baseline {
            findings.beside = findings.tasks.iter().filter_map(|t| baseline.beside(t)).collect();
        }
        if let Some(file) = &self.trace {
            findings.write_trace(file)?;
        }
        findings.kernel_tables().iter().for_each(|table| session.table(table));
        session.inform_all(&findings.tables(), &findings)
    }

    /// What the tasks would ask of the device, or of an H200 where none is there.
    fn count(
        &self,
        session: &Session,
        device: &Device,
        policy: &Subject,
        reward: &Subject,
        load: &Workload,
    ) -> Result<()> {
        let (info, rates) = match device {
            Device::Cuda(cuda) => (cuda.info().clone(), cuda.rates()?),
            Device::Cpu => (DeviceInfo::h200(), Some(Rates::H200)),
        };
        let counter = Counter::new(info.clone());
        let ops = &Cuda::with_tier(counter.clone(), session.kernels().tier.as_deref())?;
        let planner = Planner { counter: &counter, ops, load, rates };
        let wants = |tasks: &[Task]| self.tasks.iter().any(|task| tasks.contains(task));
        if wants(&[Task::Ops, Task::Load]) {
            let why = "--plan: expected step, score, generate or decode, whose bytes and launches are counted";
            return Err(Error::Usage(format!("{why}; found ops or load: leave these out")));
        }
        let mut plans = Vec::new();
        {
            let reward = reward.blank(ops, true)?;
            if wants(&[Task::Score]) {
                plans.push(planner.score(&reward)?);
            }
            if wants(&[Task::Step]) {
                plans.push(planner.step(&policy.blank(ops, false)?, &reward)?);
            }
        }
        if wants(&[Task::Generate, Task::Decode]) {
            plans.push(planner.generate(&policy.blank(ops, false)?)?);
        }
        for plan in plans.iter().filter(|plan| plan.peak_bytes > info.memory) {
            let (most, memory) = (plan.peak_bytes as f64 / 1e9, info.memory as f64 / 1e9);
            session.say(&format!(
                "{}: {most:.1} GB do not fit into the {memory:.1} GB of {}: lower --batch-tokens, --sequences or --length",
                plan.task, info.name
            ));
        }
        if let Some(Rates { matrix_flops_per_s, copy_bytes_per_s }) = rates {
            let (tera, bytes) = (matrix_flops_per_s / 1e12, copy_bytes_per_s / 1e12);
            session.say(&format!(
                "floors: {tera:.0} TFLOP/s, {bytes:.1} TB/s, each kernel bound by one of them; nothing was timed"
            ));
        }
        let mut tables: Vec<Table> = plans.iter().flat_map(|plan| plan_tables(plan, &info)).collect();
        let products = match wants(&[Task::Products]) {
            true => bench::products::predict(&info, &policy.config, load),
            false => Vec::new(),
        };
        tables.extend((!products.is_empty()).then(|| product_table(&products)));
        let (policy, reward) = (policy.name(), reward.name());
        let found = json!({ "device": info.name, "memory": info.memory, "policy": policy, "reward": reward,
                            "workload": load, "plans": plans, "products": products });
        session.inform_all(&tables, &found)
    }

    fn models(&self) -> Result<(Subject, Subject)> {
        let (policy, reward) = match (self.policy.clone(), self.reward.clone()) {
            (Some(policy), Some(reward)) => (policy, reward),
            (policy, reward) => {
                let suite = Suite::find(None)?;
                let first = |role| suite.pairs()[0].model(role).dir;
                (policy.unwrap_or_else(|| first("policy")), reward.unwrap_or_else(|| first("reward")))
            }
        };
        Ok((Subject::of(&policy, self.layers)?, Subject::of(&reward, self.layers)?))
    }
}

struct Timer<'a> {
    session: &'a Session,
    tasks: &'a [Task],
    policy: Subject,
    reward: Subject,
    workload: Workload,
    kernels: Option<KernelLoad>,
    products: Vec<ProductTiming>,
}

impl Timer<'_> {
    fn findings<B: Measured>(&self, ops: &B) -> Result<Findings> {
        let before = ops.rates()?;
        let (mut tasks, mut single, load) = (self.tasks(ops)?, self.ops(ops)?, self.load(ops)?);
        // Before and after: a moment in which the machine was busy flatters nobody.
        let ceilings = before.zip(ops.rates()?).map(|(before, after)| before.best(after));
        if let Some(rates) = &ceilings {
            tasks.iter_mut().for_each(|timing| timing.hold_against(rates));
            single.iter_mut().for_each(|timing| timing.hold_against(ops, rates));
        }
        Ok(Findings {
            version: env!("CARGO_PKG_VERSION"),
            device: ops.describe(),
            policy: self.policy.name(),
            reward: self.reward.name(),
            workload: self.workload.clone(),
            read_latency_ms: bench::read_latency(ops)?,
            ceilings,
            tasks,
            ops: single,
            products: self.products.clone(),
            load,
            beside: Vec::new(),
        })
    }

    fn wants(&self, tasks: &[Task]) -> bool {
        self.tasks.iter().any(|task| tasks.contains(task))
    }

    fn say(&self, what: &str) {
        self.session.detail(&format!("timing {what}"));
    }

    fn tasks<B: Measured>(&self, ops: &B) -> Result<Vec<Timing>> {
        use Task::{Decode, Generate, Score, Step};
        let (load, seed, mut timings) = (&self.workload, self.workload.seed, Vec::new());
        let mut time = |task, name, timing: &dyn Fn() -> Result<Timing>| -> Result<()> {
            if self.wants(&[task]) {
                self.say(name);
                timings.push(timing()?);
            }
            Ok(())
        };
        let reward = self.wants(&[Step, Score]).then(|| self.reward.load(ops, true, seed + 1)).transpose()?;
        if let Some(reward) = &reward {
            time(Score, "score", &|| bench::score(reward, load))?;
        }
        if self.wants(&[Step, Decode, Generate]) {
            let policy = &self.policy.load(ops, false, seed)?;
            time(Generate, "generate", &|| bench::generate(policy, load))?;
            time(Decode, "decode", &|| bench::decode(policy, load))?;
            if let Some(reward) = &reward {
                time(Step, "step", &|| bench::step(policy, reward, load))?;
            }
        }
        Ok(timings)
    }

    fn ops<B: Measured>(&self, ops: &B) -> Result<Vec<OpTiming>> {
        match self.wants(&[Task::Ops]) {
            true => bench::ops::ops(ops, &self.policy.config, &self.workload, |op| self.say(op)),
            false => Ok(Vec::new()),
        }
    }

    fn load<B: Measured>(&self, ops: &B) -> Result<Option<Load>> {
        if !self.wants(&[Task::Load]) {
            return Ok(None);
        }
        let timed = |subject: &Subject| {
            self.say(&subject.name());
            bench::load::checkpoint(ops, subject.checkpoint()?, &self.workload)
        };
        let checkpoints = vec![timed(&self.policy)?, timed(&self.reward)?];
        Ok(Some(Load { checkpoints, kernels: self.kernels }))
    }
}
