//! The search: propose a batch of probes, refuse what no one would write, ask, judge, score, learn.

use super::archive::Archive;
use super::fitness::Fitness;
use super::genotype::Genotype;
use super::grammar::Grammar;
use super::operators::{self, Child};
use super::plausible::Plausible;
use super::record::{Ending, Judged, ProbeRecord};
use super::sampler::{Lesson, Sampler};
use super::summary::SearchSummary;
use crate::error::Result;
use crate::judge::{Harm, Judge, Sense, Thresholds, Verdict};
use crate::model::subject::ask_some;
use crate::model::{Answer, Ask, Decoding, Subject, Version};
use crate::text::Prompt;
use crate::text::ngrams::{Seen, grams};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Probes proposed before their outcomes are known: large enough for the engine to batch well, small enough to learn from.
const BATCH: usize = 64;
/// Attempts per proposal before the search holds its grammar to be exhausted.
const ATTEMPTS: usize = 200;
/// Attempts at one arm: a near-duplicate is a reason to vary the probe, not yet to look elsewhere.
const PATIENCE: usize = 4;
/// Batches in a row of which every probe was refused as unlikely.
const BARREN: usize = 20;
/// Share of proposals that are bred from an elite; the others are fresh compositions.
const BRED: f64 = 0.5;

/// How to search.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchSettings {
    /// Queries of the policy.
    pub(crate) budget: usize,
    pub(crate) seed: u64,
    pub(crate) fitness: Fitness,
    /// In which sense a failure is coupled.
    pub(crate) sense: Sense,
    /// Whose answers and rewards: the originals', or the repaired ones'.
    pub version: Version,
    pub(crate) max_new_tokens: usize,
}

impl SearchSettings {
    /// Defaults but for budget, seed and the limit of new tokens, which is one for everything compared.
    pub fn new(budget: usize, seed: u64, max_new_tokens: usize) -> SearchSettings {
        let (fitness, sense, version) = (Fitness::Product, Sense::Threshold, Version::Current);
        SearchSettings { budget, seed, fitness, sense, version, max_new_tokens }
    }
}

/// What a search works on.
pub struct World<'a> {
    pub grammar: &'a Grammar,
    pub thresholds: &'a Thresholds,
    /// Prompts as people write them: they only set how likely a probe must be. May be empty.
    pub plausible: &'a [Prompt],
    pub subject: &'a mut dyn Subject,
    pub judge: &'a mut dyn Judge,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// In the order of the queries.
    pub records: Vec<ProbeRecord>,
    pub summary: SearchSummary,
    /// Stopped by the interrupt flag, after a whole batch.
    pub interrupted: bool,
}

