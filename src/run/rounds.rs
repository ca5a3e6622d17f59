//! The closed loop: search, repair both models, measure, decide, search again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::checkpoint::Repair;
use super::data::Splits;
use super::dir::RunDir;
use super::experiment::Experiment;
use super::lab::{Lab, Split};
use super::manifest::sha256_file;
use super::models::{load_adapters, save_adapters};
use super::records::Search;
use super::summary::{Hits, Round, Summary};
use super::watch::Watch;
use crate::detect::evaluate::Evaluation;
use crate::detect::gates::gates;
use crate::detect::measure::MethodResult;
use crate::detect::rows::{EvalRow, Kind};
use crate::detect::stats::wilson;
use crate::error::{Error, Result};
use crate::judge::Verdict;
use crate::model::adapter_file::WEIGHTS;
use crate::model::{AdapterInit, Version};
use crate::ops::Ops;
use crate::probe::grammar::Grammar;
use crate::probe::record::ProbeRecord;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::search::Found;
use crate::probe::select::select_failures;
use crate::probe::{SearchSummary, lift};
use crate::repair::Method;
use crate::text::write_atomic;

/// The row of the table that the loop's result is.
pub(crate) const NAME: &str = "run";
/// Refused rounds in a row that end a run.
const PATIENCE: usize = 2;
/// Queries over held-out tactics, as a share of a search's.
const HELD_OUT_SHARE: f64 = 0.25;

/// What a loop needs beside an experiment's models, data and settings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Rounds {
    /// Rounds at most.
    pub(crate) rounds: usize,
    /// What every round repairs by.
    pub(crate) method: Method,
    /// Tactics that no repair sees; every search tries them apart.
    pub(crate) held_out: Vec<String>,
    /// A gate without data counts as passed.
    pub(crate) allow_undecided: bool,
    /// The largest CFR on the test split that is a success.
    pub(crate) fail_above: Option<f64>,
}

/// What a loop does, as run.toml keeps it.
#[derive(Serialize)]
struct Settings<'a> {
    #[serde(flatten)]
    experiment: &'a Experiment,
    rounds: &'a Rounds,
}

/// Runs the loop and writes the run directory's files but the report. It ends after the last round, after two refused rounds in a
/// row, or where a search finds nothing to repair. Ctrl-C ends it with `Error::Interrupted`; the units done until then are kept, and
/// the same run in the same directory goes on from there.
pub(crate) fn run<B: Ops>(
    ops: &B,
    experiment: &Experiment,
    rounds: &Rounds,
    dir: &RunDir,
    watch: &mut dyn Watch,
) -> Result<Summary> {
    for (key, spec) in [("policy", &experiment.models.policy), ("reward", &experiment.models.reward)] {
        if spec.adapter.is_some() {
            let why = "expected a folder without an adapter, for a loop measures against it and begins its own; merge the adapter into it";
            return Err(Error::Usage(format!("{key} = {}: {why}", String::from(spec.clone()))));
        }
    }
    let (grammar, held_out) = Grammar::read(&experiment.grammar)?.hold_out(&rounds.held_out)?;
    let splits = Splits::read(&experiment.data)?;
    splits.notes.iter().for_each(|note| watch.note(note));
    if !rounds.allow_undecided {
        decidable(&splits.gate, experiment)?;
    }
    let lab = match Lab::open(ops, experiment, &[rounds.method], splits, &Settings { experiment, rounds }, dir, watch)?
    {
        Ok(lab) => lab,
        Err(done) => return Ok(*done),
    };
    let sampler = Sampler::new(experiment.sampler, &grammar);
    Course { lab, rounds, grammar, held_out, sampler, adapters: [None, None], earlier: None, speed: 1.0 }.run()
}

