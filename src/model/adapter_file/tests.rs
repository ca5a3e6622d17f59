use std::fs;

use super::*;
use crate::error::refused;
use crate::model::config::tests::tiny_weights;

fn model(class: &str) -> ModelConfig {
    tiny_weights(&format!("Llama{class}"))
}

/// All projections of layer 1, and the score head where the model has one.
fn adapter(model: &ModelConfig) -> AdapterFile {
    let mut adapter = AdapterFile { base_model_name: Some("models/x".into()), ..AdapterFile::new(model, 2, 3.0) };
    for projection in Projection::ALL {
        let (outputs, inputs) = projection.shape(model);
        let ramp = |n: usize| (0..n).map(|i| i as f32 - 1.5).collect();
        adapter.set_lora(1, projection, ramp(2 * inputs), ramp(outputs * 2));
    }
    if let crate::model::Head::Classification { labels } = model.head {
        adapter.set_score(labels, vec![0.25; labels * model.hidden_size]);
    }
    adapter
}

/// Saves an adapter, lets `harm` damage its config, and opens it again.
fn reopened(model: &ModelConfig, adapter: &AdapterFile, harm: impl Fn(&mut Value)) -> Result<AdapterFile> {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("adapter");
    adapter.save(&dir)?;
    let mut config: Value = serde_json::from_str(&fs::read_to_string(dir.join(CONFIG)).unwrap()).unwrap();
    harm(&mut config);
    fs::write(dir.join(CONFIG), config.to_string()).unwrap();
    AdapterFile::open(&dir, model)
}

#[test]
fn what_changes_one_layer_opens_as_it_was_saved() {
    for class in ["ForCausalLM", "ForSequenceClassification"] {
        let model = model(class);
        let saved = adapter(&model);
        let opened = reopened(&model, &saved, |_| {}).unwrap();
        assert_eq!(opened, saved);
        assert_eq!((opened.lora(0, Projection::Q), opened.target_modules().len()), (None, 7));
    }
}

/// Written with the rank of all parts together, read with that of each again, whether the scale knows roots or not.
#[test]
fn parts_of_fused_matrices_are_written_as_one() {
    let model = tiny_weights("Phi3ForCausalLM");
    for use_rslora in [false, true] {
        let saved = AdapterFile { use_rslora, ..adapter(&model) };
        let opened = reopened(&model, &saved, |config| {
            let fused = json!(["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]);
            assert_eq!(
                (&config["target_modules"], &config["rank_pattern"]["qkv_proj"], &config["r"]),
                (&fused, &json!(6), &json!(2))
            );
        })
        .unwrap();
        assert_eq!((opened.rank, opened.target_modules().len()), (2, 7));
        for projection in Projection::ALL {
            let products = [&saved, &opened].map(|file| {
                let [a, b] = file.lora(1, projection).unwrap();
                let cols = a.shape[1];
                let of = |row: &[f32], col: usize| {
                    (0..2).map(|r| row[r] * a.data[r * cols + col]).sum::<f32>() * file.scale()
                };
                b.data
                    .chunks_exact(2)
                    .flat_map(|row| (0..cols).map(|col| of(row, col)).collect::<Vec<_>>())
                    .collect::<Vec<f32>>()
            });
            let [found, expected] = &products;
            assert!(
                found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0)),
                "{projection:?}"
            );
        }
    }
    // One that has learned nothing keeps its A.
    let mut silent = adapter(&model);
    let Some([a, b]) = silent.lora(1, Projection::K).map(|lora| lora.map(|m| m.data.clone())) else { panic!() };
    silent.set_lora(1, Projection::K, a.clone(), vec![0.0; b.len()]);
    let opened = reopened(&model, &silent, |_| {}).unwrap();
    assert_eq!(opened.lora(1, Projection::K).unwrap()[1].data, vec![0.0; b.len()]);
    refused(reopened(&model, &silent, |config| config["rank_pattern"]["qkv_proj"] = json!(5)), "qkv_proj");
}

#[test]
fn rank_stabilised_adapters_scale_by_the_root() {
    let model = model("ForCausalLM");
    let opened = reopened(&model, &adapter(&model), |config| config["use_rslora"] = json!(true)).unwrap();
    assert!((opened.scale() - 3.0 / 2f32.sqrt()).abs() <= 1e-6);
    assert_eq!(reopened(&model, &opened, |_| {}).unwrap().scale(), opened.scale());
}

/// Their values are held against PEFT in tests/golden-adapters.
#[test]
fn ranks_and_alphas_of_their_own_become_one() {
    let model = model("ForCausalLM");
    let mut file = adapter(&model);
    file.set_lora(1, Projection::Q, vec![1.0; 2 * 8], vec![2.0; 8 * 2]);
    let opened = reopened(&model, &file, |config| {
        config["target_modules"] = json!("all-linear");
        config["alpha_pattern"] = json!({"k_proj": 8, "self_attn.q_proj": 12, "q_proj": 1});
        config["layers_to_transform"] = json!([]);
    })
    .unwrap();
    assert_eq!((opened.rank, opened.scale()), (2, 1.0));
    let b = |projection| opened.lora(1, projection).unwrap()[1].data.clone();
    assert_eq!(b(Projection::Q), [12.0; 16], "12 / 2 times 2");
    assert_eq!(b(Projection::V)[..3], [-2.25, -0.75, 0.75], "3 / 2 times what it was");
    let pattern = r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj";
    assert!(reopened(&model, &file, |config| config["target_modules"] = json!(pattern)).is_ok());
}

