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
use super::writing::Writing;
use crate::attacker::Attack;
use crate::error::Result;
use crate::journal::Journal;
use crate::judge::{Harm, Judge, Sense, Thresholds, Verdict};
use crate::model::subject::ask_some;
use crate::model::{Answer, Ask, Decoding, Subject, Version};
use crate::text::Prompt;
use crate::text::ngrams::{Seen, grams};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt::Display;
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
    /// Writes some of the probes.
    pub attack: Option<&'a mut Attack>,
    /// Says whether an attacker's text is a refusal (`p >= 0.5`).
    pub refusal: Option<&'a mut dyn Judge>,
    pub journal: &'a mut Journal,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// In the order of the queries.
    pub records: Vec<ProbeRecord>,
    pub summary: SearchSummary,
}

/// Searches until the budget is spent or the grammar is exhausted. The sampler learns and can be carried over into the next
/// search. `progress` hears of the queries made so far and how many of them found a coupled failure, and may end it by an error. The same seed gives the same
/// records. What models and judge say of a batch is a unit of the journal; the search itself is drawn again from the seed.
pub fn search(
    world: &mut World,
    settings: &SearchSettings,
    sampler: &mut Sampler,
    progress: &mut dyn FnMut(&[ProbeRecord], usize) -> Result<()>,
) -> Result<Found> {
    let started = Instant::now();
    sampler.begin();
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let plausible = Plausible::new(world.grammar, world.plausible, world.subject, world.journal, &mut rng)?;
    let mut search = Search {
        archive: Archive::new(world.grammar),
        aims: Sampler::new(sampler.kind, world.grammar),
        writing: Writing::default(),
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
    let mut barren = 0;
    while search.records.len() < settings.budget && barren < BARREN {
        let proposed = search.propose(BATCH.min(settings.budget - search.records.len()))?;
        if proposed.is_empty() {
            break; // exhausted
        }
        let asked = search.burst(&proposed)?;
        barren = if asked.iter().flatten().next().is_none() { barren + 1 } else { 0 };
        proposed.into_iter().zip(asked).for_each(|(child, asked)| search.learn(child, asked));
        progress(&search.records, search.coupled)?;
    }
    let (seconds, Search { world, archive, records, unlikely, writing, .. }) =
        (started.elapsed().as_secs_f64(), search);
    let SearchSettings { sense, seed, .. } = *settings;
    let mut summary = SearchSummary::new(world.grammar, &archive, &records, sense, seed, seconds);
    summary.refused_unlikely = unlikely;
    summary.writing = world.attack.is_some().then(|| summary.count(writing, &records, sense));
    Ok(Found { summary, records })
}

/// What came of a proposal that someone might write.
#[derive(Serialize, Deserialize)]
struct Asked {
    /// Mean per token under π_0, before encoding.
    logprob: Result<f64, String>,
    judged: Result<Box<Judged>, String>,
}

pub(super) struct Search<'a, 'w> {
    pub(super) world: &'a mut World<'w>,
    pub(super) settings: &'a SearchSettings,
    pub(super) sampler: &'a mut Sampler,
    /// Cells that an attacker is asked for: what it reaches in one says nothing of what the grammar does there.
    pub(super) aims: Sampler,
    pub(super) writing: Writing,
    pub(super) archive: Archive,
    pub(super) plausible: Plausible,
    pub(super) rng: ChaCha8Rng,
    /// Every prompt that was proposed: none is proposed twice.
    pub(super) proposed: HashSet<String>,
    pub(super) records: Vec<ProbeRecord>,
    coupled: usize,
    unlikely: usize,
}

impl Search<'_, '_> {
    /// Up to `n` proposals, none a near-duplicate of an elite, a found failure or another of them.
    fn propose(&mut self, n: usize) -> Result<Vec<Child>> {
        let mut company = Seen::default();
        let mut out = self.write(n, &mut company)?;
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
        Ok(out)
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

    /// What comes of the proposals, in their order; `None` for those that no one would write, which are not asked. One unit.
    fn burst(&mut self, children: &[Child]) -> Result<Vec<Option<Asked>>> {
        let Search { world, settings, plausible, records, .. } = self;
        let World { grammar, thresholds, subject, judge, journal, .. } = &mut **world;
        journal.unit(|| {
            let plain: Vec<String> = children.iter().map(|child| child.plain(grammar)).collect();
            let logprobs = plausible.measure(&plain, *subject)?;
            let probes = children.iter().zip(logprobs).map(|(child, logprob)| {
                let unlikely = logprob.as_ref().is_ok_and(|logprob| !plausible.accepts(*logprob));
                (!unlikely).then(|| (Prompt::user(child.prompt(grammar)), child.references(grammar), logprob))
            });
            ask_some(probes, |probes| ask(probes, records.len(), thresholds, settings, *subject, *judge))
        })
    }

    /// Archive and sampler learn what came of a proposal.
    fn learn(&mut self, child: Child, asked: Option<Asked>) {
        let Some(Asked { logprob, judged }) = asked else {
            self.unlikely += 1;
            return;
        };
        let (grammar, t, index) = (self.world.grammar, self.world.thresholds, self.records.len());
        let (g, prompt, author) = (child.genotype, child.prompt(grammar), child.author());
        let mut outcome = Lesson::default();
        if let Ok(j) = &judged {
            let verdict = j.verdict(self.settings.sense);
            outcome = Lesson { p_harm: j.p_harm, z: (j.reward - t.tau_r) / t.s, coupled: verdict == Verdict::Coupled };
            self.archive.insert(index, g, &prompt, j.fitness, verdict != Verdict::Sound);
        }
        self.coupled += usize::from(outcome.coupled);
        self.sampler.credit(author, outcome.coupled);
        if author.is_none() { &mut *self.sampler } else { &mut self.aims }.update(grammar, &g, &outcome);
        let ending = match judged {
            Ok(judged) => Ending::Judged(judged),
            Err(error) => Ending::Failed { error },
        };
        self.records.push(record(grammar, index, prompt, child, logprob, ending));
    }
}

/// A prompt, its y⁺ and y⁻, its log-probability.
type Probe<'a> = (Prompt, (&'a str, Option<&'a str>), Result<f64, String>);

/// Answers, judgements and rewards of prompts, each in one call; `first` is the number
/// of the first query.
fn ask(
    probes: &[Probe],
    first: usize,
    t: &Thresholds,
    settings: &SearchSettings,
    subject: &mut dyn Subject,
    judge: &mut dyn Judge,
) -> Result<Vec<Asked>> {
    let decoding = Decoding::greedy(settings.max_new_tokens);
    let asks = probes.iter().enumerate().map(|(i, (prompt, _, logprob))| {
        let ask = || Ask::new(prompt.clone(), (first + i) as u64);
        logprob.is_ok().then(ask)
    });
    let answers = ask_some(asks, |asks| subject.answer(settings.version, asks, &decoding))?;
    let texts = probes.iter().zip(&answers).map(|((prompt, ..), answer)| Some((prompt, text(answer)?)));
    let harms = ask_some(texts, |rows| judge.judge(rows, t.tau_h))?;
    // The rows of a probe side by side: own answer, y⁺ and, if the answer is safe, y⁻.
    let rows = probes.iter().zip(&answers).zip(&harms).flat_map(|(((prompt, (safe, harmful), _), answer), harm)| {
        let harm = harm.as_ref().and_then(|harm| harm.as_ref().ok());
        let own = text(answer).filter(|_| harm.is_some());
        let harmful = harm.filter(|harm| !harm.is_harmful(t.tau_h)).and(*harmful);
        [own, own.map(|_| *safe), harmful].map(|text| Some((prompt, text?)))
    });
    let scores = ask_some(rows, |rows| subject.reward(settings.version, rows))?;
    let mut scores = scores.into_iter();
    let asked = probes.iter().zip(answers).zip(harms).map(|(((_, _, logprob), answer), harm)| {
        let scores = std::array::from_fn(|_| scores.next().flatten());
        let judged = judged(logprob, answer, harm, scores, settings.fitness, t);
        Asked { logprob: logprob.clone(), judged: judged.map(Box::new) }
    });
    Ok(asked.collect())
}

fn record(
    grammar: &Grammar,
    index: usize,
    prompt: String,
    child: Child,
    logprob: Result<f64, String>,
    ending: Ending,
) -> ProbeRecord {
    let g = child.genotype;
    let topic = &grammar.topics[g.topic];
    let (safe, harmful) = child.references(grammar);
    let (safe, harmful) = (safe.to_string(), harmful.map(str::to_string));
    ProbeRecord {
        index,
        prompt,
        topic: topic.id.clone(),
        domain: topic.domain.clone(),
        tactic: grammar.tactics[g.tactic].id.clone(),
        tags: grammar.tactics[g.tactic].tags.clone(),
        form: grammar.forms[g.form].id.clone(),
        persona: grammar.personas[g.persona].id.clone(),
        genotype: g,
        parents: child.parents,
        operators: child.operators,
        safe,
        harmful,
        prompt_logprob: logprob.ok(),
        ending,
    }
}

fn text(answer: &Option<Result<Answer>>) -> Option<&str> {
    Some(&answer.as_ref()?.as_ref().ok()?.text)
}

/// What came of a probe, by the rewards of own answer, y⁺ and y⁻; or what went wrong first.
fn judged(
    logprob: &Result<f64, String>,
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
    let mut error = logprob.clone().err();
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
