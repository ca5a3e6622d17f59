//! The whole method on one pair: calibrate, measure, search, repair by several methods at equal steps, measure again on prompts
//! that nothing before has seen.

use std::path::PathBuf;

use serde::Serialize;

use super::checkpoint::Repair;
use super::data::{DataFiles, Splits};
use super::dir::RunDir;
use super::lab::{Lab, Split};
use super::models::{Models, save_adapters};
use super::records::Search;
use super::summary::Summary;
use super::watch::Watch;
use crate::detect::evaluate::{Evaluation, relate};
use crate::detect::gates::gates;
use crate::detect::measure::MethodResult;
use crate::error::Result;
use crate::judge::Sense;
use crate::model::Version;
use crate::ops::Ops;
use crate::probe::grammar::Grammar;
use crate::probe::lift;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::select::select_failures;
use crate::repair::{Method, Prepared, Recipe};

/// Everything that decides an experiment's numbers; serialised, the settings that run.toml keeps.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Experiment {
    /// `demo` or `compare`.
    #[serde(skip)]
    pub(crate) command: &'static str,
    pub(crate) models: Models,
    pub(crate) data: DataFiles,
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

impl Experiment {
    /// Of what is done once, whatever the number of seeds.
    pub(super) fn seed(&self) -> u64 {
        self.seeds.first().copied().unwrap_or(0)
    }
}

/// Runs everything and writes the run directory's files but the report. Ctrl-C ends it with `Error::Interrupted`; the units done
/// until then are kept, and the same run in the same directory goes on from there.
pub(crate) fn run<B: Ops>(ops: &B, experiment: &Experiment, dir: &RunDir, watch: &mut dyn Watch) -> Result<Summary> {
    let splits = Splits::read(&experiment.data)?;
    let mut lab = match Lab::open(ops, experiment, splits, experiment, dir, watch)? {
        Ok(lab) => lab,
        Err(done) => return Ok(*done),
    };
    let grammar = Grammar::read(&experiment.grammar)?;
    let before = lab.before()?;
    let trained: Vec<Method> = experiment.methods.iter().copied().filter(|&method| method != Method::None).collect();
    let (mut methods, mut adaptive, mut uniform) = (Vec::new(), Vec::new(), Vec::new());
    let all = experiment.seeds.len() * trained.len();
    lab.write(&before[0].measure, &[], &[], None, Some(format!("0 of {all} repairs are measured")))?;
    for &seed in &experiment.seeds {
        let mut sampler = Sampler::new(SamplerKind::default(), &grammar);
        let place = Search { seed, ..Search::default() };
        let found = lab.searches(&grammar, &mut sampler, Version::Start, &place)?;
        let records: Vec<ProbeRecord> = found.iter().flat_map(|found| &found.records).cloned().collect();
        let chosen = select_failures(&records, experiment.sense, experiment.failures, seed);
        let ready = lab.prepare(&chosen, &seed.to_string(), seed)?;
        let mut measured = Vec::new();
        for &method in &trained {
            measured.push(method_of(&mut lab, method, seed, &ready.prepared, &before)?);
            let so_far = methods.iter().chain(measured.iter().map(|(result, _)| result));
            let so_far: Vec<MethodResult> = so_far.cloned().collect();
            let unfinished = format!("{} of {all} repairs are measured", so_far.len());
            lab.write(&before[0].measure, &so_far, &[], None, Some(unfinished))?;
        }
        methods.extend(relate(measured, &before[0], experiment.sense, seed));
        let [found, control] = found;
        adaptive.push(found.summary);
        uniform.push(control.summary);
    }
    let probe = (!adaptive.is_empty()).then(|| lift(&adaptive, &uniform, experiment.seed()));
    lab.write(&before[0].measure, &methods, &[], probe, None)
}

/// One repair with its measures; the adapters are written before anything is measured.
fn method_of<B: Ops>(
    lab: &mut Lab<B>,
    method: Method,
    seed: u64,
    prepared: &Prepared,
    [before, gate_before]: &[Evaluation; 2],
) -> Result<(MethodResult, Evaluation)> {
    let (recipe, sense) = (lab.experiment.repair.with(seed, 1.0), lab.experiment.sense);
    let name = match lab.experiment.seeds.len() {
        0 | 1 => method.name().to_string(),
        _ => format!("{}-{seed}", method.name()),
    };
    let repair = Repair { name: name.clone(), method, recipe: &recipe, init: None, earlier: None, round: None };
    let (outcome, _) = lab.repair(prepared, &repair)?;
    save_adapters(&lab.evaluator.examiner.subject, &lab.dir.file("round-1").join(name))?;
    let gate = lab.measure(method, Split::Gate, method.name(), seed, gate_before)?;
    let test = lab.measure(method, Split::Test, method.name(), seed, before)?;
    lab.lines.outcomes(method.name(), seed, &test)?;
    let gates = gates(&gate, gate_before, gate_before, sense, seed);
    Ok((lab.result(method.name(), method, &recipe, outcome, gates, &test), test))
}
