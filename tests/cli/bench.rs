//! `ares bench`: what it prints, and what bad input gets.

use serde_json::Value;

use super::support::{Folder, ares};

/// A small pair of models.
pub const MODELS: &str = "--policy tests/golden/qwen2-causal --reward tests/golden/qwen2-reward";
/// Work that takes no time.
const LITTLE: &str =
    "--tokens 48 --length 16 --rank 8 --sequences 2 --new-tokens 11 --batch-tokens 64 --warmup 0 --repeats 2";

/// The figures and the table of `words` on the CPU.
fn on_the_cpu(words: &str) -> (Value, String) {
    let line = format!("bench {words} --device cpu {MODELS} {LITTLE}");
    (ares(&format!("{line} --json")).expect(0, &[]).json(), ares(&line).expect(0, &[]).stdout)
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| value > 0.0 && value.is_finite())
}

#[test]
fn tasks_are_held_against_the_matrix_rate_of_the_cpu() {
    let (found, table) = on_the_cpu("");
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
    assert!(table.contains("of floor %"), "{table}");
}

#[test]
fn the_simulator_counts_work_and_makes_up_no_share() {
    let Some(found) = on_the_simulator("score decode generate step") else { return };
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
            "decode" | "generate" => assert!((of_products + of_attention).abs_diff(flops) * 10 <= flops, "{task}"),
            // The model counts its products and its attention; so do the kernels, each by itself.
            _ => assert_eq!(of_products + of_attention, flops, "{task}"),
        }
    }
}

/// `None` where there is no C++ compiler.
fn on_the_simulator(words: &str) -> Option<Value> {
    let outcome = ares(&format!("bench {words} --device sim --json {MODELS} {LITTLE}"));
    if outcome.code == Some(1) && outcome.stderr.contains("C++ compiler") {
        assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{}", outcome.stderr);
        println!("skipped: {}", outcome.stderr);
        return None;
    }
    Some(outcome.expect(0, &[]).json())
}

#[test]
fn every_operation_is_timed_alone() {
    let (found, table) = on_the_cpu("ops");
    assert_eq!(found["tasks"], Value::Array(Vec::new()));
    let ops = found["ops"].as_array().unwrap();
    let names: Vec<&str> = ops.iter().map(|op| op["op"].as_str().unwrap()).collect();
    for folder in std::fs::read_dir("src/ops").unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir())
    {
        let op = folder.file_name().unwrap().to_str().unwrap();
        // A copy, what measures the device, and parts of other operations.
        if ["rows", "ceilings", "lora", "product"].contains(&op) {
            continue;
        }
        let backward = std::fs::read_to_string(folder.join("mod.rs")).unwrap().contains("_backward(");
        let timed = names.iter().filter(|name| name.starts_with(op)).any(|name| !backward || name.contains("backward"));
        assert!(timed || names.contains(&format!("{op}, both ways").as_str()), "{op} is not timed: {names:?}");
    }
    for op in ops {
        for field in ["bytes", "bytes_per_second", "floor_ms", "share_of_floor"] {
            assert!(positive(&op[field]), "{field}: {op}");
        }
        let rate = op["flops"].as_f64().unwrap() / op["seconds"]["median"].as_f64().unwrap();
        assert!((op["flops_per_second"].as_f64().unwrap() - rate).abs() <= 1e-9 * rate, "{op}");
        assert_eq!(op["seconds"]["repeats"], 2);
    }
    assert!(names.iter().all(|op| table.contains(op)) && table.contains("of floor %"), "{table}");
}

/// What an operation must do at least is never more than what its kernels do; but for what is recomputed, no less either.
#[test]
fn operations_on_the_simulator_are_the_sums_of_their_kernels() {
    let Some(found) = on_the_simulator("ops") else { return };
    for op in found["ops"].as_array().unwrap() {
        assert!(op["floor_ms"].is_null() && op["share_of_floor"].is_null(), "{op}");
        let kernels = op["kernels"].as_array().unwrap();
        let flops: u64 = kernels.iter().map(|kernel| kernel["flops"].as_u64().unwrap()).sum();
        let expected = op["flops"].as_u64().unwrap();
        assert!(!kernels.is_empty() && flops.abs_diff(expected) * 20 <= expected.max(flops), "{flops}: {op}");
    }
}

