//! The probe search against a simulated world with planted cells.

mod composition;
mod learning;
mod world;
mod writing;

use ares::Error;
use ares::journal::Journal;
use ares::judge::{Sense, Verdict};
use ares::model::Version;
use ares::probe::{
    Ending, Found, Grammar, Operator, ProbeRecord, Sampler, SamplerKind, SearchSettings, World, search, select_failures,
};
use ares::text::ngrams::{NEAR_DUPLICATE, grams, jaccard};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use world::*;

/// One search of a fresh world.
fn run(grammar: &Grammar, sampler: &mut Sampler, settings: &SearchSettings) -> Found {
    run_in(grammar, sampler, settings, &mut Simulated::default())
}

fn run_in(grammar: &Grammar, sampler: &mut Sampler, settings: &SearchSettings, subject: &mut Simulated) -> Found {
    let mut judge = SimulatedJudge;
    let (thresholds, plausible, mut journal) = (&THRESHOLDS, &[], Journal::none());
    let (judge, journal, attack, refusal) = (&mut judge, &mut journal, None, None);
    let mut world = World { grammar, thresholds, plausible, subject, judge, attack, refusal, journal };
    search(&mut world, settings, sampler, &mut |_, _| Ok(())).expect("a search")
}

fn search_for(kind: SamplerKind, settings: &SearchSettings, subject: &mut Simulated) -> Found {
    let grammar = grammar();
    run_in(&grammar, &mut Sampler::new(kind, &grammar), settings, subject)
}

fn found(kind: SamplerKind, seed: u64) -> Found {
    search_for(kind, &SearchSettings::new(1000, seed, 40), &mut Simulated::default())
}

#[test]
fn the_same_seed_gives_the_same_records() {
    for kind in [SamplerKind::Ares, SamplerKind::Ucb, SamplerKind::Thompson, SamplerKind::Uniform] {
        let (a, b, other) = (found(kind, 1), found(kind, 1), found(kind, 2));
        assert_eq!(a.records, b.records, "{kind:?}");
        assert!(a.records != other.records, "{kind:?}: the seed changes nothing");
    }
}

#[test]
fn the_budget_is_kept_and_every_query_has_its_number() {
    let mut subject = Simulated::default();
    let mut settings = SearchSettings::new(150, 3, 40);
    settings.version = Version::Start;
    let found = search_for(SamplerKind::Thompson, &settings, &mut subject);
    let indices: Vec<usize> = found.records.iter().map(|r| r.index).collect();
    assert_eq!(indices, (0..150).collect::<Vec<_>>());
    let asked: Vec<(u64, &str)> = subject.asks.iter().map(|a| (a.id, a.prompt.text())).collect();
    let recorded: Vec<(u64, &str)> = found.records.iter().map(|r| (r.index as u64, r.prompt.as_str())).collect();
    assert_eq!(asked, recorded);
    let decoding = subject.decoding.expect("asked");
    assert_eq!((decoding.temperature, decoding.max_new_tokens), (0.0, 40));
    assert!(subject.versions.iter().all(|v| *v == Version::Start));
}

#[test]
fn no_near_duplicate_of_a_failure_is_asked() {
    let records = found(SamplerKind::Ucb, 0).records;
    let prompts: HashSet<&str> = records.iter().map(|r| r.prompt.as_str()).collect();
    assert_eq!(prompts.len(), records.len(), "a prompt was asked twice");
    let grams: Vec<Vec<u64>> = records.iter().map(|r| grams(&r.prompt)).collect();
    let failures = records.iter().filter(|r| r.verdict(Sense::Threshold).is_some_and(|v| v != Verdict::Sound));
    for failure in failures {
        let later = records.iter().filter(|r| r.index > failure.index);
        for r in later {
            let near = jaccard(&grams[failure.index], &grams[r.index]);
            assert!(near < NEAR_DUPLICATE, "{near}: {} | {}", failure.prompt, r.prompt);
        }
    }
}

#[test]
fn verdicts_follow_the_world_in_both_senses() {
    let records = found(SamplerKind::Uniform, 5).records;
    let mut counts = BTreeMap::<(Verdict, Verdict), usize>::new();
    for record in &records {
        let j = record.judged().expect("no errors in this world");
        let harmful = j.p_harm > 0.5;
        assert_eq!(j.reward_harmful.is_some(), !harmful, "y⁻ is scored where the own answer is safe");
        // Who is tried on which text, by what the world says of it.
        let tried = reward_of(&record.prompt, if harmful { &j.response } else { record.harmful.as_deref().unwrap() });
        let expected = |limit: f32| match (harmful, tried >= limit) {
            (false, false) => Verdict::Sound,
            (false, true) => Verdict::Reward,
            (true, false) => Verdict::Policy,
            (true, true) => Verdict::Coupled,
        };
        assert_eq!(j.verdict, expected(0.1), "{}", record.prompt);
        assert_eq!(j.verdict_pairwise, expected(reward_of(&record.prompt, &record.safe)), "{}", record.prompt);
        *counts.entry((j.verdict, j.verdict_pairwise)).or_default() += 1;
    }
    for verdict in [Verdict::Sound, Verdict::Reward, Verdict::Policy, Verdict::Coupled] {
        assert!(counts.contains_key(&(verdict, verdict)), "no {verdict:?} among {counts:?}");
    }
}

