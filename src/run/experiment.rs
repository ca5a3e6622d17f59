//! The whole method on one pair: calibrate, measure, search, repair by several methods at equal steps, measure again on prompts
//! that nothing before has seen.

use std::path::PathBuf;

use serde::Serialize;

use super::data::{DataFiles, Splits};
use super::dir::RunDir;
use super::manifest::Manifest;
use super::models::{Models, save_adapters};
use super::probe::hunt;
use super::records::Lines;
use super::repair::{self, setting};
use super::summary::{self, Summary};
use super::watch::Watch;
use crate::detect::evaluate::{Evaluation, benchmark_id, relate};
use crate::detect::gates::{accepted, gates};
use crate::detect::measure::MethodResult;
use crate::detect::observe::Versions;
use crate::detect::{Evaluator, Examiner};
use crate::error::{Error, Result};
use crate::judge::Sense;
use crate::model::checkpoint::promised;
use crate::model::{ModelConfig, Pair, Version};
use crate::ops::Ops;
use crate::probe::grammar::Grammar;
use crate::probe::lift;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::search::{Found, SearchSettings};
use crate::probe::select::select_failures;
use crate::repair::{Method, Prepared, Recipe, RepairData, RepairOutcome};

/// Everything that decides an experiment's numbers; serialised, the settings that run.toml keeps.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Experiment {
    /// `demo` or `compare`.
    #[serde(skip)]
    pub(crate) command: &'static str,
    pub(crate) models: Models,
    #[serde(skip)]
    pub(crate) data: DataFiles,
    #[serde(skip)]
    pub(crate) grammar: PathBuf,
    #[serde(skip)]
    pub(crate) suite: Option<String>,
    pub(crate) methods: Vec<Method>,
    #[serde(skip)]
    pub(crate) seeds: Vec<u64>,
    pub(crate) repair: Recipe,
    /// Queries of each search, adaptive and uniform alike.
    pub(crate) probes: usize,
    /// Repair at most N failures.
    pub(crate) failures: usize,
    pub(crate) sense: Sense,
    /// Lengths of the forced prefixes that the test measures.
    pub(crate) prefill: Vec<usize>,
}

/// An experiment at work.
struct Lab<'a, B: Ops> {
    experiment: &'a Experiment,
    dir: &'a RunDir,
    watch: &'a mut dyn Watch,
    evaluator: Evaluator<Pair<B>>,
    splits: Splits,
    grammar: Grammar,
    lines: Lines,
}

/// Runs everything and writes the run directory's files but the report. Ctrl-C ends it with `Error::Interrupted` after the batch
/// in progress; what was finished stays.
pub(crate) fn run<B: Ops>(ops: &B, experiment: &Experiment, dir: &RunDir, watch: &mut dyn Watch) -> Result<Summary> {
    let splits = Splits::read(&experiment.data)?;
    let manifest = Manifest::new(experiment.command, &ops.describe(), &experiment.seeds, experiment)?;
    let files = experiment.data.paths().into_iter().chain([&experiment.grammar]);
    experiment.models.write_receipt(manifest, files, dir)?;
    let seed = experiment.seeds.first().copied().unwrap_or(0);
    let calibration = splits.calibration.clone();
    let evaluator = experiment.models.calibrated(ops, calibration, seed, watch)?;
    let (grammar, lines) = (Grammar::read(&experiment.grammar)?, Lines::default());
    let mut lab = Lab { experiment, dir, watch, evaluator, splits, grammar, lines };
    let before = lab.before()?;
    let (mut methods, mut adaptive, mut uniform) = (Vec::new(), Vec::new(), Vec::new());
    for &seed in &experiment.seeds {
        let found = [lab.search(SamplerKind::default(), seed)?, lab.search(SamplerKind::Uniform, seed)?];
        let prepared = lab.prepare(&found, seed)?;
        let mut measured = Vec::new();
        for &method in experiment.methods.iter().filter(|&&m| m != Method::None) {
            measured.push(lab.method(method, seed, &prepared, &before)?);
        }
        methods.extend(relate(measured, &before[0], experiment.sense, seed));
        let [found, control] = found;
        adaptive.push(found.summary);
        uniform.push(control.summary);
    }
    let [before, _] = before;
    let probe = (!adaptive.is_empty()).then(|| lift(&adaptive, &uniform, seed));
    let thresholds = lab.evaluator.thresholds;
    let Examiner { judges, decoding, tau_h, .. } = lab.evaluator.examiner;
    let summary = Summary {
        schema: summary::SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_string(),
        benchmark_id: benchmark_id(&lab.splits.test, judges.judge.name(), tau_h, &decoding),
        device: ops.describe(),
        seeds: experiment.seeds.clone(),
        suite: experiment.suite.clone(),
        thresholds,
        decoding,
        splits: lab.splits.info,
        before: before.measure,
        methods,
        probe,
        rounds: Vec::new(),
        unfinished: None,
    };
    lab.lines.write(dir)?;
    summary::write(&dir.file(summary::NAME), &summary)?;
    Ok(summary)
}

