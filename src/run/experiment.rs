//! The whole method on one pair: calibrate, measure, search, repair by several methods at equal steps, measure again on prompts
//! that nothing before has seen.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::data::{DataFiles, Splits};
use super::dir::RunDir;
use super::manifest::{self, Manifest};
use super::models::{self, Models, OpenModels};
use super::probe::{self, hunt};
use super::records::{Lines, failure, metric};
use super::summary;
use super::watch::Watch;
use crate::detect::evaluate::{Changed, Evaluation, Evaluator, benchmark_id, relate};
use crate::detect::gates::{Limits, accepted, gates};
use crate::detect::measure::{MethodResult, ProbeResult, Summary};
use crate::error::{Error, Result};
use crate::judge::{Judges, Sense};
use crate::model::checkpoint::promised;
use crate::model::{ModelConfig, Pair, Version};
use crate::ops::Ops;
use crate::probe::SearchSummary;
use crate::probe::grammar::Grammar;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::search::{self, Found, World};
use crate::probe::select::select_failures;
use crate::repair::{Method, Prepared, RepairConfig, RepairData, RepairOutcome, Trainer, admit};

/// Everything that decides an experiment's numbers.
#[derive(Debug, Clone)]
pub(crate) struct Experiment {
    /// `demo` or `compare`: what run.toml says.
    pub(crate) command: String,
    pub(crate) models: Models,
    pub(crate) data: DataFiles,
    pub(crate) grammar: PathBuf,
    pub(crate) suite: Option<String>,
    pub(crate) methods: Vec<Method>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) repair: RepairConfig,
    /// Queries of each search, adaptive and uniform alike.
    pub(crate) probes: usize,
    /// Repair at most N failures.
    pub(crate) failures: usize,
    pub(crate) sense: Sense,
    /// Lengths of the forced prefixes that the test measures.
    pub(crate) prefill: Vec<usize>,
}

/// The settings as run.toml keeps them.
#[derive(Serialize)]
struct Receipt<'a> {
    methods: Vec<&'static str>,
    probes: usize,
    failures: usize,
    sense: Sense,
    prefill: &'a [usize],
    models: models::Receipt,
    repair: &'a RepairConfig,
}

/// An experiment at work.
struct Lab<'a, B: Ops> {
    experiment: &'a Experiment,
    dir: &'a RunDir,
    watch: &'a mut dyn Watch,
    pair: Pair<B>,
    judges: Judges,
    splits: Splits,
    evaluator: Evaluator,
    grammar: Grammar,
}

/// What was measured before any repair.
struct Before {
    test: Evaluation,
    gate: Evaluation,
}

/// Runs everything and writes the run directory's files but the report. Ctrl-C ends it with `Error::Interrupted` after the batch
/// in progress; what was finished stays.
pub(crate) fn run<B: Ops>(ops: &B, experiment: &Experiment, dir: &RunDir, watch: &mut dyn Watch) -> Result<Summary> {
    let splits = Splits::read(&experiment.data)?;
    write_receipt(ops, experiment, dir)?;
    let mut lab = Lab::open(ops, experiment, dir, watch, splits)?;
    let before = lab.before()?;
    let (mut methods, mut searches) = (Vec::new(), Vec::new());
    let mut lines = Lines::default();
    lines.outcomes("before", 0, &before.test);
    for &seed in &experiment.seeds {
        let found = lab.search(seed, &mut lines)?;
        let prepared = lab.prepare(&found, seed, &mut lines)?;
        let mut policy: Option<Evaluation> = None;
        for &method in experiment.methods.iter().filter(|&&m| m != Method::None) {
            let (mut result, evaluation) = lab.method(method, seed, &prepared, &before, &mut lines)?;
            if method == Method::Policy {
                policy = Some(evaluation.clone());
            }
            relate(&mut result, &evaluation, &before.test, policy.as_ref(), experiment.sense, seed);
            methods.push(result);
        }
        searches.push(found);
    }
    lab.relate_to_policy(&mut methods);
    let probe = lab.probe_result(&searches);
    let summary = lab.summary(ops, before.test, methods, probe);
    lines.write(dir)?;
    summary::write(&dir.file(summary::NAME), &summary)?;
    Ok(summary)
}

fn write_receipt<B: Ops>(ops: &B, e: &Experiment, dir: &RunDir) -> Result<()> {
    let receipt = Receipt {
        methods: e.methods.iter().map(|m| m.name()).collect(),
        probes: e.probes,
        failures: e.failures,
        sense: e.sense,
        prefill: &e.prefill,
        models: e.models.receipt(),
        repair: &e.repair,
    };
    let mut manifest = Manifest::new(&e.command, &ops.describe(), &e.seeds, &receipt)?;
    for (_, path) in e.data.all() {
        manifest.add_input(path)?;
    }
    manifest.add_input(&e.grammar)?;
    e.models.add_inputs(&mut manifest)?;
    manifest.write(&dir.file(manifest::NAME))
}

