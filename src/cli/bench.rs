//! `ares bench`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use super::Session;
use super::device::OnDevice;
use crate::backend::cost::KernelRun;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, RandomWeights, Transformer};
use crate::ops::Ops;
use crate::report::numbers::{count, number};
use crate::report::{Align, Table};
use crate::run::Suite;
use crate::run::speed::{self, KernelShare, Timing, Workload};

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

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Findings {
    version: &'static str,
    device: String,
    policy: String,
    reward: String,
    workload: Workload,
    read_latency_ms: f64,
    tasks: Vec<Timing>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    beside: Vec<Beside>,
}

/// The best setting of a baseline, and our rate as a multiple of its.
#[derive(Debug, Serialize)]
struct Beside {
    task: String,
    setting: String,
    tokens_per_second: f64,
    ratio: f64,
}

/// A model to time: one that is there, or a shape.
enum Shape {
    Folder(PathBuf),
    Config(Box<ModelConfig>, String),
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
        let baseline = self.compare.as_deref().map(read_baseline).transpose()?;
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
            findings.beside = findings.tasks.iter().filter_map(|t| best_beside(t, &baseline)).collect();
        }
        if let Some(file) = &self.trace {
            write_trace(file, &findings.tasks)?;
        }
        for timing in &findings.tasks {
            session.table(&kernel_table(&timing.kernels));
        }
        session.inform(&findings.table(), &findings)
    }

    fn models(&self) -> Result<(Shape, Shape)> {
        let suite = match (&self.policy, &self.reward) {
            (Some(_), Some(_)) => None,
            _ => Some(Suite::find(None)?),
        };
        let first = suite.as_ref().and_then(|suite| suite.pairs().into_iter().next());
        let open = |given: &Option<PathBuf>, own: Option<PathBuf>| match (given, own) {
            (Some(path), _) => self.shape(path),
            (None, Some(dir)) => Ok(Shape::Folder(dir)),
            (None, None) => Err(Error::Usage("expected --policy and --reward: the suite has no pair".into())),
        };
        let (policy, reward) =
            (first.as_ref().map(|p| p.policy.dir.clone()), first.as_ref().map(|p| p.reward.dir.clone()));
        Ok((open(&self.policy, policy)?, open(&self.reward, reward)?))
    }

    fn shape(&self, path: &Path) -> Result<Shape> {
        if path.extension().is_none_or(|e| e != "json") {
            return Ok(Shape::Folder(path.to_path_buf()));
        }
        let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
        let mut config = ModelConfig::parse(path, &text)?;
        config.layers = self.layers.unwrap_or(config.layers).clamp(1, config.layers);
        Ok(Shape::Config(Box::new(config), path.display().to_string()))
    }
}

impl Shape {
    fn name(&self) -> String {
        match self {
            Shape::Folder(dir) => dir.display().to_string(),
            Shape::Config(config, name) => format!("{name}, {} layers, random weights", config.layers),
        }
    }

    /// A config made for a language model serves as reward model too: with a score head.
    fn load<B: Ops>(&self, ops: &B, scores: bool, seed: u64) -> Result<Transformer<B>> {
        match self {
            Shape::Folder(dir) => Transformer::open(ops, dir),
            Shape::Config(config, _) => {
                let mut config = (**config).clone();
                config.head = match scores {
                    true => crate::model::Head::Classification { labels: 1 },
                    false => crate::model::Head::Causal,
                };
                let weights = RandomWeights::new(&config, seed);
                Transformer::load(ops, config, &weights)
            }
        }
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
        Ok(Findings {
            version: env!("CARGO_PKG_VERSION"),
            device: ops.describe(),
            policy: self.policy.name(),
            reward: self.reward.name(),
            workload: self.workload.clone(),
            read_latency_ms: speed::read_latency(ops)?,
            tasks,
            beside: Vec::new(),
        })
    }
}

