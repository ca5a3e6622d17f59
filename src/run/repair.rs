//! `ares repair`: failures in, adapters out.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checkpoint::{Repair, train};
use super::data::{read_as, read_pairs};
use super::dir::{FAILURES_IN, RunDir};
use super::manifest::Manifest;
use super::models::{Models, Scale, save_adapters};
use super::records::Lines;
use super::watch::Watch;
use crate::detect::Examiner;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::judge::Thresholds;
use crate::model::adapter_file::safetensors_bytes;
use crate::model::{AdapterFile, AdapterInit, HostTensor, Pair};
use crate::ops::Ops;
use crate::repair::room::rehearse;
use crate::repair::{
    Failure, Method, Phase, Prepared, Quarantined, Recipe, RepairData, RepairOutcome, Setting, StepMetrics, Trainer,
    admit,
};
use crate::text::rows::Row;
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RepairResult {
    pub(crate) method: String,
    pub(crate) failures: usize,
    /// Failures that were not trained on, with the reason.
    pub(crate) left_out: Vec<Quarantined>,
    #[serde(flatten)]
    pub(crate) outcome: RepairOutcome,
    /// Adapter folders, or files of gradients.
    pub(crate) written: Vec<PathBuf>,
    /// The first step's loss, and the last one's.
    pub(crate) loss: Option<[f64; 2]>,
}

/// The last unit of a repair.
const RESULT: &str = "result";

/// The settings as run.toml keeps them.
#[derive(Serialize)]
struct Receipt<'a> {
    method: &'static str,
    init: String,
    /// `[τ_r, μ_0, s]`, where no calibration fixes them.
    thresholds: Option<[f64; 3]>,
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
    let failures = given(options, dir)?;
    let data = read_data(options, &failures)?;
    receipt(ops, options, &failures, dir)?;
    let (mut examiner, thresholds) = open(ops, options, dir, watch)?;
    if let Some(done) = examiner.journal.get(RESULT)? {
        return Ok(done);
    }
    let (config, method) = (&options.config, options.method);
    rehearse(&examiner.subject, &[method], config)?;
    let Ready { prepared, left_out, .. } = prepare(&mut examiner, thresholds, "", data, watch)?;
    let mut result = RepairResult {
        method: method.name().to_string(),
        failures: prepared.failures.len(),
        left_out,
        outcome: RepairOutcome::default(),
        written: Vec::new(),
        loss: None,
    };
    if let Some(path) = &options.dump_gradients {
        let (setting, _) = at_work(&mut examiner, thresholds);
        let (mut trainer, mut step) =
            (Trainer::new(setting, &prepared, method, config, Some(options.init))?, StepMetrics::default());
        trainer.forward_backward(Phase::Both, &mut step)?;
        dump(&step, trainer.gradients()?, path)?;
        result.loss = Some([step.loss(); 2]);
        result.written.push(path.clone());
    } else {
        let (setting, journal) = at_work(&mut examiner, thresholds);
        let name = method.name().to_string();
        let repair =
            Repair { name, method, recipe: config, init: Some(options.init), earlier: None, round: None, label: None };
        (result.outcome, _) = train(setting, journal, &prepared, &repair, dir, &mut Lines::new(dir), watch)?;
        let history = &result.outcome.history;
        result.loss = history.first().zip(history.last()).map(|(first, last)| [first.loss(), last.loss()]);
        result.written = save_adapters(&examiner.subject, &dir.file("round-1"))?;
    }
    result.outcome.warnings.splice(..0, prepared.dropped);
    examiner.journal.put(RESULT, &result)?;
    dir.drop_checkpoints();
    Ok(result)
}

/// What a repair works on, of what was opened, and where it is kept.
pub(super) fn at_work<B: Ops>(
    examiner: &mut Examiner<Pair<B>>,
    thresholds: Thresholds,
) -> (Setting<'_, B>, &mut Journal) {
    let Examiner { subject: pair, judges, journal, decoding, .. } = examiner;
    (Setting { pair, judge: &mut *judges.judge, thresholds, decoding: decoding.clone() }, journal)
}

/// Repair data that the judge has admitted, with what the originals say of them.
#[derive(Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) failures: Vec<Failure>,
    pub(super) prepared: Prepared,
    pub(super) left_out: Vec<Quarantined>,
}

