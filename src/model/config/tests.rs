use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::error::refused;

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

/// Their values are held against torch in tests/golden-heads.
#[test]
fn reward_classes_of_others_are_known_by_name() {
    let read = |class: &str, changes: Value| {
        let config = tiny(class, changes)?;
        Ok((config.labels(), config.skipped_pad(), config.score.normal))
    };
    let class = "LlamaForSequenceClassification";
    assert_eq!(read(class, json!({"pad_token_id": 5})).unwrap(), (2, Some(5), None));
    assert_eq!(read(class, json!({"num_labels": 1})).unwrap(), (1, None, None));
    let told = json!({"model_type": "llama", "pad_token_id": 5, "mean": 0.5, "std": 2.0});
    assert_eq!(read("RewardModel", told).unwrap(), (2, None, Some([0.5, 2.0])));
    let gemma = |changes: Value| {
        let mut all = json!({"hidden_act": "gelu", "num_labels": 1});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        read("GemmaForSequenceClassification", all).unwrap()
    };
    assert_eq!(gemma(json!({})), (1, Some(0), None), "its own default, as transformers has it");
    assert_eq!(gemma(json!({"pad_token_id": null})), (1, None, None));
    let math = json!({"model_type": "qwen2", "pad_token_id": 5, "num_labels": 1});
    assert_eq!(read("Qwen2ForRewardModel", math).unwrap(), (1, Some(5), None));
    let off = json!({"model_type": "qwen3", "mean": 0.5, "std": 2.0, "normalize_reward": false});
    assert_eq!(read("RewardModel", off).unwrap(), (2, None, None));
    refused(read("RewardModel", json!({"mean": 0.5})), "expected model_type to be one of llama, mistral");
    refused(read("RewardModel", json!({"model_type": "llama", "std": 0.0})), "expected std to be a number above 0");
    refused(read("MyRewardModel", json!({"model_type": "llama"})), "or of RewardModel, GRewardModel");
}

