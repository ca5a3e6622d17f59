//! What was found, as tables, JSON and a trace.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::backend::cost::KernelRun;
use crate::backend::cuda::driver::DeviceInfo;
use crate::bench::load::{CheckpointLoad, KernelLoad};
use crate::bench::ops::OpTiming;
use crate::bench::plan::Plan;
use crate::bench::products::ProductTiming;
use crate::bench::{KernelShare, Spread, Timing, Workload};
use crate::error::{Error, Result};
use crate::ops::Rates;
use crate::report::Align::{Left, Right};
use crate::report::numbers::{count, number, percent};
use crate::report::{Column, Table};

/// What `--json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Findings {
    pub(crate) version: &'static str,
    pub(crate) device: String,
    pub(crate) policy: String,
    pub(crate) reward: String,
    pub(crate) workload: Workload,
    pub(crate) read_latency_ms: f64,
    /// What floors are made of, measured on the same device in the same run; none on the simulator.
    pub(crate) ceilings: Option<Rates>,
    pub(crate) tasks: Vec<Timing>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) ops: Vec<OpTiming>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) products: Vec<ProductTiming>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) load: Option<Load>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) beside: Vec<Beside>,
}

/// What loading took; the kernels' only on a GPU.
#[derive(Debug, Serialize)]
pub(crate) struct Load {
    pub(crate) checkpoints: Vec<CheckpointLoad>,
    pub(crate) kernels: Option<KernelLoad>,
}

/// The best setting of a baseline, and our rate as a multiple of its.
#[derive(Debug, Serialize)]
pub(crate) struct Beside {
    task: &'static str,
    setting: String,
    tokens_per_second: f64,
    ratio: f64,
}

impl Findings {
    /// One of each kind that was asked for.
    pub(crate) fn tables(&self) -> Vec<Table> {
        let tasks = (!self.tasks.is_empty()).then(|| self.task_table());
        let ops = (!self.ops.is_empty()).then(|| op_table(&self.ops));
        let products = (!self.products.is_empty()).then(|| product_table(&self.products));
        tasks.into_iter().chain(ops).chain(products).chain(self.load.as_ref().map(load_table)).collect()
    }

    fn task_table(&self) -> Table {
        let beside = |t: &&Timing| {
            let beside = self.beside.iter().find(|b| b.task == t.task);
            beside.map_or(String::new(), |b| format!("{:.2}× {}", b.ratio, b.setting)).into()
        };
        let columns: [Column<&Timing>; 8] = [
            ("task", Left, &|t| t.task.into()),
            ("median ms", Right, &|t| ms(t.timed.seconds.median).into()),
            ("q1–q3", Right, &|t| quartiles(&t.timed.seconds).into()),
            ("tokens", Right, &|t| t.tokens.to_string().into()),
            ("tokens/s", Right, &|t| count(Some(t.tokens_per_second)).into()),
            ("FLOP/s", Right, &|t| count(Some(t.timed.flops_per_second)).into()),
            ("of floor %", Right, &|t| percent(t.timed.share_of_floor).into()),
            ("beside", Right, &beside),
        ];
        Table::of(&self.tasks, &columns).without_empty_columns()
    }

    /// Of every task that ran kernels.
    pub(crate) fn kernel_tables(&self) -> Vec<Table> {
        self.tasks.iter().filter(|t| !t.timed.kernels.is_empty()).map(|t| kernel_table(&t.timed.kernels)).collect()
    }

    /// `chrome://tracing` and Perfetto read it: one row per task and operation.
    pub(crate) fn write_trace(&self, file: &Path) -> Result<()> {
        let event = |task: usize, run: &KernelRun| {
            json!({ "name": run.kernel, "ph": "X", "pid": 0, "tid": task, "ts": 1e3 * f64::from(run.begin),
                    "dur": 1e3 * f64::from(run.milliseconds),
                    "args": { "flops": run.cost.flops, "bytes": run.cost.bytes } })
        };
        let name = |row: usize, name: &str| json!({ "name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": { "name": name } });
        let tasks = self.tasks.iter().map(|t| (t.task, &t.timed.runs));
        let rows = tasks.chain(self.ops.iter().map(|op| (op.op, &op.timed.runs))).enumerate();
        let events: Vec<Value> = rows
            .flat_map(|(i, (row, runs))| std::iter::once(name(i, row)).chain(runs.iter().map(move |r| event(i, r))))
            .collect();
        let text = json!({ "traceEvents": events }).to_string();
        std::fs::write(file, text).map_err(Error::write(file))
    }
}

/// What a task holds, and what it launches.
pub(crate) fn plan_tables(plan: &Plan, device: &DeviceInfo) -> [Table; 2] {
    let gb = |bytes: u64| number(Some(bytes as f64 / 1e9), 3);
    let mut held = Table::new(&[(plan.task, Left), ("GB", Right), ("of the device %", Right)]);
    let share = |bytes: u64| percent(Some(bytes as f64 / device.memory as f64));
    let mut row = |name: &str, bytes| held.row(vec![name.into(), gb(bytes).into(), share(bytes).into()]);
    plan.parts.iter().for_each(|(name, bytes)| row(name, *bytes));
    row("at once", plan.peak_bytes);
    let columns: [Column<&KernelShare>; 5] = [
        ("kernel", Left, &|k| k.kernel.into()),
        ("launches", Right, &|k| k.launches.to_string().into()),
        ("FLOPs", Right, &|k| count((k.flops > 0).then_some(k.flops as f64)).into()),
        ("bytes", Right, &|k| count((k.bytes > 0).then_some(k.bytes as f64)).into()),
        ("floor ms", Right, &|k| number(k.floor_ms, 3).into()),
    ];
    let mut kernels: Vec<&KernelShare> = plan.kernels.iter().collect();
    kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.launches));
    let mut launched = Table::of(kernels, &columns);
    let replayed = format!("all, {} recorded, {} replayed", plan.captures, plan.replays);
    let floor = plan.kernels.iter().filter_map(|kernel| kernel.floor_ms).reduce(|a, b| a + b);
    let (launches, blank) = (plan.launches.to_string().into(), || "".into());
    launched.row(vec![replayed.into(), launches, blank(), blank(), number(floor, 3).into()]);
    [held, launched]
}