impl<'a, B: Ops> Lab<'a, B> {
    fn open(
        ops: &B,
        experiment: &'a Experiment,
        dir: &'a RunDir,
        watch: &'a mut dyn Watch,
        splits: Splits,
    ) -> Result<Self> {
        let e = experiment;
        let seed = e.seeds.first().copied().unwrap_or(0);
        let OpenModels { pair, judges, evaluator } =
            OpenModels::open(ops, &e.models, splits.calibration.clone(), seed, watch)?;
        let grammar = Grammar::read(&e.grammar)?;
        Ok(Lab { experiment, dir, watch, pair, judges, splits, evaluator, grammar })
    }

    fn before(&mut self) -> Result<Before> {
        self.watch.begin("measure the originals", 0);
        let (pair, judges, rows) = (&mut self.pair, &mut self.judges, &self.splits);
        let test = self.evaluator.before(pair, judges, &rows.test, &self.experiment.prefill)?;
        let gate = self.evaluator.before(pair, judges, &rows.gate, &[])?;
        self.watch.end(&headline(&test));
        Ok(Before { test, gate })
    }

    /// Adaptive and uniform, at equal queries.
    fn search(&mut self, seed: u64, lines: &mut Lines) -> Result<[Found; 2]> {
        let adaptive = self.search_with(SamplerKind::default(), seed, Version::Start)?;
        let uniform = self.search_with(SamplerKind::Uniform, seed, Version::Start)?;
        lines.probes(&adaptive.records, seed, false, false);
        lines.probes(&uniform.records, seed, true, false);
        Ok([adaptive, uniform])
    }

    fn search_with(&mut self, kind: SamplerKind, seed: u64, version: Version) -> Result<Found> {
        let e = self.experiment;
        let again = if version == Version::Current { ", after the repair" } else { "" };
        let settings = search::SearchSettings {
            sense: e.sense,
            version,
            ..search::SearchSettings::new(e.probes, seed, e.models.max_new_tokens)
        };
        let mut world = World {
            grammar: &self.grammar,
            thresholds: &self.evaluator.thresholds(),
            plausible: &self.splits.plausible,
            subject: &mut self.pair,
            judge: &mut *self.judges.judge,
        };
        let mut sampler = Sampler::new(kind, &self.grammar);
        let found = hunt(&mut world, &settings, &mut sampler, &format!("{}{again}", kind.name()), &mut *self.watch)?;
        if found.interrupted {
            return Err(Error::Interrupted(String::new()));
        }
        Ok(found)
    }

    /// Chooses the failures to repair from both searches (the adaptive one looks for coupled failures and sees little of the rest),
    /// lets the judge admit them, and asks the originals what training needs to know of them.
    fn prepare(&mut self, found: &[Found; 2], seed: u64, lines: &mut Lines) -> Result<Prepared> {
        let e = self.experiment;
        self.watch.begin("prepare the repair data", 0);
        let thresholds = self.evaluator.thresholds();
        let records: Vec<ProbeRecord> = found.iter().flat_map(|found| &found.records).cloned().collect();
        let chosen = select_failures(&records, e.sense, e.failures, seed);
        let mut data = RepairData {
            failures: chosen.iter().filter_map(|record| failure(record, e.sense, &thresholds)).collect(),
            retain: self.splits.retain.clone(),
            replay: self.splits.replay.clone(),
        };
        let decoding = self.evaluator.settings().decoding.clone();
        let left_out = admit(&mut data, &mut self.pair, &mut *self.judges.judge, &thresholds, &decoding)?;
        lines.failures(&data.failures, seed);
        let prepared = Prepared::new(&mut self.pair, &mut *self.judges.judge, &data, &thresholds)?;
        self.watch.end(&format!(
            "{} failures, {} answers to retain, {} validated pairs; {} left out",
            prepared.failures.len(),
            prepared.retain.len(),
            prepared.replay.len(),
            left_out.len() + prepared.dropped.len()
        ));
        Ok(prepared)
    }

    /// One repair with its measures; the adapters are written before anything is measured.
    fn method(
        &mut self,
        method: Method,
        seed: u64,
        prepared: &Prepared,
        before: &Before,
        lines: &mut Lines,
    ) -> Result<(MethodResult, Evaluation)> {
        let outcome = self.train(method, seed, prepared, lines)?;
        self.save(method, seed)?;
        self.watch.begin(&format!("measure {}", method.name()), 0);
        let changed = Changed { policy: method.trains_policy(), reward: method.trains_reward() };
        let (pair, judges, rows, e) = (&mut self.pair, &mut self.judges, &self.splits, self.experiment);
        let mut adapted = self.evaluator.adapted(changed);
        let gate = adapted.measure(pair, judges, &rows.gate, &[], &before.gate)?;
        let test = adapted.measure(pair, judges, &rows.test, &e.prefill, &before.test)?;
        self.watch.end(&headline(&test));
        lines.outcomes(method.name(), seed, &test);
        let gates = gates(&gate, &before.gate, e.sense, seed, &Limits::default());
        let result = MethodResult {
            name: method.name().to_string(),
            seed,
            steps: outcome.steps as u64,
            tokens_policy: Some(outcome.tokens_policy),
            tokens_reward: Some(outcome.tokens_reward),
            tokens_generated: Some(outcome.tokens_generated),
            flops: Some(self.flops(&outcome)),
            seconds: Some(outcome.seconds),
            lr: Some(e.repair.lr),
            data: kinds(method),
            accepted: Some(accepted(&gates, false)),
            gates,
            warnings: outcome.warnings.iter().chain(&test.warnings).cloned().collect(),
            measure: test.measure.clone(),
            ..MethodResult::default()
        };
        Ok((result, test))
    }

