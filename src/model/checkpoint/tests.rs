use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde_json::json;

use super::*;
use crate::error::refused;
use crate::model::config::tests::tiny_weights;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn config(family: &str, class: &str) -> ModelConfig {
    tiny_weights(&format!("{family}{class}"))
}

/// What `config` promises, as F32, each value its own index.
fn tensors(config: &ModelConfig) -> Tensors {
    let fill = |shape: Vec<usize>| {
        let data = (0..shape.iter().product()).flat_map(|i: usize| (i as f32).to_le_bytes()).collect();
        (Dtype::F32, shape, data)
    };
    promised(config).into_iter().map(|(name, shape)| (name, fill(shape))).collect()
}

fn bytes(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn read(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let mut out = Vec::new();
    checkpoint.read(name, &mut out).unwrap();
    out
}

/// Opens a folder whose model file holds `bytes`, and reads everything.
fn open(config: &ModelConfig, bytes: &[u8]) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(SINGLE), bytes).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), config)?;
    checkpoint.tensor_names().try_for_each(|name| checkpoint.read(name, &mut Vec::new()))?;
    Ok(checkpoint)
}

/// A header written by hand over `data` zero bytes.
fn by_hand(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn a_head_has_one_layer_or_two_and_says_how_many_labels() {
    let plain = config("Llama", "ForSequenceClassification");
    let mut body = tensors(&plain);
    body.remove("score.weight");
    let with = |layers: &[(&str, &[usize])]| {
        let mut tensors = body.clone();
        for (name, shape) in layers {
            tensors
                .insert(name.to_string(), (Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()]));
        }
        open(&plain, &bytes(&tensors))
    };
    assert!(with(&[("v_head.0.weight", &[3, 8]), ("v_head.0.bias", &[3]), ("v_head.2.weight", &[1, 3])]).is_ok());
    refused(with(&[]), "score.weight");
    refused(with(&[("score.weight", &[2, 8])]), "score.weight");
    refused(with(&[("score.0.weight", &[3, 8])]), "score.2.weight");
    refused(with(&[("score.0.weight", &[3, 8]), ("score.2.weight", &[1, 4])]), "score.2.weight");
    refused(with(&[("score.0.weight", &[3, 8]), ("score.0.bias", &[4]), ("score.2.weight", &[1, 3])]), "score.0.bias");
    let three = [("score.0.weight", &[3, 8][..]), ("score.2.weight", &[3, 3]), ("score.4.weight", &[1, 3])];
    refused(with(&three), "found score.4.weight");
}

#[test]
fn fused_matrices_show_their_parts() {
    let config = config("Phi3", "ForCausalLM");
    let name = |path: &str| format!("model.layers.0.{path}.weight");
    let (mut all, mut row) = (tensors(&config), 0u32);
    for layer in 0..config.layers {
        for (path, parts) in Projection::IN_ONE {
            let rows: usize = parts.iter().map(|part| part.shape(&config).0).sum();
            for part in parts {
                all.remove(&format!("model.layers.{layer}.{}.weight", part.path()));
            }
            let numbers: Vec<u8> = (0..rows * config.hidden_size)
                .flat_map(|_| {
                    row += 1;
                    (row as f32).to_le_bytes()
                })
                .collect();
            all.insert(
                format!("model.layers.{layer}.{path}.weight"),
                (Dtype::F32, vec![rows, config.hidden_size], numbers),
            );
        }
    }
    let checkpoint = open(&config, &bytes(&all)).unwrap();
    let parts: Vec<f32> =
        ["q", "k", "v"].iter().flat_map(|x| read(&checkpoint, &name(&format!("self_attn.{x}_proj")))).collect();
    assert!(parts.iter().enumerate().all(|(i, x)| *x == i as f32 + 1.0), "one after the other");
    assert_eq!(checkpoint.shape(&name("mlp.up_proj")).unwrap(), [config.intermediate_size, config.hidden_size]);
    let fused = all.get_mut(&name("self_attn.qkv_proj")).unwrap();
    fused.1[0] -= 1;
    fused.2.truncate(fused.2.len() - 4 * config.hidden_size);
    refused(open(&config, &bytes(&all)), "self_attn.qkv_proj");
    all.remove(&name("self_attn.qkv_proj"));
    refused(open(&config, &bytes(&all)), "self_attn.q_proj");
}

