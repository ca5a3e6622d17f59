//! The stages that the loop and the comparison are made of: calibrate, measure, search, prepare, repair. Each keeps what it gave in
//! the run's journal.

use std::path::PathBuf;

use super::checkpoint::{self, Repair};
use super::data::Splits;
use super::dir::RunDir;
use super::experiment::{Experiment, Under};
use super::manifest::Manifest;
use super::probe::hunt;
use super::records::{Lines, Search};
use super::repair::{self, Ready, at_work};
use super::summary::{self, Round, Summary};
use super::watch::Watch;
use crate::detect::evaluate::{Evaluation, benchmark_id};
use crate::detect::gates::accept;
use crate::detect::measure::{BestOf, GateResult, Measure, MethodResult, Relapse};
use crate::detect::observe::Versions;
use crate::detect::{Evaluator, Examiner};
use crate::error::{Error, Result};
use crate::model::checkpoint::promised;
use crate::model::{AdapterInit, ModelConfig, Pair, Version};
use crate::ops::Ops;
use crate::probe::ProbeResult;
use crate::probe::grammar::Grammar;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::search::{Found, SearchSettings};
use crate::repair::room::rehearse;
use crate::repair::{Method, Prepared, Recipe, RepairData, RepairOutcome};

/// An experiment at work.
pub(super) struct Lab<'a, B: Ops> {
    pub(super) experiment: &'a Experiment,
    pub(super) dir: &'a RunDir,
    pub(super) watch: &'a mut dyn Watch,
    pub(super) evaluator: Evaluator<Pair<B>>,
    pub(super) splits: Splits,
    pub(super) lines: Lines,
    device: String,
    /// A hash of every file that the originals and the judges are read from.
    models: String,
}

/// Added to the seed of a second uniform search: more than the seeds of one run lie apart.
const SECOND: u64 = 1 << 32;

/// What is measured on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    Gate,
    Test,
}

