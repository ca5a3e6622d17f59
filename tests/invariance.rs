//! What the program says of a row has the same bits at any `--batch-tokens`, in any order and company: rewards, log-probabilities
//! and answers of whole models. (Each operation: `tests/ops`.)

#[path = "cli/support.rs"]
#[allow(dead_code)]
mod support;

use serde_json::{Value, json};
use support::{ares_with, lines, model};

/// Prompts of one to nineteen words; every third stands twice in a row, so that neighbours share it.
fn asked() -> Vec<Value> {
    let text =
        |i: usize| (0..1 + i * 7 % 19).map(|w| format!("w{}", 12 + (i + w * 3) % 40)).collect::<Vec<_>>().join(" ");
    let prompts = (0..60).flat_map(|i| vec![text(i); 1 + usize::from(i % 3 == 0)]);
    let answers = ["w20", "w21 w22 w23 w24 w25 w26 w27", "w30 w31 w32", "w33 w34 w35 w36 w37 w38 w39 w40 w41 w42 w43"];
    prompts.enumerate().map(|(i, p)| json!({"id": format!("r{i}"), "prompt": p, "response": answers[i % 4]})).collect()
}

/// What `line` says of every row, told again of the rows reversed, some of them, and one.
fn alone(line: &str) -> Vec<Value> {
    let asked = asked();
    let told = |batch_tokens: usize, order: &[usize]| -> Vec<Value> {
        let input: Vec<Value> = order.iter().map(|i| asked[*i].clone()).collect();
        ares_with(&format!("{line} --batch-tokens {batch_tokens}"), &lines(&input)).expect(0, &[]).rows()
    };
    let all: Vec<usize> = (0..asked.len()).collect();
    let expected = told(8192, &all);
    let orders =
        [all.iter().rev().copied().collect(), all.iter().step_by(7).copied().collect(), vec![all.len() - 1], all];
    for (batch_tokens, order) in [1, 100, 700].into_iter().flat_map(|tokens| orders.iter().map(move |o| (tokens, o))) {
        for (found, row) in told(batch_tokens, order).iter().zip(order) {
            assert_eq!(found, &expected[*row], "{line}: row {row} of {} at {batch_tokens} tokens", order.len());
        }
    }
    expected
}

/// Each model and a command's name for it: of the suite without an adapter, and a random one with its adapter.
fn models(kind: &str) -> [(String, Option<support::Folder>); 2] {
    let (suite, golden) = if kind == "reward" { ("reward", "qwen3-reward") } else { ("policy", "qwen3-causal") };
    let folder = model(golden);
    [(format!("models/framing/{suite}"), None), (format!("{folder}+tests/golden/{golden}/adapter"), Some(folder))]
}

#[test]
fn rewards_and_log_probabilities() {
    for (spec, _folder) in models("reward") {
        assert!(alone(&format!("score --reward {spec}")).iter().all(|row| row["reward"].is_number()));
    }
    for (spec, _folder) in models("policy") {
        assert!(alone(&format!("logprob --model {spec}")).iter().all(|row| row["logprob"].is_number()));
    }
}

/// More sequences than slots, so that finished ones are replaced while others run.
#[test]
fn answers() {
    for (spec, _folder) in models("policy") {
        let generate = |more: &str| alone(&format!("generate --model {spec} --max-new-tokens 12 {more}"));
        let sampled = generate("--seed 7 --top-k 40 --top-p 0.95");
        assert_ne!(sampled, generate("--seed 8 --top-k 40 --top-p 0.95"));
        for row in sampled.iter().chain(&generate("--greedy")) {
            let tokens = row["tokens_out"].as_array().unwrap();
            assert!(row["response"].is_string() && !tokens.is_empty(), "{row}");
            assert!(row["finish"] == "stop" || (row["finish"] == "length" && tokens.len() == 12), "{row}");
        }
    }
}