impl Findings {
    fn table(&self) -> Table {
        let columns = ["median ms", "q1–q3", "tokens", "tokens/s", "FLOP/s", "beside"];
        let mut heads = vec![("task", Align::Left)];
        heads.extend(columns.map(|name| (name, Align::Right)));
        let mut table = Table::new(&heads);
        let ms = |seconds: f64| number(Some(1e3 * seconds), 2);
        for t in &self.tasks {
            let beside = self.beside.iter().find(|b| b.task == t.task);
            let beside = beside.map_or(String::new(), |b| format!("{:.2}× {}", b.ratio, b.setting));
            table.row(vec![
                t.task.into(),
                ms(t.seconds.median).into(),
                format!("{}–{}", ms(t.seconds.q1), ms(t.seconds.q3)).into(),
                t.tokens.to_string().into(),
                count(Some(t.tokens_per_second)).into(),
                count(Some(t.flops_per_second)).into(),
                beside.into(),
            ]);
        }
        table.without_empty_columns()
    }
}

fn kernel_table(kernels: &[KernelShare]) -> Table {
    let columns = ["launches", "ms", "share %", "FLOP/s", "bytes/s"].map(|name| (name, Align::Right));
    let mut table = Table::new(&[&[("kernel", Align::Left)], columns.as_slice()].concat());
    let whole: f64 = kernels.iter().map(|k| k.milliseconds).sum();
    for k in kernels {
        let rate = |n: u64| if n == 0 { None } else { Some(n as f64 / (1e-3 * k.milliseconds)) };
        table.row(vec![
            k.kernel.into(),
            k.launches.to_string().into(),
            number(Some(k.milliseconds), 3).into(),
            number(Some(100.0 * k.milliseconds / whole), 1).into(),
            count(rate(k.flops)).into(),
            count(rate(k.bytes)).into(),
        ]);
    }
    table
}

/// The `results` of a baseline's JSON.
fn read_baseline(file: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).map_err(Error::read(file))?;
    let refuse = |found: &str| Error::File {
        file: file.to_path_buf(),
        expected: "a baseline with `results`".into(),
        found: found.into(),
        remedy: "write it with scripts/baseline_hf.py --out FILE".into(),
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| refuse(&e.to_string()))?;
    value["results"].as_array().cloned().ok_or_else(|| refuse("no such list"))
}

/// The baseline's fastest setting for a task.
fn best_beside(timing: &Timing, results: &[Value]) -> Option<Beside> {
    let wanted = if timing.task == "decode" { "generate" } else { timing.task };
    let rate = |r: &Value| r["tokens_per_second"].as_f64().filter(|_| r["task"] == wanted && r["setting"] != "ares");
    let best = results
        .iter()
        .filter(|r| rate(r).is_some())
        .max_by(|a, b| rate(a).unwrap_or(0.0).total_cmp(&rate(b).unwrap_or(0.0)))?;
    let tokens_per_second = rate(best)?;
    Some(Beside {
        task: timing.task.to_string(),
        setting: best["setting"].as_str().unwrap_or("?").to_string(),
        tokens_per_second,
        ratio: timing.tokens_per_second / tokens_per_second,
    })
}

/// `chrome://tracing` and Perfetto read it: one row per task.
fn write_trace(file: &Path, tasks: &[Timing]) -> Result<()> {
    let event = |task: usize, run: &KernelRun| {
        json!({ "name": run.kernel, "ph": "X", "pid": 0, "tid": task, "ts": 1e3 * f64::from(run.begin),
                "dur": 1e3 * f64::from(run.milliseconds),
                "args": { "flops": run.cost.flops, "bytes": run.cost.bytes } })
    };
    let events: Vec<Value> =
        tasks.iter().enumerate().flat_map(|(i, t)| t.runs.iter().map(move |r| event(i, r))).collect();
    let text = json!({ "traceEvents": events }).to_string();
    std::fs::write(file, text).map_err(Error::write(file))
}