#[test]
fn lineage_says_what_changed() {
    let mut seen = HashSet::new();
    let searches = [found(SamplerKind::Thompson, 0), found(SamplerKind::Uniform, 0)];
    for (records, record) in searches.iter().flat_map(|s| s.records.iter().map(|record| (&s.records, record))) {
        seen.extend(record.operators.iter().copied());
        assert!(record.parents.iter().all(|&parent| parent < record.index), "parents come first");
        let Some(parent) = record.parents.first().map(|&parent| &records[parent]) else {
            assert_eq!(record.operators, [Operator::Compose]);
            continue;
        };
        let (child, parent) = (record.genotype, parent.genotype);
        let by = |operators: &[Operator]| record.operators.iter().any(|o| operators.contains(o));
        use Operator::*;
        assert!(!by(&[Compose]));
        assert!(child.topic == parent.topic || by(&[TopicSwap]));
        assert!(child.tactic == parent.tactic || by(&[TacticSwap]));
        assert!(child.template == parent.template || by(&[TemplateRephrase, TacticSwap]));
        assert!(child.persona == parent.persona || by(&[PersonaSwap, Crossover]));
        assert!(child.form == parent.form || by(&[FormSwap, Crossover]));
        assert!(child.surface.prefix == parent.surface.prefix || by(&[Prefix, Crossover]));
        assert!(child.surface.suffix == parent.surface.suffix || by(&[Suffix, Crossover]));
        assert!(child.surface.table == parent.surface.table || by(&[Translate, Crossover, TacticSwap]));
        assert!(child.surface.casing == parent.surface.casing || by(&[Operator::Casing, Crossover]));
        assert!(child.surface.encoding == parent.surface.encoding || by(&[Encode, Crossover]));
    }
    assert_eq!(seen.len(), 12, "every operator is used: {seen:?}");
}

#[test]
fn unlikely_prompts_are_refused_whatever_hides_them() {
    for kind in [SamplerKind::Thompson, SamplerKind::Uniform] {
        let found = found(kind, 0);
        assert!(found.summary.refused_unlikely > 0);
        assert!(found.records.iter().all(|r| r.genotype.surface.prefix != Some(1)));
        // Measured before translation, casing and encoding, which would be refused as unlikely or hide what is.
        let grammar = grammar();
        for record in &found.records {
            let expected = logprob_of(&grammar.compose_plain(&record.genotype));
            assert!(record.prompt_logprob.is_some_and(|l| (l - expected).abs() <= 1e-12), "{}", record.prompt);
        }
        assert!(found.records.iter().any(|r| r.prompt != grammar.compose_plain(&r.genotype)));
    }
}

#[test]
fn a_broken_row_costs_itself_only() {
    let mut subject = Simulated { broken: Some("taxi".into()), unscored: Some("nurse".into()), ..Simulated::default() };
    let found = search_for(SamplerKind::Uniform, &SearchSettings::new(300, 0, 40), &mut subject);
    assert_eq!(found.records.len(), 300);
    let mut errors = [0, 0];
    for record in &found.records {
        let j = match &record.ending {
            Ending::Judged(judged) => judged,
            Ending::Failed { error } => {
                let (place, text) = if error.contains("a broken one") { (0, "taxi") } else { (1, "nurse") };
                assert!(record.prompt.contains(text), "{}: {error}", record.prompt);
                errors[place] += 1;
                continue;
            }
        };
        assert!(!record.prompt.contains("taxi") && !record.prompt.contains("nurse"), "{}", record.prompt);
        assert_eq!(j.reward, f64::from(reward_of(&record.prompt, &j.response)), "rows of the neighbours were mixed up");
        assert_eq!(j.reward_safe, f64::from(reward_of(&record.prompt, &record.safe)));
    }
    assert!(errors[0] > 10 && errors[1] > 10, "{errors:?}");
    assert_eq!(errors[0] + errors[1], found.summary.errors);
}

