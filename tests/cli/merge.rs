//! `merge`: an adapter put into its base is the model that the two were together.

use std::fs;

use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::support::{Folder, ares, ares_with, golden, lines, model};

/// Of each head, one base in f32, one in shards and one in half precision; against what transformers and PEFT make of the adapter.
#[test]
fn a_merged_model_is_its_base_with_the_adapter() {
    for (name, command, dtype) in [
        ("llama3-causal", "logprob --per-token --model", "base"),
        ("llama3-reward", "score --reward", "base"),
        ("qwen2-causal", "logprob --per-token --model", "base"),
        ("qwen3-reward", "score --reward", "f32"),
    ] {
        let (folder, golden) = (model(name), golden(name));
        let line = format!("merge {folder}+tests/golden/{name}/adapter --out {folder}/merged --dtype {dtype}");
        ares(&line).expect(0, &["tensors of"]);
        let row = |s: &Value| json!({"tokens": s["tokens"], "prompt_tokens": s["prompt_tokens"]});
        let asked: Vec<Value> = golden["sequences"].as_array().unwrap().iter().map(row).collect();
        let found = ares_with(&format!("{command} {folder}/merged"), &lines(&asked)).expect(0, &[]).rows();
        let mut compared = 0;
        for (found, expected) in found.iter().zip(golden["adapted"].as_array().unwrap()) {
            let (found, expected) = match expected["reward"].as_array() {
                Some(reward) => (vec![found["reward"].clone()], reward.clone()),
                None => {
                    (found["logprobs"].as_array().unwrap().clone(), expected["logprobs"].as_array().unwrap().clone())
                }
            };
            for (found, expected) in found.iter().zip(&expected) {
                let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
                assert!((found - expected).abs() <= 1e-4, "{name}: found {found}, transformers has {expected}");
                compared += 1;
            }
        }
        assert!(compared >= asked.len(), "{name}");
        let index = |place: &str| folder.at(place).join("model.safetensors.index.json").exists();
        assert_eq!(index("merged"), index("."), "{name}");
    }
}

#[test]
fn rounding_is_to_the_nearest_and_the_config_says_the_type() {
    let folder = model("llama3-causal");
    let merged = |dtype: &str| {
        let line =
            format!("merge {folder}+tests/golden/llama3-causal/adapter --out {folder}/{dtype} --dtype {dtype} --json");
        let said = ares(&line).expect(0, &[]).json();
        assert!(said["changed"].as_u64().unwrap() > 0 && said["changed"].as_u64() < said["tensors"].as_u64(), "{said}");
        fs::read(folder.at(dtype).join("model.safetensors")).unwrap()
    };
    let (whole, rounded) = (merged("f32"), merged("bf16"));
    let (whole, rounded) = (SafeTensors::deserialize(&whole).unwrap(), SafeTensors::deserialize(&rounded).unwrap());
    assert_eq!(whole.len(), rounded.len());
    for (name, tensor) in whole.tensors() {
        let half = rounded.tensor(&name).unwrap();
        assert_eq!((tensor.dtype(), half.dtype(), tensor.shape()), (Dtype::F32, Dtype::BF16, half.shape()));
        let nearest = tensor.data().chunks_exact(4).map(|b| bf16::from_f32(f32::from_le_bytes(b.try_into().unwrap())));
        assert!(nearest.flat_map(bf16::to_le_bytes).eq(half.data().iter().copied()), "{name}");
    }
    let config: Value = serde_json::from_str(&folder.read("bf16/config.json")).unwrap();
    assert_eq!(config["dtype"].as_str().or(config["torch_dtype"].as_str()), Some("bfloat16"));
    assert_eq!(folder.read("bf16/tokenizer.json"), folder.read("tokenizer.json"));
}

#[test]
fn what_cannot_be_merged_is_refused_and_leaves_nothing() {
    let (folder, other) = (model("llama-causal"), model("llama3-causal"));
    let adapter = "tests/golden/llama-causal/adapter";
    for (line, code, said) in [
        (format!("merge {folder} --out {folder}/x"), 2, "found a folder without an adapter"),
        (format!("merge {other}+{adapter} --out {folder}/x"), 1, "adapter_model.safetensors"),
        (format!("merge {folder}+{adapter} --out {folder}"), 2, "expected the name of a new folder"),
        (format!("merge {folder}+{adapter} --out {folder}/x --measure a.jsonl"), 2, "expected --reward and --judge"),
        (
            format!("merge {folder}+{adapter} --out {folder}/x --measure a.jsonl --policy {folder}"),
            2,
            "--policy: expected none",
        ),
    ] {
        let before = folder.count();
        ares(&line).expect(code, &[said]);
        assert_eq!(folder.count(), before, "{line}");
    }
    // What half precision does not hold is said by name.
    let small: Folder = model("mistral-reward");
    let adapter = small.at("adapter");
    fs::create_dir(&adapter).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(format!("tests/golden/mistral-reward/adapter/{file}"), adapter.join(file)).unwrap();
    }
    let config: Value = serde_json::from_str(&small.read("adapter/adapter_config.json")).unwrap();
    let mut large = config.clone();
    large["lora_alpha"] = json!(1e9);
    small.write("adapter/adapter_config.json", large.to_string());
    ares(&format!("merge {small}+{small}/adapter --out {small}/x"))
        .expect(1, &["merged: expected", "--dtype f32 or bf16"]);
    assert!(!small.at("x").exists());
}