    fn train(&mut self, method: Method, seed: u64, prepared: &Prepared, lines: &mut Lines) -> Result<RepairOutcome> {
        let config = RepairConfig { seed, ..self.experiment.repair.clone() };
        self.watch.begin(&format!("repair by {}", method.name()), config.steps);
        let thresholds = self.evaluator.thresholds();
        let decoding = self.evaluator.settings().decoding.clone();
        let judge = &mut *self.judges.judge;
        let trainer = Trainer::new(&mut self.pair, judge, prepared, method, &config, thresholds, &decoding)?;
        let watch = &mut *self.watch;
        let outcome = trainer.run(|metrics| {
            super::interrupt::check("")?;
            watch.at(metrics.step + 1, &format!("loss {:.3}", metrics.loss));
            lines.metrics.push(metric(method, seed, metrics));
            Ok(())
        })?;
        let tokens = outcome.tokens_policy + outcome.tokens_reward;
        self.watch.end(&format!("{} steps in {:.1} s, {} k tokens", outcome.steps, outcome.seconds, tokens / 1000));
        Ok(outcome)
    }

    /// Writes the adapters of what was trained.
    fn save(&self, method: Method, seed: u64) -> Result<()> {
        let name = if self.experiment.seeds.len() > 1 {
            format!("{}-{seed}", method.name())
        } else {
            method.name().to_string()
        };
        for (role, model) in [("policy", &self.pair.policy), ("reward", &self.pair.reward)] {
            if let Some(adapter) = &model.adapter {
                let mut file = adapter.to_file(&model.transformer.ops, &model.transformer.config)?;
                file.base_model_name = Some(model.dir.display().to_string());
                file.save(&self.dir.file("round-1").join(&name).join(role))?;
            }
        }
        Ok(())
    }

    /// Products of the frozen bases alone: 4N a token forward and backward, 2N a token generated.
    fn flops(&self, outcome: &RepairOutcome) -> f64 {
        let n = |config: &ModelConfig| matrix_parameters(config) as f64;
        let (policy, reward) = (&self.pair.policy.transformer.config, &self.pair.reward.transformer.config);
        n(policy) * (4.0 * outcome.tokens_policy as f64 + 2.0 * outcome.tokens_generated as f64)
            + n(reward) * 4.0 * outcome.tokens_reward as f64
    }

    /// `policy` may have been run after others: relates those that came before it.
    fn relate_to_policy(&self, methods: &mut [MethodResult]) {
        let cfr = |m: &MethodResult| m.measure.cfr;
        let base: BTreeMap<u64, Option<f64>> =
            methods.iter().filter(|m| m.name == Method::Policy.name()).map(|m| (m.seed, cfr(m))).collect();
        for method in methods.iter_mut().filter(|m| m.reduction_vs_policy.is_none()) {
            let known = base.get(&method.seed).copied().flatten().filter(|&base| base > 0.0);
            method.reduction_vs_policy = known.zip(cfr(method)).map(|(base, own)| 1.0 - own / base);
        }
    }

    fn probe_result(&self, searches: &[[Found; 2]]) -> Option<ProbeResult> {
        let of = |i: usize| searches.iter().map(|s| s[i].summary.clone()).collect::<Vec<SearchSummary>>();
        let (adaptive, uniform) = (of(0), of(1));
        let seed = self.experiment.seeds.first().copied().unwrap_or(0);
        (!adaptive.is_empty()).then(|| probe::result(&adaptive, &uniform, seed))
    }

    fn summary(&self, ops: &B, before: Evaluation, methods: Vec<MethodResult>, probe: Option<ProbeResult>) -> Summary {
        let e = self.experiment;
        let decoding = self.evaluator.settings().decoding.clone();
        Summary {
            schema: 1,
            version: env!("CARGO_PKG_VERSION").to_string(),
            benchmark_id: benchmark_id(&self.splits.test, self.judges.judge.name(), e.models.tau_h, &decoding),
            device: ops.describe(),
            seeds: e.seeds.clone(),
            suite: e.suite.clone(),
            thresholds: self.evaluator.thresholds(),
            decoding,
            splits: self.splits.info.clone(),
            before: before.measure,
            methods,
            probe,
        }
    }
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
