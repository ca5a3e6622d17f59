//! A sequence's reward, log-probability and answer have the same bits at any `--batch-tokens`, in any order and company: whole
//! models of the suite. (Each operation: `tests/ops`.)

use std::path::Path;

use ares::backend::Cpu;
use ares::model::pretrained::{ModelSpec, Pretrained};
use ares::model::{AdapterInit, Answer, Ask, Decoding, Version};
use ares::text::Prompt;

/// A model of the suite with a random adapter, so that both halves of every product count.
fn pretrained(name: &str, batch_tokens: usize) -> Pretrained<Cpu> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
    let mut model =
        Pretrained::open(&Cpu::new(), &ModelSpec { dir, adapter: None }, batch_tokens, Default::default()).unwrap();
    model.adapter = Some(model.transformer.new_adapter(4, 1.0, AdapterInit::Random { seed: 3 }).unwrap());
    model
}

/// Prompts of one to nineteen words; every third stands twice in a row, so that neighbours share it.
fn prompts() -> Vec<Prompt> {
    let words = ["tell", "me", "how", "the", "old", "garden", "gate", "was", "painted", "blue"];
    let text = |i: usize| (0..1 + i * 7 % 19).map(|w| words[(i + w * 3) % words.len()]).collect::<Vec<_>>().join(" ");
    (0..30).flat_map(|i| vec![Prompt::user(text(i)); 1 + usize::from(i % 3 == 0)]).collect()
}

const ANSWERS: [&str; 4] = [
    "no",
    "first open the gate, then walk on",
    "I cannot help with that.",
    "yes, of course: take the old key and turn it twice",
];

/// Orders and companies of `count` rows: all, reversed, some, one.
fn companies(count: usize) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..count).collect();
    vec![all.iter().rev().copied().collect(), all.iter().step_by(7).copied().collect(), vec![count - 1], vec![0], all]
}

/// `run` gives one result per named row; it must be the row's own at any number of tokens per batch.
fn assert_alone<T: PartialEq + std::fmt::Debug>(
    name: &str,
    count: usize,
    run: impl Fn(&mut Pretrained<Cpu>, &[usize]) -> Vec<T>,
) {
    let expected = run(&mut pretrained(name, 8192), &(0..count).collect::<Vec<_>>());
    for batch_tokens in [1, 100, 700] {
        let mut model = pretrained(name, batch_tokens);
        for rows in companies(count) {
            for (found, row) in run(&mut model, &rows).iter().zip(&rows) {
                assert_eq!(found, &expected[*row], "{name}: row {row} of {} at {batch_tokens} tokens", rows.len());
            }
        }
    }
}

#[test]
fn rewards_and_log_probabilities() {
    let prompts = prompts();
    let row = |i: &usize| (&prompts[*i], ANSWERS[i % ANSWERS.len()]);
    for version in [Version::Start, Version::Current] {
        assert_alone("framing/reward", prompts.len(), |model, rows| {
            let rewards = model.rewards(version, &rows.iter().map(row).collect::<Vec<_>>()).unwrap();
            rewards.into_iter().map(|r| r.unwrap().to_bits()).collect()
        });
        assert_alone("framing/policy", prompts.len(), |model, rows| {
            let rendered = rows.iter().map(row).map(|(p, a)| model.rendering.with_answer(p, a)).collect();
            let sums = model.logprob_sums(version, rendered).unwrap();
            sums.into_iter().map(|s| s.map(|(sum, n)| (sum.to_bits(), n)).unwrap()).collect()
        });
    }
}

#[test]
fn answers() {
    let prompts = prompts();
    let sampled = Decoding { temperature: 1.0, top_k: 40, top_p: 0.95, seed: 5, ..Decoding::greedy(12) };
    for decoding in [Decoding::greedy(12), sampled] {
        // More sequences than slots, so that finished ones are replaced while others run.
        assert_alone("framing/policy", 2 * prompts.len(), |model, rows| {
            let asks: Vec<Ask> = rows.iter().map(|i| Ask::new(prompts[i % prompts.len()].clone(), *i as u64)).collect();
            let answers = model.generate(Version::Current, &asks, &decoding).unwrap();
            answers.into_iter().map(|a| a.map(|Answer { tokens, finish, .. }| (tokens, finish)).unwrap()).collect()
        });
    }
}
