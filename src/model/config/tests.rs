use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::model::config::rope::Llama3Scaling;

/// A small config of `class` with `changes` laid over it; a change to null removes nothing, it writes null.
pub(crate) fn tiny(class: &str, changes: Value) -> Result<ModelConfig> {
    let mut config = json!({
        "architectures": [class], "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": 2, "sliding_window": 7,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::parse(Path::new("models/x/config.json"), &config.to_string())
}

/// Two layers of 8 columns with one key/value head, for tests of files with tensors; a classifier has one label.
pub(crate) fn tiny_weights(class: &str) -> ModelConfig {
    let sizes = json!({"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 5, "head_dim": 4, "num_labels": 1});
    tiny(class, sizes).unwrap()
}

fn config(family: &str, changes: Value) -> Result<ModelConfig> {
    tiny(&format!("{family}ForCausalLM"), changes)
}

#[test]
fn both_spellings_of_transformers_say_the_same() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32});
    let old = json!({"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "float16"});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(5e5);
    let new = json!({"rope_parameters": parameters, "dtype": "float16"});
    let (old, new) = (config("Llama", old).unwrap(), config("Llama", new).unwrap());
    assert_eq!(old, new);
    assert_eq!(old.rope.theta, 5e5);
    assert_eq!(old.rope.scaling.as_ref().unwrap().original_max_position, 32);
    assert_eq!(old.dtype.as_deref(), Some("float16"));
}

#[test]
fn families_differ_in_bias_norm_head_and_window() {
    let llama = config("Llama", json!({})).unwrap();
    assert!(!llama.qkv_bias && !llama.qk_norm && llama.window(0).is_none() && llama.head_dim == 8);
    let mistral = config("Mistral", json!({})).unwrap();
    assert_eq!((mistral.window(0), mistral.window(2), mistral.window(3)), (Some(7), Some(7), None));
    assert_eq!(config("Mistral", json!({"sliding_window": null})).unwrap().window(0), None);
    let qwen2 = config("Qwen2", json!({})).unwrap();
    assert!(qwen2.qkv_bias && qwen2.window(2).is_none());
    let windowed = config("Qwen2", json!({"use_sliding_window": true, "max_window_layers": 1})).unwrap();
    assert_eq!([0, 1, 2].map(|layer| windowed.window(layer)), [None, Some(7), Some(7)]);
    let kinds = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let listed = config("Qwen3", json!({"use_sliding_window": true, "layer_types": kinds})).unwrap();
    assert_eq!([0, 1, 2].map(|layer| listed.window(layer)), [Some(7), None, Some(7)]);
    assert!(listed.qk_norm && listed.head_dim == 128, "Qwen3's default head size does not follow from its width");
}

#[test]
fn heads_tell_policy_from_reward_model() {
    let name = json!(["LlamaForSequenceClassification"]);
    let reward = config("Llama", json!({"architectures": name, "id2label": {"0": "LABEL_0"}})).unwrap();
    assert_eq!(reward.head, Head::Classification { labels: 1 });
    assert!(reward.expect_score().is_ok());
    let message = reward.expect_causal().unwrap_err().to_string();
    assert!(message.contains("expected LlamaForCausalLM, found LlamaForSequenceClassification"), "{message}");
    let causal = config("Llama", json!({})).unwrap();
    assert!(causal.expect_causal().is_ok());
    let message = causal.expect_score().unwrap_err().to_string();
    assert!(message.contains("models/x/config.json") && message.contains("found LlamaForCausalLM"), "{message}");
    // Without any word on labels transformers makes two: no reward model.
    let two = config("Llama", json!({"architectures": name})).unwrap();
    assert_eq!(two.head, Head::Classification { labels: 2 });
    assert!(two.expect_score().is_err());
}

#[test]
fn tokens_that_end_a_turn_come_from_both_files() {
    let dir = tempfile::tempdir().unwrap();
    let text = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 1,
        "num_attention_heads": 6, "vocab_size": 101, "max_position_embeddings": 9, "eos_token_id": 2, "pad_token_id": -1});
    std::fs::write(dir.path().join("config.json"), text.to_string()).unwrap();
    let alone = ModelConfig::open(dir.path()).unwrap();
    assert_eq!((alone.eos_token_ids.as_slice(), alone.pad_token_id, alone.kv_heads), ([2].as_slice(), None, 6));
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 2]}"#).unwrap();
    assert_eq!(ModelConfig::open(dir.path()).unwrap().eos_token_ids, [2, 5]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 101}"#).unwrap();
    let message = ModelConfig::open(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("generation_config.json: expected eos_token_id to be below vocab_size (101)"),
        "{message}"
    );
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let rope = |kind: &str| json!({"rope_scaling": {"type": kind, "factor": 2.0}});
    let cases = [
        ("Llama", json!({"hidden_size": 0}), "hidden_size to be a whole number from 1 to 2147483647, found 0"),
        ("Llama", json!({"hidden_size": 1e3}), "hidden_size to be a whole number"),
        ("Llama", json!({"hidden_size": null}), "hidden_size to be a whole number, found no such field"),
        ("Llama", json!({"hidden_size": -48}), "found -48"),
        ("Llama", json!({"hidden_size": 1u64 << 40}), "found 1099511627776"),
        ("Llama", json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers to be at most 10000"),
        ("Llama", json!({"max_position_embeddings": 1 << 30}), "max_position_embeddings to be at most 16777216"),
        ("Llama", json!({"rope_theta": 1e308}), "rope_theta to be a number above 0 that f32 holds"),
        ("Llama", json!({"rope_theta": 1e-308}), "rope_theta to be a number above 0 that f32 holds"),
        (
            "Llama",
            json!({"num_attention_heads": 7}),
            "num_key_value_heads to be a divisor of num_attention_heads (7), found 2",
        ),
        (
            "Qwen2",
            json!({"num_attention_heads": 10}),
            "hidden_size to be a multiple of num_attention_heads (10), found 48",
        ),
        ("Llama", json!({"num_attention_heads": 10, "head_dim": 8}), "hidden_size to be a multiple"),
        ("Llama", json!({"num_attention_heads": 16}), "head_dim to be even, as rotary positions turn pairs, found 3"),
        ("Llama", json!({"hidden_act": "gelu"}), "hidden_act to be `silu`, found `gelu`"),
        ("Llama", json!({"attention_bias": true}), "attention_bias to be false"),
        ("Llama", json!({"mlp_bias": true}), "mlp_bias to be false"),
        ("Llama", json!({"rms_norm_eps": 0}), "rms_norm_eps to be a number above 0"),
        ("Llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor to be 1 (whole heads), found 0.5"),
        ("Llama", json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "rope_parameters.partial_rotary_factor"),
        ("Llama", json!({"rope_parameters": {"full_attention": {}}}), "settings per kind of layer"),
        ("Llama", json!({"rope_scaling": {"rope_type": "llama3"}}), "rope_scaling.factor to be a number"),
        ("Llama", json!({"quantization_config": {"bits": 4}}), "quantization_config to be absent"),
        ("Llama", json!({"eos_token_id": 101}), "eos_token_id to be below vocab_size (101), found 101"),
        ("Llama", json!({"eos_token_id": "</s>"}), "eos_token_id to be a token id"),
        ("Mistral", json!({"sliding_window": 0}), "sliding_window to be a whole number from 1"),
        (
            "Qwen3",
            json!({"use_sliding_window": true, "layer_types": ["full_attention"]}),
            "layer_types to be a list of 3",
        ),
        ("Llama", rope("yarn"), "rope_scaling.type to be `default` or `llama3`, found `yarn`"),
        ("Llama", rope("dynamic"), "found `dynamic`"),
        ("Qwen2", rope("linear"), "found `linear`"),
        ("Gemma2", json!({}), "one of {Llama, Mistral, Qwen2, Qwen3}"),
        ("Qwen2Moe", json!({}), "found Qwen2MoeForCausalLM"),
        ("Llama", json!({"architectures": []}), "found none"),
    ];
    for (family, changes, expected) in cases {
        let found = config(family, changes.clone()).unwrap_err().to_string();
        assert!(found.starts_with("models/x/config.json: expected "), "{changes}: {found}");
        assert!(found.contains(expected), "{changes}: expected `{expected}`, found `{found}`");
    }
}