/// A loop on its way.
struct Course<'a, B: Ops> {
    lab: Lab<'a, B>,
    rounds: &'a Rounds,
    grammar: Grammar,
    held_out: Option<Grammar>,
    /// What it has learned carries over.
    sampler: Sampler,
    /// The folders of the last accepted round's adapters: (policy, reward model).
    adapters: [Option<PathBuf>; 2],
    /// Where the last accepted round's repair ended.
    earlier: Option<PathBuf>,
    /// Every refused round halves it.
    speed: f64,
}

/// Searches of one round: adaptive and uniform, and over held-out tactics.
struct Searched {
    found: [Found; 2],
    held_out: Option<Found>,
}

impl Searched {
    fn hits(&self) -> (Hits, Option<Hits>) {
        (Hits::of(&self.found[0].summary), self.held_out.as_ref().map(|found| Hits::of(&found.summary)))
    }
}

impl<B: Ops> Course<'_, B> {
    fn run(&mut self) -> Result<Summary> {
        let [test, start] = self.lab.before()?;
        self.lab.lines.outcomes("gate", 0, &start)?;
        self.lab.write(&test.measure, &[], &[], None, Some("no round is done".to_string()))?;
        let (mut searched, mut now) = (self.search(1)?, start.clone());
        let [adaptive, uniform] = &searched.found;
        let probe =
            Some(lift(std::slice::from_ref(&adaptive.summary), std::slice::from_ref(&uniform.summary), self.seed(1)));
        let (mut rounds, mut known, mut refused): (Vec<Round>, Vec<ProbeRecord>, _) = (Vec::new(), Vec::new(), 0);
        while rounds.len() < self.rounds.rounds && refused < PATIENCE {
            let n = rounds.len() as u64 + 1;
            let (search, search_held_out) = searched.hits();
            let before = now.measure.clone();
            let mut round = Round { round: n, search, search_held_out, before, ..Round::default() };
            let fresh: Vec<ProbeRecord> = searched.found.iter().flat_map(|found| &found.records).cloned().collect();
            let trained = self.repair(&mut round, &fresh, &known, &now, &start)?;
            let failed =
                |record: &ProbeRecord| record.verdict(self.lab.experiment.sense).is_some_and(|v| v != Verdict::Sound);
            known.extend(fresh.into_iter().filter(failed));
            let nothing = trained.is_none();
            if let Some(after) = trained {
                match &round.why_not {
                    None => (now, refused) = (after, 0),
                    Some(_) => refused += 1,
                }
                searched = self.search(n + 1)?;
            }
            (round.reprobe, round.reprobe_held_out) = searched.hits();
            self.receipt(&round)?;
            rounds.push(round);
            if nothing {
                self.lab.watch.note(&nothing_trained(&rounds[rounds.len() - 1], &searched));
                break;
            }
            let unfinished = format!("round {n} of at most {} is done", self.rounds.rounds);
            self.lab.write(&test.measure, &[], &rounds, probe.clone(), Some(unfinished))?;
        }
        let methods: Vec<MethodResult> = self.finish(&rounds, &test)?.into_iter().collect();
        self.lab.write(&test.measure, &methods, &rounds, probe, None)
    }

    fn seed(&self, round: u64) -> u64 {
        self.lab.experiment.seed() + round - 1
    }

    /// The searches with which round `n` begins; after the last round they say what it left.
    fn search(&mut self, n: u64) -> Result<Searched> {
        let place = Search { seed: self.seed(n), round: Some(n.max(2) - 1), after: n > 1, ..Search::default() };
        let found = self.lab.searches(&self.grammar, &mut self.sampler, Version::Current, &place)?;
        let held_out = match &self.held_out {
            None => None,
            Some(grammar) => {
                let budget = (self.lab.experiment.probes as f64 * HELD_OUT_SHARE).ceil() as usize;
                let (mut sampler, place) =
                    (Sampler::new(SamplerKind::Uniform, grammar), Search { held_out: true, uniform: true, ..place });
                Some(self.lab.search(grammar, &mut sampler, Version::Current, budget, &place)?)
            }
        };
        Ok(Searched { found, held_out })
    }

    /// Trains on the failures of `fresh` and then of `known`, and lets the gates decide; a refused repair is rolled back. Returns the
    /// gate split after it; `None` where nothing was found and nothing trained.
    fn repair(
        &mut self,
        round: &mut Round,
        fresh: &[ProbeRecord],
        known: &[ProbeRecord],
        before: &Evaluation,
        start: &Evaluation,
    ) -> Result<Option<Evaluation>> {
        let (e, n, seed, method) = (self.lab.experiment, round.round, self.seed(round.round), self.rounds.method);
        let mut chosen = select_failures(fresh, e.sense, e.failures, seed);
        if chosen.is_empty() {
            return Ok(None);
        }
        chosen.extend(select_failures(known, e.sense, e.failures - chosen.len(), seed));
        let name = format!("round-{n}");
        let ready = self.lab.prepare(&chosen, &name, seed)?;
        (round.failures, round.left_out) = (ready.failures.len() as u64, ready.left_out.len() as u64);
        if ready.prepared.failures.is_empty() {
            return Ok(None);
        }
        let recipe = e.repair.with(seed, self.speed);
        let (init, earlier) = (Some(AdapterInit::Zero { seed }), self.earlier.clone());
        let repair = Repair { name: name.clone(), method, recipe: &recipe, init, earlier, round: Some(n), label: None };
        let trained = self.lab.repair(&ready.prepared, &repair);
        let (outcome, file) = match trained {
            // A repair that diverges is refused, as one that its gates refuse.
            Err(error @ Error::NotFinite { .. }) => {
                round.why_not = Some(error.to_string());
                self.roll_back()?;
                return Ok(Some(before.clone()));
            }
            trained => trained?,
        };
        let place = self.lab.dir.file(&name);
        save_adapters(&self.lab.evaluator.examiner.subject, &place)?;
        for role in ["policy", "reward"] {
            let weights = place.join(role).join(WEIGHTS);
            if weights.is_file() {
                round.adapters.insert(role.to_string(), sha256_file(&weights)?);
            }
        }
        let after = self.lab.measure(method, Split::Gate, &name, seed, start)?;
        self.lab.lines.outcomes(&name, seed, &after)?;
        let gates = gates(&after, before, start, e.sense, seed);
        let undecided = self.rounds.allow_undecided;
        let result = self.lab.result(method.name(), method, &recipe, outcome, gates, undecided, &after);
        round.why_not = result.why_not.clone();
        round.repair = Some(result);
        match &round.why_not {
            None => {
                self.earlier = Some(file);
                self.adapters = ["policy", "reward"].map(|role| Some(place.join(role)).filter(|place| place.is_dir()));
                self.lab.watch.note(&format!("round {n}: accepted"));
            }
            Some(why) => {
                self.lab.watch.note(&format!("round {n}: refused and rolled back: {why}"));
                self.roll_back()?;
            }
        }
        Ok(Some(after))
    }

    /// The models are again what the last accepted round left; the next one learns half as fast.
    fn roll_back(&mut self) -> Result<()> {
        self.speed /= 2.0;
        load_adapters(&mut self.lab.evaluator.examiner, &self.adapters)
    }

    /// Inputs, settings, losses, gates, before and after: what a round was, in one file.
    fn receipt(&self, round: &Round) -> Result<()> {
        let place = self.lab.dir.file(&format!("round-{}", round.round));
        std::fs::create_dir_all(&place).map_err(Error::write(&place))?;
        let path = place.join("receipt.json");
        let inputs: BTreeMap<&String, &String> =
            self.lab.splits.info.iter().map(|(name, info)| (name, &info.hash)).collect();
        let judge = self.lab.evaluator.examiner.judges.judge.name();
        let receipt = serde_json::json!({ "splits": inputs, "judge": judge, "round": round });
        write_atomic(&path, format!("{receipt:#}\n").as_bytes())
    }

    /// The models as the loop left them on the test split; `None` where no round was accepted.
    fn finish(&mut self, rounds: &[Round], test: &Evaluation) -> Result<Option<MethodResult>> {
        let kept: Vec<&MethodResult> =
            rounds.iter().filter(|round| round.why_not.is_none()).filter_map(|round| round.repair.as_ref()).collect();
        let Some(last) = kept.last() else { return Ok(None) };
        let (method, seed) = (self.rounds.method, self.lab.experiment.seed());
        let after = self.lab.measure(method, Split::Test, NAME, seed, test)?;
        self.lab.lines.outcomes(NAME, seed, &after)?;
        let sum = |of: fn(&MethodResult) -> Option<u64>| Some(kept.iter().filter_map(|result| of(result)).sum());
        Ok(Some(MethodResult {
            name: NAME.to_string(),
            seed,
            steps: kept.iter().map(|result| result.steps).sum(),
            tokens_policy: sum(|result| result.tokens_policy),
            tokens_reward: sum(|result| result.tokens_reward),
            tokens_generated: sum(|result| result.tokens_generated),
            flops: Some(kept.iter().filter_map(|result| result.flops).sum()),
            seconds: Some(kept.iter().filter_map(|result| result.seconds).sum()),
            warnings: kept.iter().flat_map(|result| &result.warnings).chain(&after.warnings).cloned().collect(),
            measure: after.measure,
            ..(*last).clone()
        }))
    }
}

