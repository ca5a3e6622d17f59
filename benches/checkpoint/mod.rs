//! A random checkpoint at a real model's width: four layers of Qwen2.5-0.5B, its vocabulary cut so that the file stays small.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

const HIDDEN: usize = 896;
const KV: usize = 128;
const FEATURES: usize = 4864;
const VOCAB: usize = 8192;
const LAYERS: usize = 4;

/// Writes the folder `dir`, a policy or a reward model.
pub fn write(dir: &Path, reward: bool) {
    fs::create_dir_all(dir).unwrap();
    let architecture = if reward { "Qwen2ForSequenceClassification" } else { "Qwen2ForCausalLM" };
    let labels = if reward { json!({"0": "LABEL_0"}) } else { json!({"0": "LABEL_0", "1": "LABEL_1"}) };
    let config = json!({
        "architectures": [architecture], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": FEATURES,
        "num_hidden_layers": LAYERS, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": true, "eos_token_id": 1, "pad_token_id": 0, "id2label": labels,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes(reward).into_iter().enumerate().map(filled).collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn shapes(reward: bool) -> Vec<(String, Vec<usize>)> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for (name, rows) in [("q_proj", HIDDEN), ("k_proj", KV), ("v_proj", KV)] {
            add(&format!("self_attn.{name}.weight"), &[rows, HIDDEN]);
            add(&format!("self_attn.{name}.bias"), &[rows]);
        }
        add("self_attn.o_proj.weight", &[HIDDEN, HIDDEN]);
        add("mlp.gate_proj.weight", &[FEATURES, HIDDEN]);
        add("mlp.up_proj.weight", &[FEATURES, HIDDEN]);
        add("mlp.down_proj.weight", &[HIDDEN, FEATURES]);
        add("input_layernorm.weight", &[HIDDEN]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
    }
    if reward {
        shapes.push(("score.weight".into(), vec![1, HIDDEN]));
    }
    shapes
}

/// Values that are neither zero nor alike: norms around 1, matrices as small as an initialisation.
fn filled((seed, (name, shape)): (usize, (String, Vec<usize>))) -> (String, Vec<usize>, Vec<u8>) {
    let (middle, width) = if name.ends_with("norm.weight") { (1.0, 0.1) } else { (0.0, 0.04) };
    let value = |i: usize| {
        let mixed = ((i + 1) * (2 * seed + 104_729)) as u32;
        let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x2c1b_3c6d);
        middle + width * (f32::from((mixed >> 16) as u16) / 65_536.0 - 0.5)
    };
    let bytes = (0..shape.iter().product()).flat_map(|i| half::bf16::from_f32(value(i)).to_le_bytes()).collect();
    (name, shape, bytes)
}