#[test]
fn an_interrupted_search_goes_on_from_its_last_batch() {
    let (folder, settings) = (tempfile::tempdir().expect("a folder"), SearchSettings::new(1000, 1, 40));
    let search = |stop_at: usize| {
        let (grammar, interrupt) = (grammar(), Arc::new(AtomicBool::new(false)));
        let (mut subject, mut judge) = (Simulated::default(), SimulatedJudge);
        let mut journal = Journal::open(folder.path(), interrupt.clone()).expect("a journal");
        journal.stage("probe");
        let mut world = World {
            grammar: &grammar,
            thresholds: &THRESHOLDS,
            plausible: &[],
            subject: &mut subject,
            judge: &mut judge,
            attack: None,
            refusal: None,
            journal: &mut journal,
        };
        let mut sampler = Sampler::new(SamplerKind::Thompson, &grammar);
        let mut stop = |records: &[ProbeRecord], _| {
            interrupt.store(records.len() >= stop_at, Ordering::Relaxed);
            Ok(())
        };
        let found = search(&mut world, &settings, &mut sampler, &mut stop);
        (found, subject.asks.len())
    };
    let (whole, asked) = search_for_all();
    for (stop_at, least, most) in [(100, 100, 128), (500, 372, 500)] {
        let (stopped, asked) = search(stop_at);
        assert!(matches!(stopped, Err(Error::Interrupted(_))));
        assert!((least..=most).contains(&asked), "{asked} queries: what was done is not asked again");
    }
    let (resumed, rest) = search(usize::MAX);
    assert_eq!(resumed.expect("a search").records, whole.records);
    assert!((372..=500).contains(&rest) && asked == 1000, "{rest}");
}

/// An undisturbed search of the same settings, and what it asked.
fn search_for_all() -> (Found, usize) {
    let mut subject = Simulated::default();
    let found = search_for(SamplerKind::Thompson, &SearchSettings::new(1000, 1, 40), &mut subject);
    (found, subject.asks.len())
}

#[test]
fn an_exhausted_grammar_ends_the_search() {
    let mut json = grammar_json();
    for list in ["topics", "forms", "personas", "tactics"] {
        let first = json[list][0].clone();
        json[list] = serde_json::Value::Array(vec![first]);
    }
    let grammar = Grammar::parse(&json.to_string(), std::path::Path::new("small.json")).expect("valid");
    let found = run(&grammar, &mut Sampler::new(SamplerKind::Thompson, &grammar), &SearchSettings::new(1000, 1, 40));
    assert!((1..100).contains(&found.records.len()), "{}", found.records.len());
}

#[test]
fn records_survive_json() {
    let mut subject = Simulated { broken: Some("taxi".into()), ..Simulated::default() };
    let found = search_for(SamplerKind::Thompson, &SearchSettings::new(200, 0, 40), &mut subject);
    assert!(found.summary.errors > 0 && found.summary.coupled_found > 0);
    for record in &found.records {
        let line = serde_json::to_string(record).expect("a line");
        assert_eq!(&serde_json::from_str::<ProbeRecord>(&line).expect("a record"), record, "{line}");
    }
}

#[test]
fn repair_items_are_distinct_clear_and_balanced() {
    let records = found(SamplerKind::Thompson, 0).records;
    let items = select_failures(&records, Sense::Threshold, 120, 7);
    assert_eq!(items.len(), 120);
    assert_eq!(items, select_failures(&records, Sense::Threshold, 120, 7));
    let mut cells = BTreeMap::<(Verdict, &str, &str), usize>::new();
    for (i, item) in items.iter().enumerate() {
        let judged = item.judged().expect("judged");
        assert!(!judged.ambiguous && judged.verdict != Verdict::Sound);
        let near = items[..i].iter().map(|o| jaccard(&grams(&o.prompt), &grams(&item.prompt))).fold(0.0, f64::max);
        assert!(near < NEAR_DUPLICATE, "{near}");
        *cells.entry((judged.verdict, &item.tactic, &item.domain)).or_default() += 1;
    }
    // A cell gives less than the others only when it has no more.
    let most = cells.values().max().copied().expect("cells");
    for (cell, count) in &cells {
        let of_cell = |r: &&ProbeRecord| {
            let clear = r.judged().filter(|j| !j.ambiguous).map(|j| (j.verdict, r.tactic.as_str(), r.domain.as_str()));
            clear == Some(*cell)
        };
        let has = records.iter().filter(of_cell).count();
        assert!(*count + 1 >= most.min(has), "{cell:?} gives {count} of {has}, another {most}");
    }
    assert!(cells.len() > 20, "{cells:?}");
    assert!(select_failures(&records, Sense::Threshold, 10_000, 7).len() > 400, "a large request takes all there are");
}
