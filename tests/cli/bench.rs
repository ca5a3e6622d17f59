//! `ares bench`: what it prints, and what bad input is told.

use serde_json::Value;

use super::support::{Outcome, ares, repository};

/// A small pair of models, and work that takes no time.
fn bench(words: &[&str]) -> Outcome {
    let (policy, reward) = (repository("tests/golden/qwen2-causal"), repository("tests/golden/qwen2-reward"));
    let models = ["--policy", policy.to_str().unwrap(), "--reward", reward.to_str().unwrap()];
    let work = ["--tokens", "48", "--length", "16", "--rank", "4", "--sequences", "2", "--new-tokens", "3"];
    let little = ["--batch-tokens", "64", "--warmup", "0", "--repeats", "2"];
    ares(&[&["bench"], words, &models, &work, &little].concat())
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| value > 0.0 && value.is_finite())
}

#[test]
fn tasks_are_held_against_the_matrix_rate_of_the_cpu() {
    let found = bench(&["--device", "cpu", "--json"]).expect(0, &[]).json();
    let ceilings = &found["ceilings"];
    assert!(positive(&ceilings["matrix_flops_per_s"]) && positive(&ceilings["copy_bytes_per_s"]), "{found}");
    let tasks = found["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 3);
    for task in tasks {
        let number = |name: &str| task[name].as_f64().unwrap_or_else(|| panic!("{name}: {task}"));
        let floor = 1e3 * number("flops") / ceilings["matrix_flops_per_s"].as_f64().unwrap();
        assert!((number("floor_ms") / floor - 1.0).abs() <= 1e-9, "{task}");
        let share = number("floor_ms") / (1e3 * task["seconds"]["median"].as_f64().unwrap());
        assert!((number("share_of_floor") / share - 1.0).abs() <= 1e-9, "{task}");
    }
    let table = bench(&["score", "--device", "cpu"]).expect(0, &[]).stdout;
    assert!(table.contains("of floor %"), "{table}");
}

#[test]
fn the_simulator_counts_work_and_makes_up_no_share() {
    let Some(found) = on_the_simulator(&["score", "decode", "step"]) else { return };
    assert!(found["ceilings"].is_null(), "{found}");
    for task in found["tasks"].as_array().unwrap() {
        assert!(task["floor_ms"].is_null() && task["share_of_floor"].is_null(), "{task}");
        let kernels = task["kernels"].as_array().unwrap();
        let flops_of = |names: &[&str]| -> u64 {
            let named = kernels.iter().filter(|k| names.contains(&k["kernel"].as_str().unwrap()));
            named.map(|k| k["flops"].as_u64().unwrap()).sum()
        };
        // Their work depends on nothing that a model has, or is known to nobody.
        let uncounted = ["gradient_norm", "advance", "decode_combine"];
        for kernel in kernels {
            assert!(kernel["floor_ms"].is_null() && kernel["share_of_floor"].is_null(), "{kernel}");
            let bytes = kernel["bytes"].as_u64().unwrap();
            assert_eq!(bytes == 0, uncounted.contains(&kernel["kernel"].as_str().unwrap()), "{kernel}");
        }
        let products = ["product", "lora_partial", "lm_head_logits"];
        let attention =
            ["attention_forward", "attention_backward_queries", "attention_backward_keys", "decode_attention"];
        let (of_products, of_attention) = (flops_of(&products), flops_of(&attention));
        assert!(of_products > 0 && of_attention > 0, "{task}");
        let flops = task["flops"].as_u64().unwrap();
        match task["task"].as_str().unwrap() {
            // The model counts an answer as if it had been read at once: a prompt's last logits are beside that.
            "decode" => assert!((of_products + of_attention).abs_diff(flops) * 10 <= flops, "{task}"),
            // The model counts its products and its attention; so do the kernels, each by itself.
            _ => assert_eq!(of_products + of_attention, flops, "{task}"),
        }
    }
}

/// `None` where there is no C++ compiler.
fn on_the_simulator(words: &[&str]) -> Option<Value> {
    let outcome = bench(&[words, &["--device", "sim", "--json"]].concat());
    if outcome.code == Some(1) && outcome.stderr.contains("C++ compiler") {
        println!("skipped: {}", outcome.stderr);
        return None;
    }
    Some(outcome.expect(0, &[]).json())
}

#[test]
fn bad_models_are_told_what_may_be_given() {
    bench(&["--layers", "1"])
        .expect(2, &["--layers 1", "expected a config.json", "qwen2-causal", "leave out --layers"]);
    let nowhere = ["bench", "--policy", "/nowhere/model", "--reward", "/nowhere/model"];
    ares(&nowhere).expect(2, &["/nowhere/model", "expected a model's folder", "found nothing"]);
    let file = repository("README.md");
    let file = ["bench", "--policy", file.to_str().unwrap(), "--reward", "/nowhere"];
    ares(&file).expect(2, &["README.md", "expected a model's folder", "found another file"]);
    let config = ["bench", "--policy", "/nowhere/config.json", "--reward", "/nowhere/config.json"];
    ares(&config).expect(1, &["/nowhere/config.json"]);
    bench(&["--repeats", "0"]).expect(2, &["--repeats"]);
}