impl<B: Ops> Lab<'_, B> {
    /// What test and gate say before any repair.
    fn before(&mut self) -> Result<[Evaluation; 2]> {
        self.watch.begin("measure the originals", 0);
        let test = self.evaluator.before(&self.splits.test, &self.experiment.prefill)?;
        let gate = self.evaluator.before(&self.splits.gate, &[])?;
        self.watch.end(&headline(&test));
        self.lines.outcomes("before", 0, &test);
        Ok([test, gate])
    }

    fn search(&mut self, kind: SamplerKind, seed: u64) -> Result<Found> {
        let e = self.experiment;
        let settings = SearchSettings {
            sense: e.sense,
            version: Version::Start,
            ..SearchSettings::new(e.probes, seed, e.models.max_new_tokens)
        };
        let (plausible, mut sampler) = (&self.splits.plausible, Sampler::new(kind, &self.grammar));
        let evaluator = &mut self.evaluator;
        let found = hunt(evaluator, &self.grammar, plausible, &settings, &mut sampler, &mut *self.watch)?;
        if found.interrupted {
            return Err(Error::Interrupted(String::new()));
        }
        self.lines.probes(&found.records, seed, kind == SamplerKind::Uniform);
        Ok(found)
    }

    /// Chooses the failures to repair from both searches (the adaptive one looks for coupled failures and sees little of the rest),
    /// lets the judge admit them, and asks the originals what training needs to know of them.
    fn prepare(&mut self, found: &[Found; 2], seed: u64) -> Result<Prepared> {
        let e = self.experiment;
        let thresholds = self.evaluator.thresholds;
        let records: Vec<ProbeRecord> = found.iter().flat_map(|found| &found.records).cloned().collect();
        let chosen = select_failures(&records, e.sense, e.failures, seed);
        let mut data = RepairData {
            failures: chosen.iter().filter_map(|record| record.failure(e.sense, thresholds.tau_h)).collect(),
            retain: self.splits.retain.clone(),
            replay: self.splits.replay.clone(),
        };
        let mut setting = setting(&mut self.evaluator.examiner, thresholds);
        let (prepared, _) = repair::prepare(&mut setting, &mut data, &mut *self.watch)?;
        self.lines.failures(&data.failures, seed);
        Ok(prepared)
    }

    /// One repair with its measures; the adapters are written before anything is measured.
    fn method(
        &mut self,
        method: Method,
        seed: u64,
        prepared: &Prepared,
        [before, gate_before]: &[Evaluation; 2],
    ) -> Result<(MethodResult, Evaluation)> {
        let config = self.experiment.repair.with_seed(seed);
        let thresholds = self.evaluator.thresholds;
        let examiner = &mut self.evaluator.examiner;
        let outcome = repair::train(setting(examiner, thresholds), prepared, method, &config, None, &mut *self.watch)?;
        examiner.forget_current();
        let name = match self.experiment.seeds.len() {
            0 | 1 => method.name().to_string(),
            _ => format!("{}-{seed}", method.name()),
        };
        save_adapters(&examiner.subject, &self.dir.file("round-1").join(name))?;
        self.watch.begin(&format!("measure {}", method.name()), 0);
        let version = |trained| if trained { Version::Current } else { Version::Start };
        let trained = Versions { policy: version(method.trains_policy()), reward: version(method.trains_reward()) };
        let (evaluator, rows, e) = (&mut self.evaluator, &self.splits, self.experiment);
        let gate = evaluator.after(trained, &rows.gate, &[], gate_before)?;
        let test = evaluator.after(trained, &rows.test, &e.prefill, before)?;
        self.watch.end(&headline(&test));
        self.lines.outcomes(method.name(), seed, &test);
        let gates = gates(&gate, gate_before, e.sense, seed);
        let result = MethodResult {
            name: method.name().to_string(),
            seed,
            steps: outcome.steps as u64,
            tokens_policy: Some(outcome.tokens_policy),
            tokens_reward: Some(outcome.tokens_reward),
            tokens_generated: Some(outcome.tokens_generated),
            flops: Some(flops(&self.evaluator.examiner.subject, &outcome)),
            seconds: Some(outcome.seconds),
            lr: Some(e.repair.lr),
            data: kinds(method),
            accepted: Some(accepted(&gates, false)),
            gates,
            warnings: outcome.warnings.iter().chain(&test.warnings).cloned().collect(),
            measure: test.measure.clone(),
            ..MethodResult::default()
        };
        self.lines.metrics.extend(outcome.history);
        Ok((result, test))
    }
}

/// Products of the frozen bases alone: 4N a token forward and backward, 2N a token generated.
fn flops<B: Ops>(pair: &Pair<B>, outcome: &RepairOutcome) -> f64 {
    let n = |config: &ModelConfig| matrix_parameters(config) as f64;
    n(&pair.policy.transformer.config) * (4.0 * outcome.tokens_policy as f64 + 2.0 * outcome.tokens_generated as f64)
        + n(&pair.reward.transformer.config) * 4.0 * outcome.tokens_reward as f64
}

/// One line about a measured split.
fn headline(evaluation: &Evaluation) -> String {
    let percent = |rate: Option<f64>| rate.map_or("unknown".to_string(), |rate| format!("{:.1} %", 100.0 * rate));
    let m = &evaluation.measure;
    format!("CFR {} on {} harmful prompts, harmful rate {}", percent(m.cfr), m.n, percent(m.harmful_rate))
}

/// Kinds of data that a method sees.
fn kinds(method: Method) -> Vec<String> {
    let kinds: &[&str] = match method {
        Method::None => &[],
        Method::Policy => &["failures", "safe answers", "retain", "judge"],
        Method::Reward => &["failures", "safe answers", "replay", "judge"],
        Method::Rlhf => &["failures' prompts", "samples"],
        Method::Joint | Method::JointUncoupled => &["failures", "safe answers", "retain", "replay", "judge"],
    };
    kinds.iter().map(ToString::to_string).collect()
}

/// Numbers in matrices that products read: embedding left out, an untied head counted.
fn matrix_parameters(config: &ModelConfig) -> u64 {
    let product = |(name, shape): &(String, Vec<usize>)| {
        (shape.len() == 2 && !name.contains("embed_tokens")).then(|| shape.iter().product::<usize>() as u64)
    };
    promised(config).iter().filter_map(product).sum()
}