#[test]
fn what_ares_cannot_apply_is_refused_with_its_reason() {
    let model = model("ForCausalLM");
    for (key, value, expected) in [
        ("peft_type", json!("LOHA"), "peft_type to be LORA, found LOHA"),
        ("use_dora", json!(true), "use_dora to be false, found true (DoRA also trains magnitudes)"),
        ("bias", json!("all"), "bias to be `none` (the base stays frozen), found `all`"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out to be false"),
        ("rank_pattern", json!({"q_proj": 4}), "q_proj.lora_A.weight: expected [4, 8]"),
        ("rank_pattern", json!({"q_proj": 0}), "rank_pattern.q_proj to be a whole number from 1"),
        ("rank_pattern", json!({"(q_proj": 2}), "rank_pattern to be a regular expression"),
        (
            "alpha_pattern",
            json!({r"([a-z_.0-9]+)+(?=x)\1": 4}),
            "alpha_pattern to be a regular expression that can be matched",
        ),
        (
            "exclude_modules",
            json!(r"(?:(?=.)[a-z_.0-9]*)*(?!)x"),
            "exclude_modules to be a regular expression that can be matched",
        ),
        ("alpha_pattern", json!({"q_proj": -4}), "alpha_pattern.q_proj to be a number above 0"),
        ("target_modules", json!("model.layers.0.*"), "one that names model.layers.1."),
        ("target_modules", json!(r".*\.q_proj"), "of which the adapter has matrices"),
        ("target_modules", json!(5), "target_modules to be a list of texts"),
        ("exclude_modules", json!(["v_proj"]), "exclude_modules to be without model.layers.1.self_attn.v_proj"),
        ("exclude_modules", json!(".*mlp.*"), "exclude_modules to be without model.layers.1.mlp."),
        ("layers_to_transform", json!([0]), "layers_to_transform to be one with 1"),
        ("layers_to_transform", json!(["x"]), "layers_to_transform to be layers' numbers"),
        ("init_lora_weights", json!("pissa_niter_4"), "found `pissa_niter_4`, which changes the base's weights too"),
        ("task_type", json!("TOKEN_CLS"), "task_type to be CAUSAL_LM or SEQ_CLS"),
        ("layer_replication", json!([[0, 1]]), "layer_replication to be absent"),
        ("r", json!(0), "r to be a whole number from 1"),
        ("r", json!(3), "down_proj.lora_A.weight: expected [3, 6] (by the adapter's rank), found [2, 6] F32"),
        ("lora_alpha", json!(null), "lora_alpha to be a number above 0, found no such field"),
    ] {
        refused(reopened(&model, &adapter(&model), |config| config[key] = value.clone()), expected);
    }
}

#[test]
fn tensors_that_do_not_fit_the_model_are_named() {
    let (causal, reward) = (model("ForCausalLM"), model("ForSequenceClassification"));
    let (mut alone, mut deep) = (adapter(&causal), adapter(&causal));
    alone.tensors.remove(&matrix_name(1, Projection::O, 'B'));
    deep.set_lora(2, Projection::Q, vec![0.0; 16], vec![0.0; 16]);
    for (adapter, expected) in [
        (adapter(&reward), "adapter_model.safetensors: tensor base_model.model.score.weight: expected LoRA matrices"),
        (alone, "layers.1.self_attn.o_proj.lora_B.weight: expected both matrices of a pair, found no such"),
        (deep, "tensor base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
        (AdapterFile::new(&causal, 2, 3.0), "found no such tensor"),
    ] {
        refused(reopened(&causal, &adapter, |_| {}), expected);
    }
}

#[test]
fn an_adapter_that_is_not_finite_is_not_written() {
    let model = model("ForCausalLM");
    let mut bad = adapter(&model);
    bad.set_lora(0, Projection::V, vec![f32::NAN; 16], vec![0.0; 8]);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("adapter");
    refused(bad.save(&dir), "layers.0.self_attn.v_proj.lora_A.weight: expected finite numbers, found NaN");
    assert!(!dir.exists());
}

#[test]
fn missing_files_are_named() {
    let model = model("ForCausalLM");
    let dir = tempfile::tempdir().unwrap();
    let open = || AdapterFile::open(dir.path(), &model);
    refused(open(), "adapter_config.json: cannot read");
    let written = adapter(&model);
    fs::write(dir.path().join(CONFIG), written.config_json(&written.tensors)).unwrap();
    refused(open(), "adapter_model.safetensors: cannot read");
    fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
    refused(open(), "expected adapter_model.safetensors, found adapter_model.bin");
    fs::write(dir.path().join(WEIGHTS), "").unwrap();
    refused(open(), "found an empty file");
}
