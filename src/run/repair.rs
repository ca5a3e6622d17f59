//! `ares repair`: failures in, adapters out.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::bench::{self, Bench, Models};
use super::dir::RunDir;
use super::interrupt;
use super::manifest::{self, Manifest};
use super::records::{metric, write_lines};
use super::watch::Watch;
use crate::detect::rows::PairRow;
use crate::error::Result;
use crate::judge::Verdict;
use crate::model::{AdapterFile, AdapterInit, Pretrained};
use crate::ops::Ops;
use crate::repair::{
    Failure, Method, Prepared, Quarantined, RepairConfig, RepairData, ReplayPair, Reply, RetainRow, StepMetrics,
    Trainer, admit,
};
use crate::text::rows::{Row, read};

/// What `ares repair` was asked for.
#[derive(Debug, Clone)]
pub struct RepairOptions {
    pub models: Models,
    pub method: Method,
    pub config: RepairConfig,
    pub init: AdapterInit,
    /// `prompt`, `rejected`, `chosen`, `verdict`; standard input if `None`.
    pub failures: Option<PathBuf>,
    pub retain: PathBuf,
    pub replay: PathBuf,
    pub calibration: PathBuf,
    /// Only the first step's gradients are computed, and written there under PEFT's names.
    pub dump_gradients: Option<PathBuf>,
}

/// What a repair was and did.
#[derive(Debug, Clone, Serialize)]
pub struct RepairResult {
    pub method: &'static str,
    pub steps: usize,
    pub failures: usize,
    /// Failures that were not trained on, with the reason.
    pub left_out: Vec<Quarantined>,
    pub tokens_policy: u64,
    pub tokens_reward: u64,
    pub tokens_generated: u64,
    pub seconds: f64,
    /// Adapter folders, or files of gradients.
    pub written: Vec<PathBuf>,
    pub warnings: Vec<String>,
    /// The first step's loss, and the last one's.
    pub loss: Option<[f64; 2]>,
}

/// The settings as run.toml keeps them.
#[derive(Serialize)]
struct Receipt<'a> {
    method: &'static str,
    init: String,
    repair: &'a RepairConfig,
    models: bench::Receipt,
}

/// Reads everything, lets the judge admit the failures, trains, writes.
pub fn repair<B: Ops>(ops: &B, options: &RepairOptions, dir: &RunDir, watch: &mut dyn Watch) -> Result<RepairResult> {
    let mut data = read_data(options)?;
    let calibration = bench::pairs(&options.calibration)?;
    receipt(ops, options, dir)?;
    let mut bench = Bench::open(ops, &options.models, calibration, options.config.seed, watch)?;
    let thresholds = bench.evaluator.thresholds();
    let decoding = bench.evaluator.settings().decoding.clone();
    watch.begin("prepare the repair data", 0);
    let judge = &mut *bench.judges.judge;
    let left_out = admit(&mut data, &mut bench.pair, judge, &thresholds, &decoding)?;
    let prepared = Prepared::new(&mut bench.pair, judge, &data, &thresholds)?;
    watch.end(&format!("{} failures, {} left out", prepared.failures.len(), left_out.len() + prepared.dropped.len()));
    watch.begin(&format!("repair by {}", options.method.name()), options.config.steps);
    let (config, method) = (&options.config, options.method);
    let mut trainer =
        Trainer::with_init(&mut bench.pair, judge, &prepared, method, config, thresholds, &decoding, options.init)?;
    let mut result = RepairResult {
        method: method.name(),
        steps: 0,
        failures: prepared.failures.len(),
        left_out,
        tokens_policy: 0,
        tokens_reward: 0,
        tokens_generated: 0,
        seconds: 0.0,
        written: Vec::new(),
        warnings: prepared.dropped.clone(),
        loss: None,
    };
    if let Some(path) = &options.dump_gradients {
        let mut step = StepMetrics::default();
        trainer.forward_backward(&mut step)?;
        result.loss = Some([step.loss; 2]);
        for (role, file) in ["policy", "reward"].into_iter().zip(trainer.gradients()?) {
            save(&mut result.written, file, &path.join(role))?;
        }
        return Ok(result);
    }
    let mut metrics = Vec::new();
    let outcome = trainer.run(|step| {
        interrupt::check("")?;
        watch.at(step.step + 1, &format!("loss {:.3}", step.loss));
        let first = result.loss.map_or(step.loss, |[first, _]| first);
        result.loss = Some([first, step.loss]);
        metrics.push(metric(method, config.seed, step));
        Ok(())
    })?;
    watch.end(&format!("{} steps in {:.1} s", outcome.steps, outcome.seconds));
    write_lines(&dir.file("metrics.jsonl"), &metrics)?;
    for (role, model) in [("policy", &bench.pair.policy), ("reward", &bench.pair.reward)] {
        save(&mut result.written, adapter(model)?, &dir.file("round-1").join(role))?;
    }
    (result.steps, result.seconds) = (outcome.steps, outcome.seconds);
    (result.tokens_policy, result.tokens_reward) = (outcome.tokens_policy, outcome.tokens_reward);
    result.tokens_generated = outcome.tokens_generated;
    result.warnings.extend(outcome.warnings);
    Ok(result)
}

