//! `ares repair`: failures in, adapters out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::data::read_as;
use super::dir::RunDir;
use super::interrupt;
use super::manifest::Manifest;
use super::models::{Models, Scale, save_adapters};
use super::records::{metric, write_lines};
use super::watch::Watch;
use crate::error::Result;
use crate::judge::{Judges, Thresholds};
use crate::model::adapter_file::safetensors_bytes;
use crate::model::{AdapterFile, AdapterInit, HostTensor, Pair};
use crate::ops::Ops;
use crate::repair::{
    Failure, Method, Prepared, Quarantined, Recipe, RepairData, RetainRow, StepMetrics, Trainer, admit,
};
use crate::text::rows::{Row, read};
use crate::text::write_atomic;

/// What `ares repair` was asked for.
#[derive(Debug, Clone)]
pub(crate) struct RepairOptions {
    pub(crate) models: Models,
    pub(crate) method: Method,
    pub(crate) config: Recipe,
    pub(crate) init: AdapterInit,
    /// `prompt`, `rejected`, `chosen`, `verdict`; standard input if `None`.
    pub(crate) failures: Option<PathBuf>,
    pub(crate) retain: PathBuf,
    pub(crate) replay: PathBuf,
    pub(crate) scale: Scale,
    /// Only the first step's loss terms and gradients are computed, and written to this safetensors file.
    pub(crate) dump_gradients: Option<PathBuf>,
}

/// What a repair was and did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RepairResult {
    pub(crate) method: &'static str,
    pub(crate) steps: usize,
    pub(crate) failures: usize,
    /// Failures that were not trained on, with the reason.
    pub(crate) left_out: Vec<Quarantined>,
    pub(crate) tokens_policy: u64,
    pub(crate) tokens_reward: u64,
    pub(crate) tokens_generated: u64,
    pub(crate) seconds: f64,
    /// Adapter folders, or files of gradients.
    pub(crate) written: Vec<PathBuf>,
    pub(crate) warnings: Vec<String>,
    /// The first step's loss, and the last one's.
    pub(crate) loss: Option<[f64; 2]>,
}

/// The settings as run.toml keeps them.
#[derive(Serialize)]
struct Receipt<'a> {
    method: &'static str,
    init: String,
    repair: &'a Recipe,
    models: &'a Models,
}

/// Reads everything, lets the judge admit the failures, trains, writes.
pub(crate) fn repair<B: Ops>(
    ops: &B,
    options: &RepairOptions,
    dir: &RunDir,
    watch: &mut dyn Watch,
) -> Result<RepairResult> {
    let mut data = read_data(options)?;
    receipt(ops, options, dir)?;
    let (mut pair, mut judges, thresholds) = open(ops, options, watch)?;
    let decoding = options.models.settings(options.config.seed).decoding;
    watch.begin("prepare the repair data", 0);
    let judge = &mut *judges.judge;
    let left_out = admit(&mut data, &mut pair, judge, &thresholds, &decoding)?;
    let prepared = Prepared::new(&mut pair, judge, &data, &thresholds)?;
    watch.end(&format!("{} failures, {} left out", prepared.failures.len(), left_out.len() + prepared.dropped.len()));
    watch.begin(&format!("repair by {}", options.method.name()), options.config.steps);
    let (config, method) = (&options.config, options.method);
    let mut trainer =
        Trainer::new(&mut pair, judge, &prepared, method, config, thresholds, &decoding, Some(options.init))?;
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
        dump(&step, trainer.gradients()?, path)?;
        result.written.push(path.clone());
        return Ok(result);
    }
    let mut metrics = Vec::new();
    let outcome = trainer.run(|step| {
        interrupt::check()?;
        watch.at(step.step + 1, &format!("loss {:.3}", step.loss));
        let first = result.loss.map_or(step.loss, |[first, _]| first);
        result.loss = Some([first, step.loss]);
        metrics.push(metric(method, config.seed, step));
        Ok(())
    })?;
    watch.end(&format!("{} steps in {:.1} s", outcome.steps, outcome.seconds));
    write_lines(&dir.file("metrics.jsonl"), &metrics)?;
    result.written = save_adapters(&pair, &dir.file("round-1"))?;
    (result.steps, result.seconds) = (outcome.steps, outcome.seconds);
    (result.tokens_policy, result.tokens_reward) = (outcome.tokens_policy, outcome.tokens_reward);
    result.tokens_generated = outcome.tokens_generated;
    result.warnings.extend(outcome.warnings);
    Ok(result)
}

/// One safetensors file: `term.<name>`, each one number, and `policy.` and `reward.` before PEFT's names of the gradients.
fn dump(step: &StepMetrics, gradients: [Option<AdapterFile>; 2], path: &Path) -> Result<()> {
    let term =
        |(name, value): (&str, f64)| (format!("term.{name}"), HostTensor { shape: vec![1], data: vec![value as f32] });
    let mut tensors: BTreeMap<String, HostTensor> = step.terms().into_iter().map(term).collect();
    for (role, file) in ["policy", "reward"].into_iter().zip(gradients) {
        let named = file.into_iter().flat_map(|file| file.tensors);
        tensors.extend(named.map(|(name, tensor)| (format!("{role}.{name}"), tensor)));
    }
    write_atomic(path, &safetensors_bytes(&tensors, path)?)
}

/// The pair, its judges, and the thresholds.
fn open<B: Ops>(ops: &B, options: &RepairOptions, watch: &mut dyn Watch) -> Result<(Pair<B>, Judges, Thresholds)> {
    match &options.scale {
        Scale::Calibration(path) => {
            let calibration = read_as(path, Row::pair)?;
            let (pair, judges, evaluator) = options.models.calibrated(ops, calibration, options.config.seed, watch)?;
            Ok((pair, judges, evaluator.thresholds()))
        }
        Scale::Given { tau_r, mu_0, s } => {
            let (pair, judges) = options.models.open(ops)?;
            let (tau_r, mu_0, s) = (*tau_r, *mu_0, *s);
            Ok((pair, judges, Thresholds { tau_h: options.models.tau_h, tau_r, mu_0, s }))
        }
    }
}

fn receipt<B: Ops>(ops: &B, options: &RepairOptions, dir: &RunDir) -> Result<()> {
    let receipt = Receipt {
        method: options.method.name(),
        init: format!("{:?}", options.init),
        repair: &options.config,
        models: &options.models,
    };
    let manifest = Manifest::new("repair", &ops.describe(), &[options.config.seed], &receipt)?;
    let calibration = match &options.scale {
        Scale::Calibration(path) => Some(path),
        Scale::Given { .. } => None,
    };
    let files = [&options.retain, &options.replay].into_iter().chain(&options.failures).chain(calibration);
    options.models.write_receipt(manifest, files, dir)
}

/// Everything is read strictly: what is trained on must be what was meant.
fn read_data(options: &RepairOptions) -> Result<RepairData> {
    Ok(RepairData {
        failures: read(options.failures.as_deref(), true)?.iter().map(Failure::read).collect::<Result<_>>()?,
        retain: read_as(&options.retain, RetainRow::read)?,
        replay: read_as(&options.replay, Row::pair)?,
    })
}