#[test]
fn layers_rotate_each_in_its_way() {
    let ropes = |family: &str, changes| {
        let ropes = config(family, changes).unwrap().ropes;
        (ropes.to_string(), ropes.of_layer)
    };
    assert_eq!(ropes("Llama", json!({})), ("θ = 10000".into(), vec![0; 3]));
    let listed = json!({"no_rope_layers": [0, 1, 0]});
    assert_eq!(ropes("SmolLM3", listed), ("θ = 2000000; on some layers none".into(), vec![1, 0, 1]));
    let stretched = json!({"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8}});
    let both = "θ = 1000000, stretched by 8; on some layers θ = 10000";
    assert_eq!(ropes("Gemma3", stretched), (both.into(), vec![1, 1, 0]));
}

/// What the golden checkpoints, each of one setting, do not show.
#[test]
fn windows_and_head_sizes_follow_their_family() {
    let windows = |family: &str, changes| {
        let config = config(family, changes).unwrap();
        [0, 1, 2].map(|layer| config.window(layer))
    };
    assert_eq!(windows("Llama", json!({})), [None; 3]);
    assert_eq!(windows("Gemma2", json!({})), [Some(7), None, Some(7)]);
    assert_eq!(windows("Gemma3", json!({"sliding_window_pattern": 2})), [Some(7), None, Some(7)]);
    assert_eq!(windows("SmolLM3", json!({})), [None; 3]);
    assert_eq!(windows("Mistral", json!({})), [Some(7); 3]);
    assert_eq!(windows("Mistral", json!({"sliding_window": null})), [None; 3]);
    assert_eq!(windows("Qwen2", json!({})), [None; 3]);
    let late = json!({"use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(windows("Qwen2", late), [None, Some(7), Some(7)]);
    let kinds = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let listed = json!({"use_sliding_window": true, "layer_types": kinds});
    assert_eq!(windows("Qwen3", listed), [Some(7), None, Some(7)]);
    let size = |family| config(family, json!({})).unwrap().head_dim;
    assert_eq!((size("Llama"), size("Qwen3")), (8, 128), "Qwen3's default does not follow from its width");
}

#[test]
fn heads_tell_policy_from_reward_model() {
    let name = json!(["LlamaForSequenceClassification"]);
    let reward = config("Llama", json!({"architectures": name, "id2label": {"0": "LABEL_0"}})).unwrap();
    assert_eq!(reward.head, Head::Classification { labels: 1 });
    assert!(reward.expect_score().is_ok());
    refused(reward.expect_causal(), "expected LlamaForCausalLM, found LlamaForSequenceClassification");
    let causal = config("Llama", json!({})).unwrap();
    assert!(causal.expect_causal().is_ok());
    refused(causal.expect_score(), "with one label, found LlamaForCausalLM");
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
    assert_eq!((alone.eos_token_ids.as_slice(), alone.kv_heads), ([2].as_slice(), 6));
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 2]}"#).unwrap();
    assert_eq!(ModelConfig::open(dir.path()).unwrap().eos_token_ids, [2, 5]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 101}"#).unwrap();
    let expected = "generation_config.json: expected eos_token_id to be below vocab_size (101)";
    refused(ModelConfig::open(dir.path()), expected);
}

/// A config in both spellings.
fn both(more: Value, scaling: Value) -> Value {
    let mut config =
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": scaling});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn two_spellings_that_agree_are_one() {
    let told = |changes| config("Llama", changes).unwrap().ropes;
    let one = told(json!({"rope_theta": 10000.0}));
    assert_eq!(told(both(json!({"rope_theta": 10000.0}), json!({"type": "default"}))), one);
    assert_eq!(told(both(json!({"rope_theta": null}), json!(null))), one);
}

/// LongRoPE with this list of factors.
fn long(factors: Value) -> Value {
    json!({"original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", "short_factor": factors}})
}

/// What is computed is the context that the model was trained on first.
#[test]
fn a_stretched_context_ends_where_it_is_turned_otherwise() {
    let known = |changes| {
        let config = config("Phi3", changes).unwrap();
        (config.max_position_embeddings, config.ropes.kinds[0].attention_factor(), config.ropes.to_string())
    };
    let (context, factor, said) = known(long(json!([1, 1.5, 2, 4])));
    assert_eq!((context, said.as_str()), (64, "θ = 10000, LongRoPE within 64"));
    assert!((f64::from(factor) - (1.0 + 4f64.ln() / 64f64.ln()).sqrt()).abs() < 1e-6, "{factor}");
    assert_eq!((known(json!({})).0, known(json!({})).1), (256, 1.0));
    // What stands within the rotation does not count: 4096 is the field's default.
    let nested = json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "original_max_position_embeddings": 32});
    assert_eq!(known(json!({"max_position_embeddings": 8192, "rope_scaling": nested})).0, 4096);
    let window = |changes| config("Phi3", changes).unwrap().window(0);
    assert_eq!((window(json!({"sliding_window": null})), window(json!({}))), (None, Some(7)));
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
        ("Llama", json!({"num_attention_heads": 7}), "to be a divisor of num_attention_heads (7), found 2"),
        ("Qwen2", json!({"num_attention_heads": 10}), "to be a multiple of num_attention_heads (10), found 48"),
        ("Llama", json!({"num_attention_heads": 10, "head_dim": 8}), "hidden_size to be a multiple"),
        ("Llama", json!({"num_attention_heads": 16}), "head_dim to be even, as rotary positions turn pairs, found 3"),
        ("Llama", json!({"hidden_act": "gelu"}), "hidden_act to be `silu`, found `gelu`"),
        ("Llama", json!({"attention_bias": true}), "attention_bias to be false"),
        ("Llama", json!({"mlp_bias": true}), "mlp_bias to be false"),
        ("Llama", json!({"rms_norm_eps": 0}), "rms_norm_eps to be a number above 0"),
        ("Llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor to be 1 (whole heads), found 0.5"),
        ("Llama", json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "rope_parameters.partial_rotary_factor"),
        ("Llama", json!({"rope_parameters": {"full_attention": {}}}), "settings per kind of layer"),
        (
            "Llama",
            both(json!({"rope_theta": 2e4}), json!({})),
            "rope_theta to be the same as in rope_parameters (rope_theta), or absent",
        ),
        ("Llama", both(json!({}), json!({"type": "linear", "factor": 2})), "found type = \"linear\""),
        ("Llama", both(json!({}), json!({"rope_type": "default", "factor": 2})), "found factor = 2"),
        ("Llama", json!({"rope_scaling": {"rope_type": "llama3"}}), "rope_scaling.factor to be a number"),
        ("Llama", json!({"quantization_config": {"bits": 4}}), "quantization_config to be absent"),
        ("Llama", json!({"eos_token_id": 101}), "eos_token_id to be below vocab_size (101), found 101"),
        ("Llama", json!({"eos_token_id": "</s>"}), "eos_token_id to be a token id"),
        ("Mistral", json!({"sliding_window": 0}), "sliding_window to be a whole number from 1"),
        ("Qwen3", json!({"use_sliding_window": true, "layer_types": ["full_attention"]}), "to be a list of 3"),
        ("Llama", rope("ntk"), "rope_scaling.type to be `default`, `linear`, `llama3` or `yarn`, found `ntk`"),
        (
            "Qwen2",
            json!({"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1}}),
            "rope_scaling.mscale to be absent",
        ),
        ("Llama", rope("dynamic"), "found `dynamic`"),
        (
            "Qwen2",
            json!({"rope_scaling": {"type": "linear"}}),
            "rope_scaling.factor to be a number, found no such field",
        ),
        ("SmolLM3", json!({"no_rope_layers": [1, 1]}), "no_rope_layers to be a list of 3, found a list of 2"),
        ("SmolLM3", json!({"no_rope_layers": [1, 2, 1]}), "no_rope_layers to be 0 or 1 for each layer"),
        ("SmolLM3", json!({"no_rope_layer_interval": 0}), "no_rope_layer_interval to be a whole number from 1"),
        ("Gemma3", json!({"sliding_window_pattern": 0}), "sliding_window_pattern to be a whole number from 1"),
        ("Gemma3", json!({"rope_parameters": {"full_attention": {"rope_type": "ntk"}}}), "full_attention.rope_type"),
        (
            "Gemma4",
            json!({}),
            "one of {Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3, SmolLM3, Granite, Phi3, Olmo2, Olmo3}",
        ),
        ("Gemma", json!({"hidden_act": "relu"}), "hidden_act to be `gelu_pytorch_tanh`, found `relu`"),
        ("Gemma2", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention to be false"),
        ("Gemma2", json!({"final_logit_softcapping": 0}), "final_logit_softcapping to be a number above 0"),
        ("Granite", json!({"residual_multiplier": 0}), "residual_multiplier to be a number above 0"),
        ("Granite", json!({"residual_multiplier": 1e-30}), "residual_multiplier to be between 1e-6 and 1e6"),
        ("Granite", json!({"attention_multiplier": 1e38}), "attention_multiplier to be between 1e-6 and 1e6"),
        ("Granite", json!({"logits_scaling": "8"}), "logits_scaling to be a number above 0"),
        ("Gemma2", json!({"query_pre_attn_scalar": -1}), "query_pre_attn_scalar to be a number above 0"),
        (
            "Llama",
            json!({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}}),
            "rope_theta to be a base whose frequencies are finite, found 1",
        ),
        ("Phi3", json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor to be at most 1, found 1.5"),
        ("Phi3", json!({"partial_rotary_factor": 0.01}), "a share of 8 channels that is even and not zero, found 0.01"),
        ("Phi3", json!({"partial_rotary_factor": 0.4}), "a share of 8 channels that is even"),
        ("Phi3", long(json!([1, 2, 3])), "short_factor to be a list of 4, found a list of 3"),
        ("Phi3", long(json!([1, 2, 0, 4])), "short_factor to be a list of numbers above 0, found 0"),
        ("Phi3", long(json!("x")), "short_factor to be a list of numbers above 0, found no such list"),
        ("Phi3", json!({"rope_scaling": {"type": "linear", "factor": 2}}), "type to be `default` or `longrope`"),
        (
            "Phi3",
            json!({"original_max_position_embeddings": 1, "rope_scaling": {"type": "su", "short_factor": [1, 1, 1, 1]}}),
            "a context of at least 2",
        ),
        ("Qwen2Moe", json!({}), "found Qwen2MoeForCausalLM"),
        ("Llama", json!({"architectures": []}), "found none"),
    ];
    for (family, changes, expected) in cases {
        refused(config(family, changes.clone()), "models/x/config.json: expected ");
        refused(config(family, changes), expected);
    }
}

#[test]
fn what_is_no_config_is_refused() {
    for text in ["", "[]", "{", "nul", "\u{0}", &"[".repeat(100_000)] {
        refused(ModelConfig::parse(Path::new("config.json"), text), "config.json: expected a JSON object, found ");
    }
    let dir = tempfile::tempdir().unwrap();
    refused(ModelConfig::open(&dir.path().join("none")), "none: expected a model's folder, found nothing");
    refused(ModelConfig::open(dir.path()), "expected a model's folder, found a folder without config.json");
}