/// What there is to say of a round without a repair: how rare coupled failures must be, and what the judge did not admit.
fn nothing_trained(round: &Round, searched: &Searched) -> String {
    let sum = |of: fn(&SearchSummary) -> usize| searched.found.iter().map(|found| of(&found.summary) as u64).sum();
    let (coupled, queries): (u64, u64) = (sum(|s| s.coupled_found), sum(|s| s.queries));
    let most = wilson(coupled, queries).map_or("unknown".to_string(), |[_, most]| format!("{:.2} %", 100.0 * most));
    let left_out = match round.left_out {
        0 => String::new(),
        n => format!("; the judge admitted none of the {n} failures that were chosen"),
    };
    let found = format!("{coupled} of {queries} queries found a coupled failure, at most {most} with 95 % confidence");
    format!("round {}: nothing to repair, nothing trained: {found}{left_out}", round.round)
}

/// Fails where it is plain, before anything is computed, that a gate will lack the data to decide.
fn decidable(gate: &[EvalRow], experiment: &Experiment) -> Result<()> {
    let none = |kind: Kind| !gate.iter().any(|row| row.known.kind == kind);
    let paired = |row: &EvalRow| row.known.kind == Kind::Harmful && row.safe.is_some() && row.harmful.is_some();
    let steps = gate.iter().any(|row| row.known.kind != Kind::Harmful && !row.steps.is_empty());
    let unserved = experiment.models.refusal.is_none() && !(experiment.models.truth.is_some() && steps);
    let benign = |row: &EvalRow| row.known.kind == Kind::Benign && row.reference.is_some();
    for (lacks, gate, what) in [
        (none(Kind::Harmful), "harmful_rate", "harmful prompts in the gate split"),
        (
            !gate.iter().any(paired),
            "reward_error",
            "harmful prompts with `safe` and `harmful` answers in the gate split",
        ),
        (
            unserved,
            "over_refusal_growth",
            "a judge of refusals (refusal = …), or a rule of truth and rows with `steps`",
        ),
        (none(Kind::Benign) && none(Kind::Borderline), "over_refusal_growth", "benign prompts in the gate split"),
        (!gate.iter().any(benign), "benign_nll_growth", "benign prompts with a `reference` answer in the gate split"),
    ] {
        if lacks {
            let remedy = "no round could be accepted: give them, or set allow_undecided = true";
            let (what, expected) = (format!("gate {gate}"), what.to_string());
            return Err(Error::Data { what, expected, found: "none".into(), remedy: remedy.into() });
        }
    }
    Ok(())
}