impl<'a, B: Ops> Lab<'a, B> {
    /// Writes the receipt, opens and calibrates the models, and sees that there is room to train them by these methods. The result itself
    /// where the run is finished already.
    pub(super) fn open(
        ops: &B,
        experiment: &'a Experiment,
        methods: &[Method],
        splits: Splits,
        settings: &impl serde::Serialize,
        dir: &'a RunDir,
        watch: &'a mut dyn Watch,
    ) -> Result<Result<Lab<'a, B>, Box<Summary>>> {
        if experiment.models.truth.is_some() && !splits.gate.iter().chain(&splits.test).any(|row| !row.steps.is_empty())
        {
            let (expected, found) = ("rows with `steps` in the gate and the test split".into(), "none".into());
            let remedy = "give them, or leave --truth out: without them it knows nothing".into();
            return Err(Error::Data { what: "ground truth".into(), expected, found, remedy });
        }
        let manifest = Manifest::new(experiment.command, &ops.describe(), &experiment.seeds, settings)?;
        let files = experiment.data.paths().into_iter().chain([&experiment.grammar]).map(PathBuf::as_path);
        let files = files.chain(experiment.attack.places());
        let (device, models) = experiment.models.write_receipt(manifest, files, dir)?;
        let path = dir.file(summary::NAME);
        if dir.resumed && path.is_file() {
            let done = summary::read(&path)?;
            if done.unfinished.is_none() {
                return Ok(Err(Box::new(done)));
            }
        }
        let (calibration, seed) = (splits.calibration.clone(), experiment.seed());
        let attack = experiment.attack.open(ops, &experiment.models)?;
        let mut evaluator = experiment.models.calibrated(ops, calibration, seed, dir, watch)?;
        rehearse(&evaluator.examiner.subject, methods, &experiment.repair)?;
        evaluator.examiner.attack = attack;
        Ok(Ok(Lab { experiment, dir, watch, evaluator, splits, lines: Lines::new(dir), device, models }))
    }

    /// What test and gate say before any repair.
    pub(super) fn before(&mut self) -> Result<[Evaluation; 2]> {
        self.watch.begin("measure the originals", 0);
        self.evaluator.examiner.journal.stage("before");
        let test = self.evaluator.before(&self.splits.test, &self.experiment.prefill)?;
        let gate = self.evaluator.before(&self.splits.gate, &[])?;
        self.watch.end(&headline(&test));
        self.lines.outcomes("before", 0, &test)?;
        Ok([test, gate])
    }

    /// Searches the originals or the models as they are now.
    pub(super) fn search(
        &mut self,
        grammar: &Grammar,
        sampler: &mut Sampler,
        version: Version,
        budget: usize,
        place: &Search,
    ) -> Result<Found> {
        let e = self.experiment;
        let settings = SearchSettings {
            sense: e.sense,
            version,
            ..SearchSettings::new(budget, place.seed, e.models.max_new_tokens)
        };
        let (plausible, evaluator, lines) = (&self.splits.plausible, &mut self.evaluator, &mut self.lines);
        hunt(evaluator, grammar, plausible, &settings, sampler, place, lines, &mut *self.watch)
    }

    /// Two searches of the same budget: the adaptive one looks for coupled failures and sees little of the rest, and the other is
    /// uniform. By the uniform sampler both are, with other draws.
    pub(super) fn searches(
        &mut self,
        grammar: &Grammar,
        sampler: &mut Sampler,
        version: Version,
        place: &Search,
    ) -> Result<[Found; 2]> {
        let budget = self.experiment.probes;
        let mut uniform = Sampler::new(SamplerKind::Uniform, grammar);
        let twice = sampler.kind == SamplerKind::Uniform;
        let control = Search { uniform: true, seed: place.seed + if twice { SECOND } else { 0 }, ..place.clone() };
        Ok([
            self.search(grammar, sampler, version, budget, &Search { uniform: twice, ..place.clone() })?,
            self.search(grammar, &mut uniform, version, budget, &control)?,
        ])
    }

    /// Lets the judge admit the chosen failures, and asks the originals what training needs to know of them.
    pub(super) fn prepare(&mut self, chosen: &[&ProbeRecord], name: &str, seed: u64) -> Result<Ready> {
        let (sense, thresholds) = (self.experiment.sense, self.evaluator.thresholds);
        let data = RepairData {
            failures: chosen.iter().filter_map(|record| record.failure(sense, thresholds.tau_h)).collect(),
            retain: self.splits.retain.clone(),
            replay: self.splits.replay.clone(),
        };
        let ready = repair::prepare(&mut self.evaluator.examiner, thresholds, name, data, &mut *self.watch)?;
        self.lines.failures(&ready.failures, seed)?;
        Ok(ready)
    }

    /// One repair; returns also the file from which a later one may go on.
    pub(super) fn repair(&mut self, prepared: &Prepared, repair: &Repair) -> Result<(RepairOutcome, PathBuf)> {
        let examiner = &mut self.evaluator.examiner;
        let (setting, journal) = at_work(examiner, self.evaluator.thresholds);
        let done = checkpoint::train(setting, journal, prepared, repair, self.dir, &mut self.lines, &mut *self.watch)?;
        examiner.forget_current();
        Ok(done)
    }

    /// What a repair by `method` made of the models; `name` is what its lines and units are called.
    pub(super) fn measure(
        &mut self,
        method: Method,
        split: Split,
        name: &str,
        seed: u64,
        before: &Evaluation,
    ) -> Result<Evaluation> {
        self.watch.begin(&format!("measure {name}"), 0);
        self.evaluator.examiner.journal.stage(&format!("measure {name} {seed} {split:?}"));
        let (rows, prefill): (_, &[usize]) = match split {
            Split::Gate => (&self.splits.gate, &[]),
            Split::Test => (&self.splits.test, &self.experiment.prefill),
        };
        let found = self.evaluator.after(trained(method), rows, prefill, before)?;
        self.watch.end(&headline(&found));
        Ok(found)
    }

    /// What the reward model of `versions` picks among samples of the policy, on some prompts of the test.
    pub(super) fn best_of(&mut self, versions: Versions, name: &str, seed: u64) -> Result<BestOf> {
        let prompts = self.experiment.samples;
        if prompts == 0 {
            return Ok(BestOf::default());
        }
        self.watch.begin(&format!("best of eight, {name}"), 0);
        self.evaluator.examiner.journal.stage(&format!("best of eight {name} {seed}"));
        let (found, sampled) = self.evaluator.best_of(versions, &self.splits.test, prompts)?;
        self.lines.samples(name, seed, "best of 8", &sampled)?;
        let [picked, samples] = [found.harmful, found.harmful_samples].map(percent);
        self.watch.end(&format!("{picked} of the picks are harmful, {samples} of the samples; {} prompts", found.n));
        Ok(found)
    }

    /// What further Dr.GRPO makes of the policy that `method` has just left, under the method's own reward model or the original: harm on
    /// the same prompts as [`Lab::best_of`]. The adapters are no longer the method's afterwards.
    pub(super) fn relapse(&mut self, method: Method, name: &str, seed: u64, prepared: &Prepared) -> Result<Relapse> {
        let (steps, prompts) = (self.experiment.further, self.experiment.samples);
        if steps == 0 || prompts == 0 || prepared.failures.is_empty() {
            return Ok(Relapse::default());
        }
        let recipe = self.experiment.repair.with(seed, 1.0).lasting(steps);
        let init = (method != Method::None).then_some(AdapterInit::Zero { seed });
        let mut versions = Versions { policy: Version::Current, ..trained(method) };
        if self.experiment.further_under == Under::Original {
            self.evaluator.examiner.subject.reward.adapter = None;
            versions.reward = Version::Start;
        }
        let unit = format!("{name}-{seed}-further");
        let label = Some(format!("{name}{}", summary::FURTHER));
        let (earlier, round) = (None, None);
        let repair = Repair { name: unit.clone(), method: Method::Rlhf, recipe: &recipe, init, earlier, round, label };
        self.repair(prepared, &repair)?;
        self.watch.begin(&format!("measure {name}, trained further"), 0);
        self.evaluator.examiner.journal.stage(&format!("measure {unit}"));
        let (found, mut sampled) = self.evaluator.best_of(versions, &self.splits.test, prompts)?;
        let harmful = self.evaluator.greedy_harm(versions, &self.splits.test, prompts, &mut sampled)?;
        self.lines.samples(name, seed, "relapse", &sampled)?;
        self.watch.end(&format!("harmful {}, of samples {}", percent(harmful), percent(found.harmful_samples)));
        Ok(Relapse { steps: steps as u64, n: found.n, harmful, harmful_samples: found.harmful_samples })
    }

    /// A row of the table.
    pub(super) fn result(
        &self,
        name: &str,
        method: Method,
        recipe: &Recipe,
        outcome: RepairOutcome,
        gates: Vec<GateResult>,
        allow_undecided: bool,
        measured: &Evaluation,
    ) -> MethodResult {
        let mut result = MethodResult {
            name: name.to_string(),
            seed: recipe.seed,
            steps: outcome.steps.min(recipe.steps) as u64,
            tokens_policy: Some(outcome.tokens_policy),
            tokens_reward: Some(outcome.tokens_reward),
            tokens_generated: Some(outcome.tokens_generated),
            flops: Some(flops(&self.evaluator.examiner.subject, &outcome)),
            seconds: Some(outcome.seconds),
            lr: Some(recipe.lr),
            data: kinds(method),
            warnings: outcome.warnings.into_iter().chain(measured.warnings.clone()).collect(),
            measure: measured.measure.clone(),
            ..MethodResult::default()
        };
        accept(&mut result, method, gates, allow_undecided);
        result
    }

    /// Writes the result as far as it is known; `unfinished` says what is missing.
    pub(super) fn write(
        &self,
        before: &Measure,
        methods: &[MethodResult],
        rounds: &[Round],
        probe: Option<ProbeResult>,
        unfinished: Option<String>,
    ) -> Result<Summary> {
        let Examiner { decoding, tau_h, .. } = &self.evaluator.examiner;
        let summary = Summary {
            schema: summary::SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_string(),
            benchmark_id: benchmark_id(&self.splits.test, &self.models, *tau_h, decoding),
            device: self.device.clone(),
            seeds: self.experiment.seeds.clone(),
            suite: self.experiment.suite.clone(),
            thresholds: self.evaluator.thresholds,
            decoding: decoding.clone(),
            splits: self.splits.info.clone(),
            before: before.clone(),
            methods: methods.to_vec(),
            probe,
            rounds: rounds.to_vec(),
            unfinished,
        };
        summary::write(&self.dir.file(summary::NAME), &summary)?;
        if summary.unfinished.is_none() {
            self.dir.drop_checkpoints();
        }
        Ok(summary)
    }
}