fn kernel_table(kernels: &[KernelShare]) -> Table {
    let whole: f64 = kernels.iter().map(|k| k.milliseconds).sum();
    let rate = |n: u64, k: &KernelShare| count((n > 0).then(|| n as f64 / (1e-3 * k.milliseconds))).into();
    let columns: [Column<&KernelShare>; 7] = [
        ("kernel", Left, &|k| k.kernel.into()),
        ("launches", Right, &|k| k.launches.to_string().into()),
        ("ms", Right, &|k| number(Some(k.milliseconds), 3).into()),
        ("share %", Right, &|k| number(Some(100.0 * k.milliseconds / whole), 1).into()),
        ("FLOP/s", Right, &|k| rate(k.flops, k)),
        ("bytes/s", Right, &|k| rate(k.bytes, k)),
        ("of floor %", Right, &|k| percent(k.share_of_floor).into()),
    ];
    Table::of(kernels, &columns)
}

fn op_table(ops: &[OpTiming]) -> Table {
    let columns: [Column<&OpTiming>; 6] = [
        ("operation", Left, &|op| op.op.into()),
        ("median ms", Right, &|op| ms(op.timed.seconds.median).into()),
        ("q1–q3", Right, &|op| quartiles(&op.timed.seconds).into()),
        ("FLOP/s", Right, &|op| count((op.timed.flops > 0).then_some(op.timed.flops_per_second)).into()),
        ("bytes/s", Right, &|op| count(Some(op.bytes_per_second)).into()),
        ("of floor %", Right, &|op| percent(op.timed.share_of_floor).into()),
    ];
    Table::of(ops, &columns)
}

/// Each product's ways, those marked that its architectures' plans take.
pub(crate) fn product_table(products: &[ProductTiming]) -> Table {
    let measured = |p: &ProductTiming| p.seconds.map(|seconds| seconds.median);
    let rate = |seconds: Option<f64>, p: &ProductTiming| count(seconds.map(|seconds| p.flops as f64 / seconds)).into();
    let columns: [Column<&ProductTiming>; 8] = [
        ("product", Left, &|p| p.product.into()),
        ("m × n × k", Left, &|p| p.shape.map(|n| n.to_string()).join(" × ").into()),
        ("tile", Left, &|p| p.way.clone().into()),
        ("planned", Left, &|p| if p.planned { "yes" } else { "" }.into()),
        ("predicted ms", Right, &|p| p.predicted_seconds.map_or(String::new(), ms).into()),
        ("FLOP/s so", Right, &|p| rate(p.predicted_seconds, p)),
        ("median ms", Right, &|p| measured(p).map_or(String::new(), ms).into()),
        ("FLOP/s", Right, &|p| rate(measured(p), p)),
    ];
    Table::of(products, &columns).without_empty_columns()
}

fn load_table(load: &Load) -> Table {
    let columns: [Column<&CheckpointLoad>; 6] = [
        ("loaded", Left, &|c| c.model.clone().into()),
        ("files", Right, &|c| c.files.to_string().into()),
        ("bytes", Right, &|c| count(Some(c.bytes as f64)).into()),
        ("open ms", Right, &|c| ms(c.open_seconds.median).into()),
        ("upload ms", Right, &|c| ms(c.upload_seconds.median).into()),
        ("bytes/s", Right, &|c| count(Some(c.upload_bytes_per_second)).into()),
    ];
    let mut table = Table::of(&load.checkpoints, &columns);
    if let Some(KernelLoad { files, kernels, seconds }) = &load.kernels {
        let name = format!("{kernels} compiled kernels");
        table.row(vec![name.into(), files.to_string().into(), "".into(), "".into(), ms(*seconds).into()]);
    }
    table
}

fn ms(seconds: f64) -> String {
    number(Some(1e3 * seconds), if seconds < 1e-3 { 4 } else { 2 })
}

fn quartiles(seconds: &Spread) -> String {
    format!("{}–{}", ms(seconds.q1), ms(seconds.q3))
}

/// What was measured elsewhere: the JSON that scripts/baseline_hf.py wrote.
#[derive(Deserialize)]
pub(crate) struct Baseline {
    results: Vec<Setting>,
}

/// One task in one setting; without a rate where it could not be timed.
#[derive(Deserialize)]
struct Setting {
    task: String,
    setting: String,
    tokens_per_second: Option<f64>,
}

impl Baseline {
    pub(crate) fn read(file: &Path) -> Result<Baseline> {
        let text = std::fs::read_to_string(file).map_err(Error::read(file))?;
        let remedy = "write it with scripts/baseline_hf.py --out FILE";
        serde_json::from_str(&text).map_err(Error::file(file, "a baseline with `results`", remedy))
    }

    /// Its fastest setting for a task.
    pub(crate) fn beside(&self, timing: &Timing) -> Option<Beside> {
        let others = self.results.iter().filter(|r| r.task == timing.task && r.setting != "ares");
        let timed = others.filter_map(|r| Some((&r.setting, r.tokens_per_second?)));
        let (setting, tokens_per_second) = timed.max_by(|a, b| a.1.total_cmp(&b.1))?;
        let ratio = timing.tokens_per_second / tokens_per_second;
        Some(Beside { task: timing.task, setting: setting.clone(), tokens_per_second, ratio })
    }
}