#[test]
fn what_is_no_config_is_refused() {
    for text in ["", "[]", "{", "nul", "\u{0}", &"[".repeat(100_000)] {
        let found = ModelConfig::parse(Path::new("config.json"), text).unwrap_err().to_string();
        assert!(found.starts_with("config.json: expected a JSON object, found "), "{found}");
    }
    let dir = tempfile::tempdir().unwrap();
    let found = ModelConfig::open(&dir.path().join("none")).unwrap_err().to_string();
    assert!(found.contains("none: expected a model's folder, found nothing"), "{found}");
    let found = ModelConfig::open(dir.path()).unwrap_err().to_string();
    assert!(found.contains("config.json: cannot read"), "{found}");
}

/// Values of transformers 5.23 (`LlamaRotaryEmbedding`): head size 16, Llama-3 scaling of the plain base 10 000.
#[test]
fn inverse_frequencies_are_those_of_transformers() {
    let plain = RopeConfig { theta: 10_000.0, scaling: None };
    let scaling = Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 32 };
    let scaled = RopeConfig { theta: 10_000.0, scaling: Some(scaling) };
    for (rope, expected) in [(plain, PLAIN), (scaled, SCALED)] {
        let found = rope.inv_freq(16);
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found / expected - 1.0).abs() <= 2e-7, "{i}: found {found}, expected {expected}");
        }
    }
}

const PLAIN: [f32; 8] = [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278];
const SCALED: [f32; 8] = [1.0, 0.09583998, 0.0125, 0.0039528473, 0.00125, 0.00039528473, 0.000125, 0.000039528473];