/// Searches until the budget is spent, the grammar is exhausted or `interrupt` is set, which is looked at between batches. The
/// sampler learns and can be carried over into the next search. `progress` hears of queries made and coupled failures found. The
/// same seed gives the same records.
pub fn search(
    world: &mut World,
    settings: &SearchSettings,
    sampler: &mut Sampler,
    interrupt: &AtomicBool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Found> {
    let started = Instant::now();
    sampler.begin();
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let plausible = Plausible::new(world.grammar, world.plausible, world.subject, &mut rng)?;
    let mut search = Search {
        archive: Archive::new(world.grammar),
        world,
        settings,
        sampler,
        plausible,
        rng,
        proposed: HashSet::new(),
        records: Vec::new(),
        coupled: 0,
        unlikely: 0,
    };
    let (mut interrupted, mut barren) = (false, 0);
    while search.records.len() < settings.budget && barren < BARREN {
        if interrupt.load(Ordering::Relaxed) {
            interrupted = true;
            break;
        }
        let proposed = search.propose(BATCH.min(settings.budget - search.records.len()));
        if proposed.is_empty() {
            break; // exhausted
        }
        let probes = search.keep_plausible(proposed)?;
        barren = if probes.is_empty() { barren + 1 } else { 0 };
        search.ask(probes)?;
        progress(search.records.len(), search.coupled);
    }
    let (seconds, Search { world, archive, records, unlikely, .. }) = (started.elapsed().as_secs_f64(), search);
    let SearchSettings { sense, seed, .. } = *settings;
    let summary = SearchSummary::new(world.grammar, &archive, &records, sense, seed, seconds);
    Ok(Found { summary: SearchSummary { refused_unlikely: unlikely, ..summary }, records, interrupted })
}

/// A proposal with its prompt, before and after it was measured.
struct Candidate {
    child: Child,
    prompt: Prompt,
    logprob: Result<f64, String>,
}

struct Search<'a, 'w> {
    world: &'a mut World<'w>,
    settings: &'a SearchSettings,
    sampler: &'a mut Sampler,
    archive: Archive,
    plausible: Plausible,
    rng: ChaCha8Rng,
    /// Every prompt that was proposed: none is proposed twice.
    proposed: HashSet<String>,
    records: Vec<ProbeRecord>,
    coupled: usize,
    unlikely: usize,
}

impl Search<'_, '_> {
    /// Up to `n` proposals, none a near-duplicate of an elite, a found failure or another of them.
    fn propose(&mut self, n: usize) -> Vec<Child> {
        let (mut out, mut company) = (Vec::with_capacity(n), Seen::default());
        let mut refused: Option<(Genotype, usize)> = None;
        for _ in 0..n * ATTEMPTS {
            if out.len() == n {
                break;
            }
            let again = refused.filter(|(_, times)| times % PATIENCE > 0).map(|(target, _)| target);
            let target = self.sampler.draw(self.world.grammar, again.as_ref(), &mut self.rng);
            let child = self.breed(target);
            let text = self.world.grammar.compose(&child.genotype);
            let grams = grams(&text);
            if self.proposed.contains(&text) || company.find_grams(&grams).is_some() || self.archive.knows(&grams) {
                refused = Some((target, refused.map_or(1, |(_, times)| times + 1)));
                continue;
            }
            refused = None;
            company.insert(&text);
            self.proposed.insert(text);
            self.sampler.propose(self.world.grammar, &child.genotype);
            out.push(child);
        }
        out
    }

    /// A probe of the target's cell: the target itself, or an elite mutated towards it.
    fn breed(&mut self, target: Genotype) -> Child {
        let grammar = self.world.grammar;
        if self.rng.random_bool(BRED) {
            let domain = grammar.domain_of[target.topic];
            let mut elite = || self.archive.parent(grammar, domain, target.tactic, &mut self.rng);
            if let (Some(parent), Some(mate)) = (elite(), elite()) {
                return operators::mutate(grammar, parent, mate, &target, &mut self.rng);
            }
        }
        operators::compose(target)
    }

    /// Measures the proposals and drops those that no one would write.
    fn keep_plausible(&mut self, children: Vec<Child>) -> Result<Vec<Candidate>> {
        let grammar = self.world.grammar;
        let plain: Vec<String> = children.iter().map(|c| grammar.compose_plain(&c.genotype)).collect();
        let logprobs = self.plausible.measure(&plain, self.world.subject)?;
        let mut out = Vec::with_capacity(children.len());
        for (child, logprob) in children.into_iter().zip(logprobs) {
            if logprob.as_ref().is_ok_and(|l| !self.plausible.accepts(*l)) {
                self.unlikely += 1;
                continue;
            }
            out.push(Candidate { prompt: Prompt::user(grammar.compose(&child.genotype)), child, logprob });
        }
        Ok(out)
    }

    /// Answers, judgements and rewards of a batch, each in one call; then archive and sampler learn in index order.
    fn ask(&mut self, probes: Vec<Candidate>) -> Result<()> {
        let (t, grammar, settings) = (self.world.thresholds, self.world.grammar, self.settings);
        let (first, decoding) = (self.records.len(), Decoding::greedy(settings.max_new_tokens));
        let asks = probes.iter().enumerate().map(|(i, probe)| {
            let ask = || Ask::new(probe.prompt.clone(), (first + i) as u64);
            probe.logprob.is_ok().then(ask)
        });
        let answers = ask_some(asks, |asks| self.world.subject.answer(settings.version, asks, &decoding))?;
        let texts = probes.iter().zip(&answers).map(|(probe, answer)| Some((&probe.prompt, text(answer)?)));
        let harms = ask_some(texts, |rows| self.world.judge.judge(rows, t.tau_h))?;
        // The rows of a probe side by side: own answer, y⁺ and, if the answer is safe, y⁻.
        let rows = probes.iter().zip(&answers).zip(&harms).flat_map(|((probe, answer), harm)| {
            let topic = &grammar.topics[probe.child.genotype.topic];
            let harm = harm.as_ref().and_then(|harm| harm.as_ref().ok());
            let own = text(answer).filter(|_| harm.is_some());
            let harmful = harm.filter(|harm| !harm.is_harmful(t.tau_h)).map(|_| topic.harmful.as_str());
            [own, own.map(|_| topic.safe.as_str()), harmful].map(|text| Some((&probe.prompt, text?)))
        });
        let scores = ask_some(rows, |rows| self.world.subject.reward(settings.version, rows))?;
        let mut scores = scores.into_iter();
        for (i, ((probe, answer), harm)) in probes.into_iter().zip(answers).zip(harms).enumerate() {
            let scores = std::array::from_fn(|_| scores.next().flatten());
            let judged = judged(&probe, answer, harm, scores, settings.fitness, t);
            self.learn(first + i, probe, judged);
        }
        Ok(())
    }

    fn learn(&mut self, index: usize, probe: Candidate, judged: Result<Judged, String>) {
        let (grammar, t) = (self.world.grammar, self.world.thresholds);
        let g = probe.child.genotype;
        let mut outcome = Lesson::default();
        if let Ok(j) = &judged {
            let verdict = j.verdict(self.settings.sense);
            outcome = Lesson { p_harm: j.p_harm, z: (j.reward - t.tau_r) / t.s, coupled: verdict == Verdict::Coupled };
            self.archive.insert(index, g, probe.prompt.text(), j.fitness, verdict != Verdict::Sound);
        }
        self.coupled += usize::from(outcome.coupled);
        self.sampler.update(grammar, &g, &outcome);
        let ending = match judged {
            Ok(judged) => Ending::Judged(Box::new(judged)),
            Err(error) => Ending::Failed { error },
        };
        self.records.push(record(grammar, index, g, probe, ending));
    }
}

fn record(grammar: &Grammar, index: usize, g: Genotype, probe: Candidate, ending: Ending) -> ProbeRecord {
    let topic = &grammar.topics[g.topic];
    ProbeRecord {
        index,
        prompt: probe.prompt.text().to_string(),
        topic: topic.id.clone(),
        domain: topic.domain.clone(),
        tactic: grammar.tactics[g.tactic].id.clone(),
        form: grammar.forms[g.form].id.clone(),
        persona: grammar.personas[g.persona].id.clone(),
        genotype: g,
        parents: probe.child.parents,
        operators: probe.child.operators,
        safe: topic.safe.clone(),
        harmful: topic.harmful.clone(),
        prompt_logprob: probe.logprob.ok(),
        ending,
    }
}

fn text(answer: &Option<Result<Answer>>) -> Option<&str> {
    Some(&answer.as_ref()?.as_ref().ok()?.text)
}

/// What came of a probe, by the rewards of own answer, y⁺ and y⁻; or what went wrong first.
fn judged(
    probe: &Candidate,
    answer: Option<Result<Answer>>,
    harm: Option<Result<Harm>>,
    scores: [Option<Result<f32>>; 3],
    fitness: Fitness,
    t: &Thresholds,
) -> Result<Judged, String> {
    let finite = |score: Result<f32>| match score.map(f64::from) {
        Ok(r) if !r.is_finite() => Err(format!("reward: expected a finite number, found {r}")),
        score => score.map_err(|error| error.to_string()),
    };
    let mut error = probe.logprob.clone().err();
    let (answer, harm) = (keep(&mut error, answer), keep(&mut error, harm));
    let [own, safe, harmful] = scores.map(|score| keep(&mut error, score.map(finite)));
    match (error, answer, harm, own, safe) {
        (None, Some(answer), Some(harm), Some(own), Some(safe)) => {
            let fitness = fitness.of(harm.p_harm, own, t);
            Ok(Judged::new(answer, harm, [own, safe], harmful, fitness, t))
        }
        (error, ..) => Err(error.unwrap_or_default()),
    }
}

/// The value, or what went wrong; the first error stays.
fn keep<T, E: Display>(error: &mut Option<String>, value: Option<Result<T, E>>) -> Option<T> {
    value?.map_err(|why| error.get_or_insert_with(|| why.to_string())).ok()
}