fn adapter<B: Ops>(model: &Pretrained<B>) -> Result<Option<AdapterFile>> {
    let Some(adapter) = &model.adapter else { return Ok(None) };
    let mut file = adapter.to_file(&model.transformer.ops, &model.transformer.config)?;
    file.base_model_name = Some(model.dir.display().to_string());
    Ok(Some(file))
}

fn save(written: &mut Vec<PathBuf>, file: Option<AdapterFile>, place: &Path) -> Result<()> {
    if let Some(file) = file {
        file.save(place)?;
        written.push(place.to_path_buf());
    }
    Ok(())
}

fn receipt<B: Ops>(ops: &B, options: &RepairOptions, dir: &RunDir) -> Result<()> {
    let receipt = Receipt {
        method: options.method.name(),
        init: format!("{:?}", options.init),
        repair: &options.config,
        models: options.models.receipt(),
    };
    let mut manifest = Manifest::new("repair", &ops.describe(), &[options.config.seed], &receipt)?;
    let files = [options.failures.as_ref(), Some(&options.retain), Some(&options.replay), Some(&options.calibration)];
    files.into_iter().flatten().try_for_each(|path| manifest.add_input(path))?;
    options.models.add_inputs(&mut manifest)?;
    manifest.write(&dir.file(manifest::NAME))
}

/// Everything is read strictly: what is trained on must be what was meant.
fn read_data(options: &RepairOptions) -> Result<RepairData> {
    let rows = |path: Option<&Path>| read(path, true);
    let failures = rows(options.failures.as_deref())?.iter().map(failure).collect::<Result<Vec<Failure>>>()?;
    let retain = |row: &Row| {
        let response = row.response()?.ok_or_else(|| row.wrong("a `response` to retain", "none"))?;
        Ok(RetainRow { prompt: row.prompt(false)?, response })
    };
    let replay = |PairRow { prompt, chosen, rejected, .. }| ReplayPair { prompt, chosen, rejected };
    Ok(RepairData {
        failures,
        retain: rows(Some(&options.retain))?.iter().map(retain).collect::<Result<_>>()?,
        replay: bench::pairs(&options.replay)?.into_iter().map(replay).collect(),
    })
}

/// A row of `failures.jsonl`. Without a verdict both models are held to have failed.
fn failure(row: &Row) -> Result<Failure> {
    let verdict = match row.opt_text("verdict")? {
        None => Verdict::Coupled,
        Some(name) => [Verdict::Reward, Verdict::Policy, Verdict::Coupled]
            .into_iter()
            .find(|verdict| format!("{verdict:?}").eq_ignore_ascii_case(name))
            .ok_or_else(|| row.wrong("a `verdict` of reward, policy or coupled", name))?,
    };
    Ok(Failure {
        prompt: row.prompt(false)?,
        rejected: Reply { text: row.text("rejected")?.to_string(), tokens: row.ids("rejected_tokens")? },
        chosen: row.opt_text("chosen")?.map(str::to_string),
        verdict,
    })
}