#[test]
fn halves_are_converted_exactly() {
    let config = config("Llama", "ForSequenceClassification");
    let mut all = tensors(&config);
    let values = [0.0f32, -1.5, 65504.0, 2f32.powi(-24), 0.333_251_95, 1.0, -2.0, 3.0];
    let halves: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let brains: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    all.insert("score.weight".into(), (Dtype::F16, vec![1, 8], halves));
    all.insert("model.norm.weight".into(), (Dtype::BF16, vec![8], brains));
    let checkpoint = open(&config, &bytes(&all)).unwrap();
    assert_eq!(read(&checkpoint, "score.weight"), values.map(|x| f16::from_f32(x).to_f32()));
    assert_eq!(read(&checkpoint, "model.norm.weight"), values.map(|x| bf16::from_f32(x).to_f32()));
}

#[test]
fn a_bare_transformer_with_a_tied_head_and_more_than_is_promised_opens_too() {
    let mut config = config("Llama", "ForCausalLM");
    config.tie_word_embeddings = true;
    let bare = |(name, tensor): (String, _)| (name.trim_start_matches("model.").to_string(), tensor);
    let mut all: Tensors = tensors(&config).into_iter().map(bare).collect();
    all.insert("rotary_emb.inv_freq".into(), (Dtype::F32, vec![2], vec![0; 8]));
    let checkpoint = open(&config, &bytes(&all)).unwrap();
    assert_eq!(checkpoint.shape("model.layers.0.self_attn.k_proj.weight").unwrap(), [4, 8]);
    assert_eq!(read(&checkpoint, "model.norm.weight"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(checkpoint.sha256(), crate::text::output::sha256(&bytes(&all)));
}

#[test]
fn tensors_that_differ_from_the_config_are_named() {
    let config = config("Qwen2", "ForCausalLM");
    for (name, dtype, shape, expected) in [
        ("model.layers.1.mlp.up_proj.weight", Dtype::BF16, [5, 8], "expected [6, 8] BF16, found [5, 8] BF16"),
        (EMBEDDING, Dtype::F32, [4, 8], "expected [5, 8] F32, found [4, 8] F32"),
        ("lm_head.weight", Dtype::I32, [5, 8], "expected [5, 8] F32, F16 or BF16, found [5, 8] I32"),
    ] {
        let mut all = tensors(&config);
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        all.insert(name.into(), (dtype, shape.to_vec(), vec![0; length]));
        refused(open(&config, &bytes(&all)), &format!("model.safetensors: tensor {name}: {expected}"));
    }
    for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.input_layernorm.weight", "lm_head.weight"] {
        let mut all = tensors(&config);
        all.remove(name);
        refused(open(&config, &bytes(&all)), &format!("tensor {name}: expected ["));
        refused(open(&config, &bytes(&all)), "], found no such tensor");
    }
}

#[test]
fn numbers_that_are_none_are_found_and_named() {
    let config = config("Llama", "ForCausalLM");
    let bad: [(Dtype, Vec<u8>); 4] = [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().to_vec()),
        (Dtype::F16, f16::INFINITY.to_le_bytes().to_vec()),
        (Dtype::BF16, bf16::NAN.to_le_bytes().to_vec()),
    ];
    for (dtype, value) in bad {
        let mut all = tensors(&config);
        let mut data = vec![0; 40 * value.len()];
        data[39 * value.len()..].copy_from_slice(&value);
        all.insert("lm_head.weight".into(), (dtype, vec![5, 8], data));
        refused(open(&config, &bytes(&all)), "model.safetensors: tensor lm_head.weight: expected finite numbers");
        refused(open(&config, &bytes(&all)), "at element 39 of [5, 8]");
    }
}

