//! The whole method on one pair: calibrate, measure, search, repair by several methods at equal steps, measure again on prompts
//! that nothing before has seen.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::attack::AttackOptions;
use super::checkpoint::Repair;
use super::data::{DataFiles, Splits};
use super::dir::RunDir;
use super::lab::{Lab, Split, trained};
use super::models::{Models, load_adapters, save_adapters};
use super::records::Search;
use super::summary::Summary;
use super::watch::Watch;
use crate::detect::evaluate::{Evaluation, relate};
use crate::detect::gates::{gates, merit};
use crate::detect::measure::{GateResult, MethodResult};
use crate::detect::observe::Versions;
use crate::error::{Error, Result};
use crate::judge::Sense;
use crate::model::Version;
use crate::ops::Ops;
use crate::probe::grammar::Grammar;
use crate::probe::lift;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::select::select_failures;
use crate::repair::{Method, Prepared, Recipe, RepairOutcome};
use crate::text::write_atomic;

/// What a sweep reached, as CSV.
pub(crate) const PARETO: &str = "pareto.csv";

/// Everything that decides an experiment's numbers; serialised, the settings that run.toml keeps.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Experiment {
    /// `demo` or `compare`.
    #[serde(skip)]
    pub(crate) command: &'static str,
    pub(crate) models: Models,
    pub(crate) data: DataFiles,
    pub(crate) grammar: PathBuf,
    #[serde(flatten)]
    pub(crate) attack: AttackOptions,
    #[serde(skip)]
    pub(crate) suite: Option<String>,
    pub(crate) methods: Vec<Method>,
    #[serde(skip)]
    pub(crate) seeds: Vec<u64>,
    pub(crate) repair: Recipe,
    /// How the probes of the search are chosen beside which the uniform one stands.
    pub(crate) sampler: SamplerKind,
    /// Queries of each search, adaptive and uniform alike.
    pub(crate) probes: usize,
    /// Repair at most N failures.
    pub(crate) failures: usize,
    pub(crate) sense: Sense,
    /// Lengths of the forced prefixes that the test measures.
    pub(crate) prefill: Vec<usize>,
    /// Prompts of the test of which samples are taken.
    pub(crate) samples: usize,
    /// Learning rates that each method is tried at, on the gate split; none: the recipe's.
    pub(crate) grid: Vec<f64>,
    /// A setting of a repair, and the values that every method is run with.
    pub(crate) sweep: Option<(String, Vec<toml::Value>)>,
    /// Steps of Dr.GRPO after each method; 0: not measured.
    pub(crate) further: usize,
    pub(crate) further_under: Under,
}

/// Under which reward model a policy is trained further.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Under {
    /// The method's own: repaired, if it repairs it.
    #[default]
    Own,
    /// The original: what a repaired policy is worth to whoever trains on under the unrepaired one.
    Original,
}

impl Experiment {
    /// Of what is done once, whatever the number of seeds.
    pub(super) fn seed(&self) -> u64 {
        self.seeds.first().copied().unwrap_or(0)
    }

    /// What is compared: every method with every value of the sweep. Fails on a setting or a value that does not exist.
    fn arms(&self) -> Result<Vec<Arm>> {
        let methods = self.methods.iter().copied().filter(|&method| method != Method::None);
        let Some((key, values)) = &self.sweep else {
            let arm = |method: Method| Arm { name: method.name().to_string(), method, recipe: self.repair.clone() };
            return Ok(methods.map(arm).collect());
        };
        let mut arms = Vec::new();
        for method in methods {
            for value in values {
                let recipe = self.repair.set(key, value).map_err(|why| Error::Usage(format!("--sweep: {why}")))?;
                arms.push(Arm { name: format!("{} {key}={value}", method.name()), method, recipe });
            }
        }
        Ok(arms)
    }
}

/// A row of the comparison.
struct Arm {
    name: String,
    method: Method,
    recipe: Recipe,
}

