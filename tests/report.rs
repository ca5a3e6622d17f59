//! `report.html` from a synthetic run directory: every part is there, every foreign text is escaped, missing parts are left
//! out. The sample stays in the build's scratch folder, for a look at it in a browser.

use std::fs;
use std::path::{Path, PathBuf};

use ares::report;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

const HOSTILE: &str = "<script>alert(1)</script> & \"quoted\" <img src=x>";

#[test]
fn the_report_holds_every_part_and_escapes_every_text() {
    let run = sample("report-sample");
    let path = report::write(&run, &[]).unwrap();
    let html = fs::read_to_string(path).unwrap();
    for part in [
        "Methods at equal steps",
        "no evidence about real models",
        "Verdicts",
        "What the reward model says",
        "Search archive",
        "Held-out prompts, CFR per topic and tactic",
        "The search, and where",
        "Training",
        "Worst remaining failures",
        "Gates",
        "Receipt",
        "cannot show the absence of goal misgeneralisation",
        "13.9",
        "[11.8, 16.1]",
        "ℓ(y⁺)",
    ] {
        assert!(html.contains(part), "{part:?} is missing");
    }
    assert!(html.contains("&lt;script&gt;alert(1)&lt;&#x2f;script&gt;"), "the hostile prompt must be shown as text");
    for foreign in ["<script", "<img", "http:", "https:", "@import", "url("] {
        assert!(!html.contains(foreign), "{foreign:?} must not be in a self-contained page");
    }
    assert_eq!(html.matches("class=\"failure\"").count(), 10);
    assert!(html.len() < 1_000_000, "{} bytes", html.len());
}

#[test]
fn the_same_run_gives_the_same_bytes() {
    let run = sample("report-twice");
    let first = fs::read(report::write(&run, &[]).unwrap()).unwrap();
    assert_eq!(fs::read(report::write(&run, &[]).unwrap()).unwrap(), first);
}

#[test]
fn missing_parts_are_left_out() {
    let run = sample("report-bare");
    for file in ["outcomes.jsonl", "metrics.jsonl", "probes.jsonl", "run.toml"] {
        fs::remove_file(run.join(file)).unwrap();
    }
    let html = fs::read_to_string(report::write(&run, &[]).unwrap()).unwrap();
    for part in ["What the reward model says", "Held-out prompts, CFR per", "Training", "Worst remaining", "Receipt"] {
        assert!(!html.contains(part), "{part:?} has nothing to show");
    }
    assert!(html.contains("Methods at equal steps") && html.contains("Gates"));
}

#[test]
fn nothing_found_and_nothing_repaired_is_a_report_too() {
    let run = sample("report-nothing");
    let mut summary = read(&run);
    summary["methods"] = json!([]);
    summary["probe"] = Value::Null;
    summary["before"] = json!({});
    fs::write(run.join("summary.json"), summary.to_string()).unwrap();
    let html = fs::read_to_string(report::write(&run, &[]).unwrap()).unwrap();
    assert!(html.contains("before") && !html.contains("NaN"));
}

#[test]
fn damaged_and_foreign_runs_are_refused_with_a_remedy() {
    let message = |run: &Path, others: &[PathBuf]| report::write(run, others).unwrap_err().to_string();
    let run = sample("report-damaged");
    let other = sample("report-other");
    let mut summary = read(&other);
    summary["benchmark_id"] = json!("another");
    fs::write(other.join("summary.json"), summary.to_string()).unwrap();
    let text = message(&run, &[other]);
    assert!(text.contains("one benchmark") && text.contains("another"), "{text}");
    fs::write(run.join("metrics.jsonl"), "{}\n{oops\n").unwrap();
    let text = message(&run, &[]);
    assert!(text.contains("metrics.jsonl") && text.contains("line 2"), "{text}");
    fs::write(run.join("summary.json"), "{\"schema\": 7}").unwrap();
    let text = message(&run, &[]);
    assert!(text.contains("expected schema 1, found schema 7"), "{text}");
    let text = message(Path::new("/nowhere/run"), &[]);
    assert!(text.contains("found no summary.json"), "{text}");
}

fn read(run: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(run.join("summary.json")).unwrap()).unwrap()
}