#[test]
fn damaged_files_are_refused() {
    let config = config("Llama", "ForCausalLM");
    let whole = bytes(&tensors(&config));
    let tensor = |from, to, shape| format!(r#"{{"dtype":"F32","shape":[{shape}],"data_offsets":[{from},{to}]}}"#);
    let overlap = format!(r#"{{"a":{},"b":{}}}"#, tensor(0, 8, 2), tensor(4, 12, 2));
    let outside = format!(r#"{{"a":{}}}"#, tensor(0, 8, 2));
    let huge = format!(r#"{{"a":{}}}"#, tensor(0, 8, u64::MAX));
    let mut claims = whole.clone();
    claims[..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for bytes in [
        Vec::new(),
        whole[..7].to_vec(),
        whole[..20].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        [whole.as_slice(), &[0]].concat(),
        noise,
        claims,
        by_hand(&overlap, 12),
        by_hand(&outside, 4),
        by_hand(&huge, 8),
        by_hand("[1, 2]", 0),
    ] {
        refused(open(&config, &bytes), "model.safetensors: expected a whole safetensors file, found ");
    }
    refused(open(&config, &whole[..20]), "20 bytes whose header claims");
    refused(open(&config, &by_hand("{}", 0)), "tensor model.embed_tokens.weight");
}

/// Splits the tensors over two shards, then lets `harm` damage folder and index.
fn sharded(harm: impl Fn(&Path, &mut serde_json::Value)) -> Result<Checkpoint> {
    let config = config("Llama", "ForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    let (first, second): (Vec<_>, Vec<_>) =
        tensors(&config).into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut map = serde_json::Map::new();
    for (file, part) in [("m-1.safetensors", first), ("m-2.safetensors", second)] {
        part.iter().for_each(|(name, _)| drop(map.insert(name.clone(), json!(file))));
        fs::write(dir.path().join(file), bytes(&part.into_iter().collect())).unwrap();
    }
    let mut index = json!({"metadata": {}, "weight_map": map});
    harm(dir.path(), &mut index);
    fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    Checkpoint::open(dir.path(), &config)
}

#[test]
fn damaged_shards_are_refused() {
    let norm = "model.norm.weight";
    let named = |file: &'static str, expected: &str| {
        refused(sharded(|_, index| index["weight_map"][norm] = json!(file)), expected)
    };
    for path in ["../m-2.safetensors", "/etc/passwd", "a/../../b", "", "./m-2.safetensors/.."] {
        named(path, "index.json: expected weight_map.model.norm.weight to be the name of a file inside");
    }
    named("m-3.safetensors", "m-3.safetensors: cannot read");
    named("m-1.safetensors", "m-1.safetensors: tensor model.norm.weight: expected a tensor, as the index says");
    let lacking = sharded(|_, index| drop(index["weight_map"].as_object_mut().unwrap().remove(norm)));
    refused(lacking, "index.json: tensor model.norm.weight: expected [8], found no such tensor");
    let short = sharded(|dir, _| fs::write(dir.join("m-1.safetensors"), "short").unwrap());
    refused(short, "m-1.safetensors: expected a whole safetensors file, found 5 bytes");
    let list = sharded(|_, index| index["weight_map"] = json!(["m-1.safetensors"]));
    refused(list, "expected weight_map to be an object, found a list of 1");
    let empty = sharded(|_, index| index["weight_map"] = json!({}));
    refused(empty, "expected weight_map to be at least one tensor and its file, found none");
    refused(sharded(|_, index| *index = json!({})), "no such field");
}

#[test]
fn folders_without_weights_are_refused() {
    let config = config("Llama", "ForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(dir.path(), &config);
    refused(open(), "expected model.safetensors, or model.safetensors.index.json with its shards, found neither");
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    refused(open(), "found pytorch_model.bin; save the model as safetensors");
    fs::create_dir(dir.path().join(SINGLE)).unwrap();
    refused(open(), "found no regular file");
}

#[test]
fn links_are_followed_but_not_in_circles() {
    use std::os::unix::fs::symlink;
    let config = config("Llama", "ForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(SINGLE);
    symlink(&file, dir.path().join("back")).unwrap();
    symlink(dir.path().join("back"), &file).unwrap();
    refused(Checkpoint::open(dir.path(), &config), "model.safetensors: cannot read");
    fs::remove_file(&file).unwrap();
    fs::write(dir.path().join("blob"), bytes(&tensors(&config))).unwrap();
    symlink("blob", &file).unwrap();
    assert!(Checkpoint::open(dir.path(), &config).is_ok(), "download caches link to their files");
}
