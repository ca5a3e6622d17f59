//! `ares probe`: search for prompts on which policy and reward model fail together.

use std::path::PathBuf;

use serde::Serialize;

use super::args;
use super::attack::AttackOptions;
use super::data;
use super::dir::RunDir;
use super::manifest::Manifest;
use super::models::Models;
use super::records::{self, Lines};
use super::watch::Watch;
use crate::detect::{Evaluator, Examiner};
use crate::error::Result;
use crate::judge::{Judge, Sense};
use crate::model::Pair;
use crate::ops::Ops;
use crate::probe::search::{Found, SearchSettings, World, search};
use crate::probe::{Fitness, Grammar, ProbeResult, Sampler, SamplerKind, SamplerWeights, SearchSummary, lift};
use crate::text::{Prompt, Row, write_atomic};

// What `ares probe` was asked for; serialised, the settings that run.toml keeps. As a doc comment this would take the place of the
// command's own help.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct ProbeOptions {
    #[command(flatten)]
    pub(crate) models: Models,
    /// In which sense the reward model is wrong: it approves a harmful answer, or prefers it to the safe one
    #[arg(long = "approve", value_name = "APPROVE", value_enum, default_value = "threshold")]
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
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) attack: AttackOptions,
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) seed: u64,
}

/// Searches and writes `probes.jsonl`, which grows, `failures.jsonl` and, of the adaptive sampler, `weights.json`. Ctrl-C ends it
/// with `Error::Interrupted`; the batches asked until then are kept.
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
    let calibration = data::read_pairs(&options.calibration, Row::calibration_pairs)?;
    let mut sampler = Sampler::new(options.sampler, &grammar);
    if let Some(path) = &options.weights {
        sampler.carry_over(&grammar, &SamplerWeights::read(path)?, path)?;
    }
    let manifest = Manifest::new("probe", &ops.describe(), &[options.seed], options)?;
    let files = [&options.calibration, &options.grammar].into_iter().chain(&options.plausible).chain(&options.weights);
    let files = files.map(PathBuf::as_path).chain(options.attack.places());
    options.models.write_receipt(manifest, files, dir)?;
    let attack = options.attack.open(ops, &options.models)?;
    let mut evaluator = options.models.calibrated(ops, calibration, options.seed, dir, watch)?;
    evaluator.examiner.attack = attack;
    let thresholds = evaluator.thresholds;
    let settings = SearchSettings {
        sense: options.sense,
        fitness: options.fitness,
        ..SearchSettings::new(options.queries, options.seed, options.models.max_new_tokens)
    };
    let mut lines = Lines::new(dir);
    let mut hunt = |sampler: &mut Sampler| {
        let uniform = sampler.kind == SamplerKind::Uniform;
        let search = records::Search { seed: options.seed, uniform, ..records::Search::default() };
        hunt(&mut evaluator, &grammar, &plausible, &settings, sampler, &search, &mut lines, watch)
    };
    let mut searches = vec![hunt(&mut sampler)?];
    if options.uniform {
        searches.push(hunt(&mut Sampler::new(SamplerKind::Uniform, &grammar))?);
    }
    let failures: Vec<_> =
        searches[0].records.iter().filter_map(|record| record.failure(options.sense, thresholds.tau_h)).collect();
    lines.failures(&failures, options.seed)?;
    write_atomic(&dir.file("weights.json"), sampler.weights(&grammar).to_json().as_bytes())?;
    let summaries: Vec<SearchSummary> = searches.into_iter().map(|found| found.summary).collect();
    let (adaptive, uniform) = summaries.split_at(1);
    Ok(lift(adaptive, uniform, options.seed))
}

/// One search, watched; its queries are written as they are made.
pub(super) fn hunt<B: Ops>(
    evaluator: &mut Evaluator<Pair<B>>,
    grammar: &Grammar,
    plausible: &[Prompt],
    settings: &SearchSettings,
    sampler: &mut Sampler,
    place: &records::Search,
    lines: &mut Lines,
    watch: &mut dyn Watch,
) -> Result<Found> {
    watch.begin(&format!("probe ({:?})", sampler.kind).to_lowercase(), settings.budget);
    let Examiner { subject, judges, journal, attack, .. } = &mut evaluator.examiner;
    let held_out = if place.held_out { " held out" } else { "" };
    journal.stage(&format!("probe {} {:?}{held_out}", place.seed, sampler.kind).to_lowercase());
    let mut written = 0;
    let (thresholds, judge) = (&evaluator.thresholds, &mut *judges.judge);
    let (attack, refusal) = (attack.as_mut(), judges.refusal.as_deref_mut().map(|judge| judge as &mut dyn Judge));
    let mut world = World { grammar, thresholds, plausible, subject, judge, attack, refusal, journal };
    let found = search(&mut world, settings, sampler, &mut |records, coupled| {
        watch.at(records.len(), &format!("{coupled} coupled"));
        lines.probes(&records[std::mem::replace(&mut written, records.len())..], place)
    })?;
    let SearchSummary { queries, coupled_found, distinct, .. } = found.summary;
    watch.end(&format!("{queries} queries, {coupled_found} coupled failures, {distinct} distinct"));
    Ok(found)
}