/// Lets the judge admit the failures, and asks the originals what training needs to know of everything. `name` tells it from other
/// preparations of the run.
pub(super) fn prepare<B: Ops>(
    examiner: &mut Examiner<Pair<B>>,
    thresholds: Thresholds,
    name: &str,
    mut data: RepairData,
    watch: &mut dyn Watch,
) -> Result<Ready> {
    watch.begin("prepare the repair data", 0);
    let (mut setting, journal) = at_work(examiner, thresholds);
    journal.stage(&format!("prepare {name}"));
    let ready: Ready = journal.unit(|| {
        let left_out = admit(&mut data, &mut setting)?;
        Ok(Ready { prepared: Prepared::new(&mut setting, &data)?, failures: data.failures, left_out })
    })?;
    let Prepared { failures, retain, replay, dropped } = &ready.prepared;
    let (n, retain, replay) = (failures.len(), retain.len(), replay.len());
    let out = ready.left_out.len() + dropped.len();
    watch.end(&format!("{n} failures, {retain} answers to retain, {replay} validated pairs; {out} left out"));
    Ok(ready)
}

/// One safetensors file: `term.<name>`, each one number, and `policy.` and `reward.` before PEFT's names of the gradients.
fn dump(step: &StepMetrics, gradients: [Option<AdapterFile>; 2], path: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (name, value) in step.terms.iter().filter(|(name, _)| *name != "coupling" && *name != "loss") {
        let value = HostTensor { shape: vec![1], data: value.iter().map(|value| *value as f32).collect() };
        tensors.insert(format!("term.{name}"), value);
    }
    for (role, file) in ["policy", "reward"].into_iter().zip(gradients) {
        let named = file.into_iter().flat_map(|file| file.tensors);
        tensors.extend(named.map(|(name, tensor)| (format!("{role}.{name}"), tensor)));
    }
    write_atomic(path, &safetensors_bytes(&tensors, &[], path)?)
}

/// The models and the thresholds.
fn open<B: Ops>(
    ops: &B,
    options: &RepairOptions,
    dir: &RunDir,
    watch: &mut dyn Watch,
) -> Result<(Examiner<Pair<B>>, Thresholds)> {
    match &options.scale {
        Scale::Calibration(path) => {
            let calibration = read_pairs(path, Row::calibration_pairs)?;
            let evaluator = options.models.calibrated(ops, calibration, options.config.seed, dir, watch)?;
            Ok((evaluator.examiner, evaluator.thresholds))
        }
        &Scale::Given { tau_r, mu_0, s } => {
            Ok((options.models.open(ops, dir)?, Thresholds { tau_h: options.models.tau_h, tau_r, mu_0, s }))
        }
    }
}

fn receipt<B: Ops>(ops: &B, options: &RepairOptions, failures: &PathBuf, dir: &RunDir) -> Result<()> {
    let (calibration, thresholds) = match &options.scale {
        Scale::Calibration(path) => (Some(path), None),
        &Scale::Given { tau_r, mu_0, s } => (None, Some([tau_r, mu_0, s])),
    };
    let receipt = Receipt {
        method: options.method.name(),
        init: format!("{:?}", options.init),
        thresholds,
        repair: &options.config,
        models: &options.models,
    };
    let manifest = Manifest::new("repair", &ops.describe(), &[options.config.seed], &receipt)?;
    let files = [&options.retain, &options.replay, failures].into_iter().chain(calibration);
    options.models.write_receipt(manifest, files.map(PathBuf::as_path), dir).map(|_| ())
}

/// The file of failures: the one that was named, else what came by standard input, which is kept so that the run can be resumed.
fn given(options: &RepairOptions, dir: &RunDir) -> Result<PathBuf> {
    let kept = dir.file(FAILURES_IN);
    match &options.failures {
        Some(path) => return Ok(path.clone()),
        None if dir.resumed && kept.is_file() => {}
        None => {
            let mut bytes = Vec::new();
            std::io::stdin().lock().read_to_end(&mut bytes).map_err(Error::read(Path::new("standard input")))?;
            write_atomic(&kept, &bytes)?;
        }
    }
    Ok(kept)
}

/// Everything is read strictly: what is trained on must be what was meant.
fn read_data(options: &RepairOptions, failures: &Path) -> Result<RepairData> {
    Ok(RepairData {
        failures: read_as(failures, Failure::read)?,
        retain: read_as(&options.retain, |row| row.answered(false))?,
        replay: read_pairs(&options.replay, Row::pairs)?,
    })
}