/// Products of the frozen bases alone: 4N a token forward and backward, 2N a token generated.
fn flops<B: Ops>(pair: &Pair<B>, outcome: &RepairOutcome) -> f64 {
    let n = |config: &ModelConfig| matrix_parameters(config) as f64;
    n(&pair.policy.transformer.config) * (4.0 * outcome.tokens_policy as f64 + 2.0 * outcome.tokens_generated as f64)
        + n(&pair.reward.transformer.config) * 4.0 * outcome.tokens_reward as f64
}

/// Which models a method leaves other than they were.
pub(super) fn trained(method: Method) -> Versions {
    let version = |trained| if trained { Version::Current } else { Version::Start };
    Versions { policy: version(method.trains_policy()), reward: version(method.trains_reward()) }
}

fn percent(rate: Option<f64>) -> String {
    rate.map_or("unknown".to_string(), |rate| format!("{:.1} %", 100.0 * rate))
}

/// One line about a measured split.
fn headline(evaluation: &Evaluation) -> String {
    let m = &evaluation.measure;
    let cuts = m.truncated.warning_of_cuts().map_or_else(String::new, |cuts| format!("; {cuts}"));
    format!("CFR {} on {} harmful prompts, harmful rate {}{cuts}", percent(m.cfr), m.n, percent(m.harmful_rate))
}

/// Kinds of data that a method sees.
fn kinds(method: Method) -> Vec<String> {
    let kinds: &[&str] = match method {
        Method::None => &[],
        Method::Sham => &["retain", "replay"],
        Method::Sft => &["safe answers", "retain", "judge"],
        Method::Policy | Method::PolicyMatched | Method::Dpo => &["failures", "safe answers", "retain", "judge"],
        Method::Reward => &["failures", "safe answers", "replay", "judge"],
        Method::Rlhf => &["failures' prompts", "calm prompts", "samples"],
        Method::Sequential => &["failures", "safe answers", "replay", "calm prompts", "samples", "judge"],
        Method::Joint | Method::JointUncoupled | Method::JointShuffled | Method::Alternating => {
            &["failures", "safe answers", "retain", "replay", "judge"]
        }
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
