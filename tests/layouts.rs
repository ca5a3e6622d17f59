//! A checkpoint is the same model however its files are laid out: every folder of `tests/golden` in each type of number, whole and in
//! shards, with the config in the words of transformers 4 and 5.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ares::backend::Cpu;
use ares::model::{AnswerTokens, Batch, Heads, Keep, Transformer, Workspace};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Every tensor of a folder, as f32.
fn tensors(folder: &Path) -> Tensors {
    let mut all = Tensors::new();
    for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if !(name.starts_with("model") && name.ends_with(".safetensors")) {
            continue;
        }
        let bytes = fs::read(file).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let halves = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            let numbers: Vec<f32> = match view.dtype() {
                Dtype::BF16 => halves().map(|bits| bf16::from_bits(bits).to_f32()).collect(),
                Dtype::F16 => halves().map(|bits| f16::from_bits(bits).to_f32()).collect(),
                _ => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            };
            all.insert(name, (view.shape().to_vec(), numbers));
        }
    }
    all
}

/// As `dtype` holds it.
fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Writes `all` as `dtype`, in two files with an index where `sharded`: every other tensor in each.
fn write(folder: &Path, all: &Tensors, dtype: Dtype, sharded: bool) {
    let bytes: BTreeMap<&String, Vec<u8>> = all
        .iter()
        .map(|(name, (_, numbers))| {
            let bytes = numbers.iter().flat_map(|x| match dtype {
                Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            });
            (name, bytes.collect())
        })
        .collect();
    let file = |names: Vec<&String>| {
        let view = |name: &String| TensorView::new(dtype, all[name].0.clone(), &bytes[name]).unwrap();
        safetensors::serialize(names.into_iter().map(|name| (name.clone(), view(name))), None).unwrap()
    };
    if !sharded {
        fs::write(folder.join("model.safetensors"), file(all.keys().collect())).unwrap();
        return;
    }
    let place = |i: usize| format!("model-0000{}-of-00002.safetensors", i % 2 + 1);
    for part in [0, 1] {
        fs::write(folder.join(place(part)), file(all.keys().skip(part).step_by(2).collect())).unwrap();
    }
    let map: Map<String, Value> = all.keys().enumerate().map(|(i, name)| (name.clone(), place(i).into())).collect();
    fs::write(folder.join("model.safetensors.index.json"), json!({"metadata": {}, "weight_map": map}).to_string())
        .unwrap();
}

/// The config in the words of transformers 5, or of 4; as it is where layers turn each in their way.
fn spelled(config: &Value, new: bool) -> Value {
    let mut config = config.clone();
    let fields = config.as_object_mut().unwrap();
    if fields.get("rope_parameters").is_some_and(|rope| rope.as_object().unwrap().values().any(Value::is_object)) {
        return config;
    }
    for key in ["dtype", "torch_dtype"] {
        fields.remove(key);
    }
    fields.insert(if new { "dtype" } else { "torch_dtype" }.into(), "float32".into());
    let kind = fields.get("model_type").and_then(Value::as_str).unwrap().to_string();
    if ["gemma3_text", "olmo3"].contains(&kind.as_str()) {
        return config; // two sets of parameters, of which the old words name one
    }
    if new {
        let scaling = fields.remove("rope_scaling").unwrap_or_default();
        if let Some(theta) = fields.remove("rope_theta") {
            let mut rope = if scaling.is_object() { scaling } else { json!({}) };
            let kind = rope.as_object_mut().unwrap().remove("type");
            let known = rope.get("rope_type").cloned().or(kind);
            rope["rope_type"] = known.unwrap_or_else(|| "default".into());
            rope["rope_theta"] = theta;
            fields.insert("rope_parameters".into(), rope);
        }
    } else if let Some(Value::Object(mut rope)) = fields.remove("rope_parameters") {
        fields.insert("rope_theta".into(), rope.remove("rope_theta").unwrap());
        let plain = rope.get("rope_type").is_none_or(|kind| kind == "default");
        fields.insert("rope_scaling".into(), if plain { Value::Null } else { rope.into() });
    }
    config
}

/// What the model in `folder` says of two answers, bit for bit.
fn said(folder: &Path) -> Vec<u32> {
    let model = Transformer::open(&Cpu::new(), folder).unwrap_or_else(|error| panic!("{error}"));
    let mut ws = Workspace::new(&model.ops, &model.config, 0, 64, Keep::Nothing).unwrap();
    let mut batch = Batch::default();
    let tokens: Vec<u32> = (0..23).map(|i| 3 + i * 7 % 90).collect();
    let heads = if model.config.is_causal() { Heads::Targets } else { Heads::Ends };
    batch.push(&tokens[..9], &[AnswerTokens::new(&tokens[9..]), AnswerTokens::new(&tokens[12..])], heads);
    let values = match model.config.is_causal() {
        true => model.forward_targets(&mut ws, &batch, None, false).unwrap().logprob,
        false => model.forward_scores(&mut ws, &batch, None).unwrap(),
    };
    assert!(values.len() >= 2 && values.iter().all(|x| x.is_finite()), "{values:?}");
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn numbers_do_not_depend_on_how_files_are_laid_out() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut folders = 0;
    for folder in fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()) {
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let all = tensors(&folder);
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let mut rounded_all = all.clone();
            rounded_all.values_mut().flat_map(|(_, x)| x).for_each(|x| *x = rounded(*x, dtype));
            let expected = tempfile::tempdir().unwrap();
            write(expected.path(), &rounded_all, Dtype::F32, false);
            fs::write(expected.path().join("config.json"), config.to_string()).unwrap();
            let expected = said(expected.path());
            for (sharded, new) in [(false, false), (false, true), (true, false), (true, true)] {
                let found = tempfile::tempdir().unwrap();
                write(found.path(), &all, dtype, sharded);
                fs::write(found.path().join("config.json"), spelled(&config, new).to_string()).unwrap();
                let what = format!("{}, {dtype:?}, sharded {sharded}, new words {new}", folder.display());
                assert_eq!(said(found.path()), expected, "{what}");
            }
        }
        folders += 1;
    }
    assert!(folders >= 25, "{folders} folders");
}