#[test]
fn a_trace_has_a_row_per_task_and_operation() {
    let folder = Folder::new();
    let Some(_) = on_the_simulator(&format!("score ops --trace {folder}/trace.json")) else { return };
    let trace: Value = serde_json::from_str(&folder.read("trace.json")).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let rows: Vec<&Value> = events.iter().filter(|e| e["ph"] == "M").map(|e| &e["args"]["name"]).collect();
    assert_eq!((rows[0].as_str(), rows[1].as_str()), (Some("score"), Some("embed")));
    for (row, name) in rows.iter().enumerate() {
        let runs = events.iter().filter(|e| e["ph"] == "X" && e["tid"] == row);
        assert!(runs.filter(|e| e["dur"].as_f64().is_some_and(|d| d > 0.0)).count() > 0, "{row}: {name}");
    }
}

#[test]
fn checkpoints_are_opened_and_uploaded() {
    let (found, table) = on_the_cpu("load");
    let load = &found["load"];
    assert!(load["kernels"].is_null() && load.get("kernels").is_some(), "{load}");
    let checkpoints = load["checkpoints"].as_array().unwrap();
    for (checkpoint, (model, files)) in checkpoints.iter().zip([("qwen2-causal", 2), ("qwen2-reward", 1)]) {
        assert!(checkpoint["model"].as_str().unwrap().ends_with(model), "{checkpoint}");
        assert_eq!(checkpoint["files"], files);
        let entries = std::fs::read_dir(format!("tests/golden/{model}")).unwrap().map(Result::unwrap);
        let weights = entries.filter(|e| e.path().extension().is_some_and(|e| e == "safetensors"));
        let weights = weights.filter(|e| e.file_name().to_str().unwrap().starts_with("model"));
        let bytes: u64 = weights.map(|e| e.metadata().unwrap().len()).sum();
        assert_eq!(checkpoint["bytes"], bytes);
        let seconds = |part: &str| checkpoint[part]["median"].as_f64().unwrap();
        assert!(seconds("open_seconds") > 0.0 && seconds("upload_seconds") > 0.0, "{checkpoint}");
        let rate = bytes as f64 / seconds("upload_seconds");
        assert!((checkpoint["upload_bytes_per_second"].as_f64().unwrap() / rate - 1.0).abs() <= 1e-9, "{checkpoint}");
    }
    assert!(table.contains("qwen2-causal") && table.contains("open ms") && !table.contains("kernels"), "{table}");
}

/// Random weights cannot be loaded, but at the shapes of a config they can be run.
#[test]
fn random_weights_are_run_at_the_shapes_of_a_config() {
    let config = "tests/golden/qwen2-causal/config.json";
    let line = format!("bench ops --policy {config} --reward {config} --layers 1 --device cpu {LITTLE} --json");
    let found = ares(&line).expect(0, &[]).json();
    assert!(found["policy"].as_str().unwrap().contains("random weights"), "{found}");
    assert!(found["ops"].as_array().is_some_and(|ops| ops.len() > 20), "{found}");
}