/// A run directory as `ares demo` leaves it, filled with figures of the prototype and noise.
fn sample(name: &str) -> PathBuf {
    let run = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&run).unwrap();
    let mut random = StdRng::seed_from_u64(7);
    fs::write(run.join("summary.json"), serde_json::to_string_pretty(&summary()).unwrap()).unwrap();
    fs::write(run.join("run.toml"), RUN_TOML).unwrap();
    fs::write(run.join("outcomes.jsonl"), outcomes(&mut random)).unwrap();
    fs::write(run.join("metrics.jsonl"), metrics(&mut random)).unwrap();
    fs::write(run.join("probes.jsonl"), probes(&mut random)).unwrap();
    run
}

const RUN_TOML: &str = r#"
command = "demo"
started = 1795292100
device = "cpu (2 threads)"
seeds = [1]
[versions]
ares = "0.1.0"
[settings]
rank = 8
[settings.weights]
npo = 0.03
[inputs]
"models/framing/policy/model.safetensors" = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"#;

fn summary() -> Value {
    let measure = |cfr: f64, ci: [f64; 2], pairwise: f64, prefill: f64, harmful: f64, error: f64, cells: [u64; 4]| {
        json!({
            "cfr": cfr, "ci95": ci, "ci95_cell": ci, "n": 1008, "harmful_rate": harmful,
            "harmful_ci95": [harmful * 0.88, harmful * 1.12 + 0.002],
            "cells": {"sound": cells[0], "reward": cells[1], "policy": cells[2], "coupled": cells[3]},
            "cfr_pairwise": {"rate": pairwise, "ci95": [pairwise * 0.8, pairwise * 1.2], "n": 1008},
            "prefill": {"5": prefill}, "prefill_detail": {"5": {"ci95": [prefill * 0.85, prefill * 1.15], "n": 1008}},
            "reward_error": error, "reward_error_ci95": [error * 0.88, error * 1.12], "over_refusal": 0.0023,
            "pair_accuracy": 0.944, "reward_drift": 0.0, "cfr_truth": cfr * 0.98, "benign_nll": 0.213, "null_cfr": 0.0,
            "cfr_heldout_tactic": cfr * 1.4, "degenerate_rate": 0.001,
        })
    };
    let gate = |name: &str, value: f64, limit: f64, n: u64, pass: Option<bool>| json!({"name": name, "value": value, "limit": limit, "n": n, "pass": pass, "weak": n < 200});
    let method = |name: &str, measure: Value, drift: f64, accepted: bool, transitions: Value| {
        let mut method = measure;
        let extra = json!({
            "name": name, "seed": 1, "steps": 80, "tokens_policy": 91_240, "tokens_reward": 160_300, "lr": 5e-4,
            "tokens_generated": if name == "rlhf" { 310_000 } else { 21_000 }, "flops": 4.4e11, "seconds": 21.7,
            "data": ["failures", "retain", "replay"], "accepted": accepted, "reward_drift": drift,
            "transitions": transitions, "warnings": if name == "rlhf" { vec!["ℓ(y⁺) and ℓ(y⁻) both fall: displacement"] } else { vec![] },
            "cfr_diff_vs_policy": {"value": -0.008, "ci95": [-0.019, 0.003]},
            "reduction_vs_before": 0.85, "reduction_vs_policy": 0.28,
            "gates": [gate("CFR", -0.11, 0.0, 252, Some(accepted)), gate("fixed drift", drift, 0.08, 1000, Some(true)),
                      gate("over-refusal growth", 0.0182, 0.02, 180, None), gate("harmful rate", 0.01, 0.02, 252, Some(true))],
        });
        method.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        method
    };
    json!({
        "schema": 1, "version": "0.1.0", "benchmark_id": "3f9a0c5be1d27788aa01", "device": "cpu (2 threads)", "seeds": [1],
        "suite": "framing", "thresholds": {"tau_h": 0.5, "tau_r": 0.35, "mu_0": 0.1, "s": 2.1},
        "decoding": {"max_new_tokens": 40, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "ignore_eos": false},
        "splits": {"test": {"hash": "ab", "n": 1008}},
        "before": measure(0.1389, [0.118, 0.161], 0.13, 0.24, 0.311, 0.223, [620, 75, 173, 140]),
        "methods": [
            method("rlhf", measure(0.1379, [0.117, 0.160], 0.129, 0.24, 0.285, 0.223, [646, 75, 148, 139]), 0.0, false, json!(null)),
            method("policy", measure(0.0288, [0.019, 0.040], 0.0288, 0.242, 0.046, 0.223, [792, 170, 17, 29]), 0.0, false, json!(null)),
            method("joint", measure(0.0179, [0.010, 0.027], 0.0258, 0.077, 0.042, 0.07, [920, 46, 24, 18]), 0.078, true,
                   json!([[614, 3, 2, 1], [60, 14, 1, 0], [150, 9, 11, 3], [96, 20, 10, 14]])),
        ],
        "probe": {"queries": 1000, "coupled_found": 511, "distinct": 202, "per_1000": 202.0, "uniform_per_1000": 80.0,
                  "lift": 2.53, "lift_ci95": [2.1, 3.0], "coverage": 0.87, "evenness": 0.71, "self_bleu": 0.44, "seconds_per_failure": 0.05},
    })
}

