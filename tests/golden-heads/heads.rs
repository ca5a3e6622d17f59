//! Classifiers' heads as their trainers lay them out, against what torch computes of them (`scripts/golden_heads.py`): rewards at the
//! token that each class reads, with and without an appended end, and the gradient that comes out below the head.

use std::collections::BTreeMap;
use std::path::Path;

use ares::backend::Cpu;
use ares::model::{
    AdapterGrad, AdapterInit, AnswerTokens, Batch, Heads, Keep, ModelSpec, Pretrained, Version, Workspace,
};
use ares::text::Prompt;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{GRADIENT_LIMIT, assert_close};

/// Relative to 1, which is the size of these rewards.
const REWARD_LIMIT: f64 = 1e-5;
const DOWN: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_";

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    raw: Vec<String>,
    rules: BTreeMap<String, Rule>,
}

#[derive(Deserialize)]
struct Rule {
    /// Laid over the trunk's config.json.
    config: Map<String, Value>,
    /// Before the trunk's tensors.
    prefix: String,
    rewards: Vec<f64>,
    /// Of the raw texts, each ending in the token that ends a turn.
    appended: Vec<f64>,
}

/// Writes a folder with the trunk's files and the rule's own config and tensors.
fn write(dir: &Path, name: &str, rule: &Rule, heads: &SafeTensors) {
    let trunk = super::joint::tests().join("golden-guard");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(trunk.join(file), dir.join(file)).unwrap();
    }
    let mut config: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(trunk.join("config.json")).unwrap()).unwrap();
    config.extend(rule.config.clone());
    std::fs::write(dir.join("config.json"), Value::from(config).to_string()).unwrap();
    let bytes = std::fs::read(trunk.join("model.safetensors")).unwrap();
    let trunk = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, TensorView)> = Vec::new();
    for (key, view) in trunk.tensors() {
        tensors.push((format!("{}{}", rule.prefix, key.strip_prefix("model.").unwrap()), view));
    }
    for (key, view) in heads.tensors() {
        let own = key.split_once('/').filter(|(of, key)| *of == name && *key != "gradient");
        tensors.extend(own.map(|(_, key)| (key.to_string(), view)));
    }
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn heads_of_every_kind() {
    let dir = super::joint::tests().join("golden-heads");
    let golden: Golden = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("heads.safetensors")).unwrap();
    let heads = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(golden.rules.len(), 12);
    for (name, rule) in &golden.rules {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), name, rule, &heads);
        let spec = ModelSpec { dir: folder.path().to_path_buf(), adapter: None };
        let mut model = Pretrained::open(&Cpu::default(), &spec, 64, Default::default()).unwrap();
        let rewards = |model: &mut Pretrained<Cpu>, prompts: Vec<Prompt>| -> Vec<f32> {
            let rows: Vec<(&Prompt, &str)> = prompts.iter().map(|prompt| (prompt, "")).collect();
            model.rewards(Version::Current, &rows).unwrap().into_iter().map(Result::unwrap).collect()
        };
        let rows = golden.rows.iter().cloned().map(Prompt::Tokens).collect();
        assert_close(name, &rewards(&mut model, rows), &rule.rewards, REWARD_LIMIT);
        model.rendering.append_eos().unwrap();
        let raw = golden.raw.iter().cloned().map(Prompt::Raw).collect();
        assert_close(&format!("{name}, appended"), &rewards(&mut model, raw), &rule.appended, REWARD_LIMIT);

        // With B = 0 the adapted model is the original, and dB = scale · dW Aᵀ.
        let transformer = &model.transformer;
        let adapter = transformer.new_adapter(4, 8.0, AdapterInit::Zero { seed: 3 }).unwrap();
        let mut batch = Batch::default();
        for ids in &golden.rows {
            let read = model.rendering.full(&Prompt::Tokens(ids.clone()), "").unwrap();
            batch.push(&[], &[AnswerTokens::new(&read.tokens)], Heads::Ends);
        }
        let mut ws =
            Workspace::new(&transformer.ops, &transformer.config, adapter.rank(), batch.len(), Keep::Everything)
                .unwrap();
        let mut grad = AdapterGrad::new(&transformer.ops, &adapter, false).unwrap();
        transformer.forward_scores(&mut ws, &batch, Some(&adapter)).unwrap();
        let c: Vec<f32> = (0..batch.sequences.len()).map(|i| 0.5 * (-1f32).powi(i as i32) * (i + 1) as f32).collect();
        transformer.backward_scores(&mut ws, &c, &adapter, &mut grad).unwrap();
        let found = adapter.gradients_to_file(&transformer.ops, &grad).unwrap();
        let a = &adapter.to_file(&transformer.ops).unwrap().tensors[&format!("{DOWN}A.weight")];
        let dw = heads.tensor(&format!("{name}/gradient")).unwrap();
        let dw: Vec<f32> = dw.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let inputs = a.shape[1];
        let db: Vec<f64> = dw
            .chunks_exact(inputs)
            .flat_map(|row| {
                a.data.chunks_exact(inputs).map(|a| 2.0 * row.iter().zip(a).map(|(x, y)| f64::from(x * y)).sum::<f64>())
            })
            .collect();
        let size = db.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        assert_close(
            &format!("{name}, gradient"),
            &found.tensors[&format!("{DOWN}B.weight")].data,
            &db,
            GRADIENT_LIMIT * size,
        );
    }
}