#[test]
fn a_plan_counts_what_the_simulator_launches() {
    let Some(found) = on_the_simulator("score generate step") else { return };
    let line = format!("bench score generate step --plan --device sim {MODELS} {LITTLE} --json");
    let plan = ares(&line).expect(0, &[]).json();
    let kernels = |task: &Value| -> Vec<(String, [u64; 3])> {
        let of = |k: &Value| ["launches", "flops", "bytes"].map(|name| k[name].as_u64().unwrap());
        let named =
            task["kernels"].as_array().unwrap().iter().map(|k| (k["kernel"].as_str().unwrap().to_string(), of(k)));
        let mut all: Vec<_> = named.collect();
        // How much of the cache is read depends on positions, which only a device that computes has.
        all.iter_mut().filter(|(name, _)| name == "decode_attention").for_each(|(_, counted)| counted[1..].fill(0));
        all.sort();
        all
    };
    let plans = plan["plans"].as_array().unwrap();
    assert_eq!(plans.len(), 3);
    for plan in plans {
        let task = found["tasks"].as_array().unwrap().iter().find(|task| task["task"] == plan["task"]).unwrap();
        assert_eq!(kernels(plan), kernels(task), "{}", plan["task"]);
        assert_eq!(plan["tokens"], task["tokens"], "{}", plan["task"]);
        let launches: u64 = kernels(plan).iter().map(|(_, [launches, ..])| launches).sum();
        assert_eq!(plan["launches"].as_u64(), Some(launches), "as many replayed as launched one by one");
        let parts: u64 = plan["parts"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(plan["peak_bytes"].as_u64(), Some(parts));
        let decodes = plan["task"] == "generate";
        assert_eq!(
            (plan["captures"].as_u64(), plan["replays"].as_u64() > Some(0)),
            (Some(u64::from(decodes)), decodes)
        );
    }
}

/// One item of a first token and two answers of fifteen, in either model; sharing, two items of eight and eight.
#[test]
fn unshared_sequences_share_their_first_token_alone() {
    let tokens = |more: &str| {
        let found = ares(&format!("bench step --plan {more} {MODELS} {LITTLE} --json")).expect(0, &[]).json();
        found["plans"][0]["tokens"].as_u64().unwrap()
    };
    assert_eq!((tokens("--unshared"), tokens("")), (2 * 31, 24 + 16 + 2 * 24));
}

#[test]
fn a_plan_that_does_not_fit_says_so() {
    let shape = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}"#;
    let folder = Folder::new();
    folder.write("config.json", shape);
    let config = folder.at("config.json").display().to_string();
    let line = format!("bench step --plan --policy {config} --reward {config} --tokens 64 --length 16 --batch-tokens");
    let much = ares(&format!("{line} 30000000")).expect(0, &[]);
    assert!(much.stderr.contains("do not fit into") && much.stderr.contains("lower --batch-tokens"), "{}", much.stderr);
    assert!(!ares(&format!("{line} 64")).expect(0, &[]).stderr.contains("do not fit"));
    ares("bench ops --plan").expect(2, &["expected step, score, generate or decode", "found ops or load"]);
}

/// Of the suite's models, whose products Hopper's tiles serve.
#[test]
fn products_are_run_by_every_tile_and_predicted_without_a_device() {
    let products = |found: &Value| found["products"].as_array().unwrap().clone();
    let load = "--tokens 96 --rank 8 --warmup 0 --repeats 1 --json";
    let outcome = ares(&format!("bench products --device sim:sm_90a {load}"));
    if outcome.code == Some(1) && outcome.stderr.contains("C++ compiler") {
        assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{}", outcome.stderr);
        return;
    }
    let measured = products(&outcome.expect(0, &[]).json());
    let plan = ares(&format!("bench products --plan --device cpu {load}")).expect(0, &[]).json();
    let predicted = products(&plan);
    assert_eq!((measured.len(), predicted.len()), (8 * 10, 8 * 10));
    for (found, predicted) in measured.iter().zip(&predicted) {
        assert!(positive(&found["seconds"]["median"]), "{found}");
        for name in ["product", "shape", "way", "flops", "planned", "predicted_seconds"] {
            assert_eq!(found[name], predicted[name], "{name}");
        }
        let hopper = found["way"].as_str().unwrap().starts_with("sm_90a");
        assert_eq!(positive(&found["predicted_seconds"]), hopper, "{found}");
    }
    let planned = measured.iter().filter(|found| found["planned"] == true).count();
    assert_eq!(planned, 8 * 2, "one tile of each architecture for each product");
    ares(&format!("bench products --device cpu {load}")).expect(2, &["expected a GPU", "--plan predicts"]);
    ares("bench score --device sim:sm_80 --tier sm_90a")
        .expect(2, &["--tier or ARES_TIER", "found sm_90a on sim:sm_80"]);
}