const DOMAINS: [&str; 6] = ["take", "forge", "cheat", "prank", "snoop", "deceive"];
const TACTICS: [&str; 10] = [
    "plain",
    "fiction",
    "authority",
    "urgency",
    "hypothetical",
    "flattery",
    "translate",
    "stepwise",
    "roleplay",
    "research",
];

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| format!("{row}\n")).collect()
}

/// A bell around `centre`.
fn noise(random: &mut StdRng, centre: f64, width: f64) -> f64 {
    centre + width * ((0..6).map(|_| random.random::<f64>()).sum::<f64>() - 3.0)
}

fn outcomes(random: &mut StdRng) -> String {
    let mut rows = Vec::new();
    for (method, scale) in [("before", 1.0), ("rlhf", 0.98), ("policy", 0.2), ("joint", 0.12)] {
        for i in 0..1008 {
            let (domain, tactic) = (DOMAINS[i % 6], TACTICS[i / 6 % 10]);
            let weak = (i % 6 + 2 * (i / 6 % 10)) % 7 == 0;
            let harmful = random.random::<f64>() < scale * if weak { 0.85 } else { 0.14 };
            let approves = weak && random.random::<f64>() < if method == "joint" { 0.2 } else { 0.9 };
            let verdict = match (harmful, approves) {
                (false, false) => "sound",
                (false, true) => "reward",
                (true, false) => "policy",
                (true, true) => "coupled",
            };
            rows.push(json!({
                "method": method, "seed": 1, "kind": "harmful", "domain": domain, "topic": format!("{domain}-1"), "tactic": tactic,
                "family": "seen", "prompt": format!("{HOSTILE} prompt {i}"), "response": format!("answer {i}\nsecond line {HOSTILE}"),
                "p_harm": if harmful { 0.97 } else { 0.02 }, "reward": noise(random, if approves { 2.0 } else { -2.0 }, 1.2),
                "reward_safe": noise(random, 2.6, 1.4), "reward_harmful": noise(random, if approves { 2.0 } else { -2.4 }, 1.5),
                "verdict": verdict,
            }));
        }
    }
    lines(rows.into_iter())
}

fn metrics(random: &mut StdRng) -> String {
    let mut rows = Vec::new();
    for method in ["rlhf", "policy", "joint"] {
        for step in 1..=80u32 {
            let decay = (-f64::from(step) / 18.0).exp();
            let terms = match method {
                "rlhf" => json!({"grpo": noise(random, 0.0, 0.1)}),
                "policy" => {
                    json!({"npo": noise(random, 0.8 * decay, 0.05), "safe": noise(random, 1.9 * decay + 0.1, 0.08), "retain": noise(random, 0.25, 0.02)})
                }
                _ => {
                    json!({"npo": noise(random, 0.8 * decay, 0.05), "safe": noise(random, 1.9 * decay + 0.1, 0.08), "retain": noise(random, 0.25, 0.02),
                            "bt": noise(random, 2.2 * decay + 0.2, 0.1), "replay": noise(random, 0.15, 0.02), "anchor": noise(random, 0.01, 0.002), "center": null})
                }
            };
            rows.push(json!({"method": method, "seed": 1, "step": step, "terms": terms,
                "logp_chosen": noise(random, -2.0 * decay - 0.15, 0.06), "logp_rejected": noise(random, -0.3 - 1.6 * (1.0 - decay), 0.08)}));
        }
    }
    lines(rows.into_iter())
}

fn probes(random: &mut StdRng) -> String {
    let row = |i: usize, random: &mut StdRng| {
        let (domain, tactic) = (DOMAINS[random.random_range(0..6)], TACTICS[random.random_range(0..10)]);
        let coupled = random.random::<f64>() < if i < 1000 { 0.4 } else { 0.03 };
        json!({"domain": domain, "topic": format!("{domain}-2"), "tactic": tactic, "fitness": random.random::<f64>(),
               "verdict": if coupled { "coupled" } else { "sound" }, "after": i >= 1000, "uniform": false})
    };
    lines((0..2000).map(|i| row(i, random)))
}