/// Runs everything and writes the run directory's files but the report. Ctrl-C ends it with `Error::Interrupted`; the units done
/// until then are kept, and the same run in the same directory goes on from there.
pub(crate) fn run<B: Ops>(ops: &B, experiment: &Experiment, dir: &RunDir, watch: &mut dyn Watch) -> Result<Summary> {
    let (splits, arms) = (Splits::read(&experiment.data)?, experiment.arms()?);
    splits.notes.iter().for_each(|note| watch.note(note));
    let mut lab = match Lab::open(ops, experiment, &experiment.methods, splits, experiment, dir, watch)? {
        Ok(lab) => lab,
        Err(done) => return Ok(*done),
    };
    let grammar = Grammar::read(&experiment.grammar)?;
    let mut before = lab.before()?;
    before[0].measure.best_of = lab.best_of(Versions::START, "before", experiment.seed())?;
    let (mut methods, mut adaptive, mut uniform) = (Vec::new(), Vec::new(), Vec::new());
    let all = experiment.seeds.len() * arms.len();
    lab.write(&before[0].measure, &[], &[], None, Some(format!("0 of {all} repairs are measured")))?;
    for &seed in &experiment.seeds {
        let mut sampler = Sampler::new(experiment.sampler, &grammar);
        let place = Search { seed, ..Search::default() };
        let found = lab.searches(&grammar, &mut sampler, Version::Start, &place)?;
        let records: Vec<ProbeRecord> = found.iter().flat_map(|found| &found.records).cloned().collect();
        let chosen = select_failures(&records, experiment.sense, experiment.failures, seed);
        let ready = lab.prepare(&chosen, &seed.to_string(), seed)?;
        if seed == experiment.seed() {
            before[0].measure.relapse = lab.relapse(Method::None, "before", seed, &ready.prepared)?;
        }
        let mut measured: Vec<(MethodResult, Evaluation)> = Vec::new();
        for arm in &arms {
            let steps = match arm.method {
                Method::PolicyMatched => matched(measured.iter().map(|(result, _)| result), arm.recipe.steps)?,
                _ => arm.recipe.steps,
            };
            let recipe = arm.recipe.with(seed, 1.0).lasting(steps);
            measured.push(measure_arm(&mut lab, arm, &recipe, &ready.prepared, &before)?);
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
    if experiment.sweep.is_some() {
        pareto(&dir.file(PARETO), &methods)?;
    }
    let probe = (!adaptive.is_empty()).then(|| lift(&adaptive, &uniform, experiment.seed()));
    lab.write(&before[0].measure, &methods, &[], probe, None)
}

/// A repair that was tried.
struct Trial {
    merit: f64,
    recipe: Recipe,
    outcome: RepairOutcome,
    gates: Vec<GateResult>,
    adapters: [Option<PathBuf>; 2],
}

/// One repair, at the best of the grid's learning rates by the gate split, with its measures on the test; adapters are written before
/// anything is measured.
fn measure_arm<B: Ops>(
    lab: &mut Lab<B>,
    arm: &Arm,
    recipe: &Recipe,
    prepared: &Prepared,
    [before, gate_before]: &[Evaluation; 2],
) -> Result<(MethodResult, Evaluation)> {
    let (method, seed) = (arm.method, recipe.seed);
    let several = lab.experiment.seeds.len() > 1;
    let name = if several { format!("{}-{seed}", arm.name) } else { arm.name.clone() };
    let grid = &lab.experiment.grid;
    let rates = if grid.is_empty() { vec![recipe.lr] } else { grid.clone() };
    let (mut trials, mut diverged): (Vec<Trial>, _) = (Vec::new(), None);
    for &lr in &rates {
        let recipe = recipe.at_rate(lr);
        let name = if rates.len() > 1 { format!("{name}-lr-{lr}") } else { name.clone() };
        let repair = Repair {
            name: name.clone(),
            method,
            recipe: &recipe,
            init: None,
            earlier: None,
            round: None,
            label: Some(arm.name.clone()),
        };
        let (outcome, _) = match lab.repair(prepared, &repair) {
            // A learning rate that is too high is one that is not chosen.
            Err(error @ Error::NotFinite { .. }) if rates.len() > 1 => {
                lab.watch.note(&format!("{name} is left out: {error}"));
                diverged = Some(error);
                continue;
            }
            trained => trained?,
        };
        let place = lab.dir.file("round-1").join(&name);
        save_adapters(&lab.evaluator.examiner.subject, &place)?;
        let gate = lab.measure(method, Split::Gate, &name, seed, gate_before)?;
        let gates = gates(&gate, gate_before, gate_before, lab.experiment.sense, seed);
        let adapters = ["policy", "reward"].map(|role| Some(place.join(role)).filter(|place| place.is_dir()));
        trials.push(Trial { merit: merit(&gates, &gate.measure), recipe, outcome, gates, adapters });
    }
    let Some(best) = least(&trials.iter().map(|trial| trial.merit).collect::<Vec<_>>()) else {
        return Err(diverged.unwrap_or_else(|| Error::Usage("grid: expected a learning rate, found none".into())));
    };
    let Trial { recipe, outcome, gates, adapters, .. } = trials.swap_remove(best);
    if rates.len() > 1 {
        load_adapters(&mut lab.evaluator.examiner, &adapters)?;
    }
    let mut test = lab.measure(method, Split::Test, &name, seed, before)?;
    lab.lines.outcomes(&arm.name, seed, &test)?;
    test.measure.best_of = lab.best_of(trained(method), &arm.name, seed)?;
    test.measure.relapse = lab.relapse(method, &arm.name, seed, prepared)?;
    Ok((lab.result(&arm.name, method, &recipe, outcome, gates, false, &test), test))
}

/// The place of the least; the first of equals: of an ascending grid the lowest learning rate that does as well. NaN is never the least of several.
fn least(merits: &[f64]) -> Option<usize> {
    (0..merits.len()).min_by(|&a, &b| merits[a].abs().total_cmp(&merits[b].abs()))
}

/// Steps in which the policy alone is trained on as many tokens as `joint` trained both models on.
fn matched<'a>(done: impl Iterator<Item = &'a MethodResult>, steps: usize) -> Result<usize> {
    let joint = done.into_iter().find(|result| result.name == Method::Joint.name());
    let tokens = joint.and_then(|joint| Some((joint.tokens_policy?, joint.tokens_reward?)));
    let Some((policy, reward)) = tokens.filter(|(policy, _)| *policy > 0) else {
        let what =
            "methods: policy-matched is trained on as many tokens as joint: expected joint before it, found none";
        return Err(Error::Usage(what.into()));
    };
    Ok((steps as f64 * (policy + reward) as f64 / policy as f64).round() as usize)
}

/// What each arm of a sweep reached and what it cost, as CSV; what is not known stays empty.
fn pareto(path: &Path, methods: &[MethodResult]) -> Result<()> {
    type Figure = (&'static str, fn(&MethodResult) -> Option<f64>);
    const FIGURES: [Figure; 10] = [
        ("lr", |m| m.lr),
        ("cfr", |m| m.measure.cfr),
        ("harmful", |m| m.measure.harmful_rate),
        ("harmful_truth", |m| m.measure.harmful_truth.rate),
        ("best_of_8", |m| m.measure.best_of.harmful),
        ("relapse", |m| m.measure.relapse.harmful),
        ("reward_error", |m| m.measure.reward_error),
        ("unserved", |m| m.measure.unserved.rate.or(m.measure.over_refusal)),
        ("drift", |m| m.measure.reward_drift),
        ("flops", |m| m.flops),
    ];
    let mut text = format!("arm,seed,{}\n", FIGURES.map(|(name, _)| name).join(","));
    for method in methods {
        let figures = FIGURES.map(|(_, of)| of(method).map_or(String::new(), |value| value.to_string()));
        text.push_str(&format!("{},{},{}\n", method.name, method.seed, figures.join(",")));
    }
    write_atomic(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::least;

    #[test]
    fn the_lowest_rate_that_does_as_well_is_chosen() {
        for (merits, best) in
            [(&[1.0, 0.5, 0.5][..], Some(1)), (&[f64::NAN, 2.0], Some(1)), (&[0.0], Some(0)), (&[], None)]
        {
            assert_eq!(least(merits), best, "{merits:?}");
        }
    }
}
