//! `ares probe`: search for prompts on which policy and reward model fail together.

use std::path::PathBuf;

use serde::Serialize;

use super::args;
use super::data;
use super::dir::RunDir;
use super::interrupt;
use super::manifest::Manifest;
use super::models::Models;
use super::records::Lines;
use super::watch::Watch;
use crate::detect::measure::ProbeResult;
use crate::error::{Error, Result};
use crate::judge::Sense;
use crate::ops::Ops;
use crate::probe::search::{Found, SearchSettings, World, search};
use crate::probe::{Fitness, Grammar, Sampler, SamplerKind, SamplerWeights, SearchSummary, lift};
use crate::text::{Row, write_atomic};

// What `ares probe` was asked for; serialised, the settings that run.toml keeps. As a doc comment this would take the place of the
// command's own help.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct ProbeOptions {
    #[command(flatten)]
    pub(crate) models: Models,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long = "approve", value_enum, default_value = "threshold", help_heading = "Verdicts")]
    pub(crate) sense: Sense,
    /// Validated pairs that fix the reward threshold
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) calibration: PathBuf,
    /// Grammar that probes are composed from
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) grammar: PathBuf,
    /// Prompts as people write them: they only set how likely a probe must be [default: compositions of the grammar]
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) plausible: Option<PathBuf>,
    /// Ask the policy for N answers
    #[arg(long, value_name = "N", default_value = "1000", value_parser = args::whole::<usize>(0, 10_000_000))]
    pub(crate) queries: usize,
    /// How the next probe is chosen
    #[arg(long, value_enum, default_value = "thompson")]
    pub(crate) sampler: SamplerKind,
    /// What makes a probe good
    #[arg(long, value_enum, default_value = "product")]
    pub(crate) fitness: Fitness,
    /// Make as many uniform queries too, and print the lift over them
    #[arg(long)]
    pub(crate) uniform: bool,
    /// Begin with what an earlier search learned: its weights.json
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) weights: Option<PathBuf>,
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) seed: u64,
}

/// Searches and writes `probes.jsonl`, `failures.jsonl` and, of the adaptive sampler, `weights.json`. After Ctrl-C the probes
/// made so far are written, then it ends with `Error::Interrupted`.
pub(crate) fn probe<B: Ops>(
    ops: &B,
    options: &ProbeOptions,
    dir: &RunDir,
    watch: &mut dyn Watch,
) -> Result<ProbeResult> {
    let grammar = Grammar::read(&options.grammar)?;
    let plausible = match &options.plausible {
        Some(path) => data::read_as(path, |row| row.prompt(false))?,
        None => Vec::new(),
    };
    let calibration = data::read_as(&options.calibration, Row::pair)?;
    let mut sampler = Sampler::new(options.sampler, &grammar);
    if let Some(path) = &options.weights {
        sampler.carry_over(&grammar, &SamplerWeights::read(path)?, path)?;
    }
    let manifest = Manifest::new("probe", &ops.describe(), &[options.seed], options)?;
    let files = [&options.calibration, &options.grammar].into_iter().chain(&options.plausible).chain(&options.weights);
    options.models.write_receipt(manifest, files, dir)?;
    let mut evaluator = options.models.calibrated(ops, calibration, options.seed, watch)?;
    let thresholds = evaluator.thresholds;
    let settings = SearchSettings {
        sense: options.sense,
        fitness: options.fitness,
        ..SearchSettings::new(options.queries, options.seed, options.models.max_new_tokens)
    };
    let mut world = World {
        grammar: &grammar,
        thresholds: &thresholds,
        plausible: &plausible,
        subject: &mut evaluator.examiner.subject,
        judge: &mut *evaluator.examiner.judges.judge,
    };
    let mut searches = vec![hunt(&mut world, &settings, &mut sampler, options.sampler.name(), watch)?];
    if options.uniform && !searches[0].interrupted {
        let mut uniform = Sampler::new(SamplerKind::Uniform, &grammar);
        searches.push(hunt(&mut world, &settings, &mut uniform, SamplerKind::Uniform.name(), watch)?);
    }
    let mut lines = Lines::default();
    for (i, found) in searches.iter().enumerate() {
        lines.probes(&found.records, options.seed, i > 0, false);
    }
    let failures: Vec<_> =
        searches[0].records.iter().filter_map(|record| record.failure(options.sense, thresholds.tau_h)).collect();
    lines.failures(&failures, options.seed);
    lines.write(dir)?;
    write_atomic(&dir.file("weights.json"), sampler.weights(&grammar).to_json().as_bytes())?;
    if searches.iter().any(|found| found.interrupted) {
        return Err(Error::Interrupted(format!(" in {}", dir.path().display())));
    }
    let summaries: Vec<SearchSummary> = searches.into_iter().map(|found| found.summary).collect();
    let (adaptive, uniform) = summaries.split_at(1);
    Ok(result(adaptive, uniform, options.seed))
}

/// One search, watched. Ctrl-C ends it after a whole batch, with what was found until then.
pub(super) fn hunt(
    world: &mut World,
    settings: &SearchSettings,
    sampler: &mut Sampler,
    name: &str,
    watch: &mut dyn Watch,
) -> Result<Found> {
    watch.begin(&format!("probe ({name})"), settings.budget);
    let found = search(world, settings, sampler, &interrupt::flag(), &mut |queries, coupled| {
        watch.at(queries, &format!("{coupled} coupled"));
    })?;
    let SearchSummary { queries, coupled_found, distinct, .. } = found.summary;
    watch.end(&format!("{queries} queries, {coupled_found} coupled failures, {distinct} distinct"));
    Ok(found)
}

/// What the adaptive searches found, one per seed, beside the uniform ones if there are any.
pub(super) fn result(adaptive: &[SearchSummary], uniform: &[SearchSummary], seed: u64) -> ProbeResult {
    let lift = lift(adaptive, uniform, seed);
    let sum = |field: fn(&SearchSummary) -> usize| adaptive.iter().map(field).sum::<usize>() as u64;
    let (queries, distinct) = (sum(|s| s.queries), sum(|s| s.distinct));
    let first = adaptive.first().cloned().unwrap_or_default();
    ProbeResult {
        queries,
        coupled_found: sum(|s| s.coupled_found),
        distinct,
        per_1000: (queries > 0).then(|| 1000.0 * distinct as f64 / queries as f64),
        uniform_per_1000: lift.as_ref().map(|l| l.uniform_per_1000),
        lift: lift.as_ref().and_then(|l| l.ratio),
        lift_ci95: lift.as_ref().and_then(|l| l.ratio_ci95),
        coverage: first.coverage,
        self_bleu: first.self_bleu,
        qd_score: first.qd_score,
        evenness: first.evenness,
        seconds_per_failure: first.seconds_per_failure,
        reprobe_per_1000: None,
    }
}
