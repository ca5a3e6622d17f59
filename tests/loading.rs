//! Opens every golden checkpoint: transformers wrote them, in both spellings of the config, in one file and in shards.

use std::path::{Path, PathBuf};

use ares::model::{AdapterFile, Checkpoint, Head, ModelConfig, Projection, WeightSource};
use ares::text::ngrams::overlap;
use ares::text::rows::{self, Row};
use ares::text::{IdLimits, Prompt, Rendering};

fn golden() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folders = std::fs::read_dir(&root).expect("tests/golden lies in the repository");
    let mut folders: Vec<_> = folders.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 8, "four families, two heads each");
    folders
}

#[test]
fn every_golden_checkpoint_opens_and_reads() {
    for dir in golden() {
        let config = ModelConfig::open(&dir).unwrap();
        let written: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        assert_eq!(written["labels"], config.labels(), "{}", dir.display());
        assert_eq!(config.eos_token_ids, [2]);
        let checkpoint = Checkpoint::open(&dir, &config).unwrap();
        let mut values = Vec::new();
        for name in checkpoint.tensor_names().map(str::to_string).collect::<Vec<_>>() {
            let before = values.len();
            checkpoint.read(&name, &mut values).unwrap();
            assert_eq!(values.len() - before, checkpoint.shape(&name).unwrap().iter().product::<usize>());
        }
        assert!(values.iter().any(|x| *x != 0.0));
        assert_eq!(checkpoint.sha256().len(), 64);
    }
}

#[test]
fn every_golden_adapter_opens_and_is_written_the_same() {
    for dir in golden() {
        let config = ModelConfig::open(&dir).unwrap();
        let adapter = AdapterFile::open(&dir.join("adapter"), &config).unwrap();
        assert_eq!((adapter.rank, adapter.scale()), (4, 3.0), "{}", dir.display());
        assert_eq!(adapter.score().is_some(), config.head != Head::Causal);
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let lora = adapter.lora(layer, projection).expect("PEFT adapted all seven projections");
                assert!(lora.iter().flat_map(|m| &m.data).any(|x| *x != 0.0));
            }
        }
        let copy = tempfile::tempdir().unwrap();
        adapter.save(copy.path()).unwrap();
        assert_eq!(AdapterFile::open(copy.path(), &config).unwrap(), adapter);
    }
}

/// Every model of the suite opens with its own tokenizer and template, and no prompt stands in two splits.
#[test]
fn the_suite_opens_and_its_splits_are_apart() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let manifest: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(root.join("suite.json")).unwrap()).unwrap();
    let mut models = vec![root.join("judge"), root.join("second-judge")];
    for pair in manifest["pairs"].as_array().unwrap() {
        let dir = root.join(pair["name"].as_str().unwrap());
        models.extend([dir.join("policy"), dir.join("reward")]);
        let names = ["calibration", "replay", "discovery", "gate", "test"];
        let rows = names.map(|name| rows::read(Some(&dir.join(format!("{name}.jsonl"))), true).unwrap());
        let asked = |row: &Row| row.prompt(false).unwrap();
        let prompts = rows.each_ref().map(|rows| rows.iter().map(asked).collect::<Vec<Prompt>>());
        let texts = prompts.iter().enumerate().flat_map(|(i, split)| split.iter().map(move |prompt| (i, prompt)));
        overlap(texts.map(|(i, prompt)| (i, prompt.text(), move || names[i].to_string()))).unwrap();
        assert!(rows[1].iter().all(|row| row.pair().is_ok()));
    }
    for dir in models {
        let config = ModelConfig::open(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir, &config).unwrap();
        let rendering = Rendering::open(&dir, &config.limits()).unwrap();
        assert!(rendering.has_template() && checkpoint.bytes() > 100_000, "{}", dir.display());
        let rendered = rendering.with_answer(&Prompt::user("how do I bake bread?"), "I cannot help.").unwrap();
        assert!(rendering.end_tokens.contains(rendered.tokens.last().unwrap()));
        assert_eq!(rendering.full(&Prompt::user("how do I bake bread?"), "I cannot help.").unwrap(), rendered);
        // Its embedding has a row for every token, and no fewer would do.
        let limits = IdLimits { vocab_size: rendering.tokenizer.vocab_size - 1, ..config.limits() };
        assert!(Rendering::open(&dir, &limits).is_err());
    }
}
