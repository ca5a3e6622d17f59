//! What reads the files of others, one entry per format, for a fuzzer to call: `fuzz/` builds it with the coverage that guides one,
//! and the test below reads every seed and every input that once broke something.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::attacker::{self, Task, Told, Way};
use crate::backend::Cpu;
use crate::backend::cuda::pack::Pack;
use crate::detect::rows::EvalRow;
use crate::error::Result;
use crate::journal::Journal;
use crate::judge::guard::form::Form;
use crate::judge::lexicon::Lexicon;
use crate::judge::truth::Truth;
use crate::model::adapter_file::AdapterFile;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::encoder::Encoder;
use crate::probe::grammar::Grammar;
use crate::probe::operators::mutate;
use crate::probe::sampler::{Sampler, SamplerKind};
use crate::probe::weights::SamplerWeights;
use crate::repair::data::Failure;
use crate::report;
use crate::text::specials::Specials;
use crate::text::tokenizer::Tokenizer;
use crate::text::{Message, Prompt, Rendering, Row, rows};

/// One format.
pub struct Format {
    pub name: &'static str,
    /// The file that holds it, in a folder that is right otherwise.
    file: &'static str,
    read: fn(&Path, &Path) -> Result<()>,
}

/// Every format of a file that may come from elsewhere.
pub const FORMATS: &[Format] = &[
    Format { name: "config", file: "config.json", read: |_, folder| ModelConfig::open(folder).map(drop) },
    Format { name: "encoder", file: "config.json", read: |_, folder| encoder(folder) },
    Format { name: "weights", file: "model.safetensors", read: |_, folder| weights(folder) },
    Format { name: "index", file: "model.safetensors.index.json", read: |_, folder| weights(folder) },
    Format { name: "tokenizer", file: "tokenizer.json", read: |_, folder| tokenizer(folder) },
    Format { name: "pattern", file: "pattern", read: |file, folder| pattern(file, folder) },
    Format { name: "template", file: "chat_template.jinja", read: |_, folder| template(folder) },
    Format { name: "adapter-config", file: "adapter_config.json", read: |_, folder| adapter(folder) },
    Format { name: "adapter", file: "adapter_model.safetensors", read: |_, folder| adapter(folder) },
    Format { name: "rows", file: "rows.jsonl", read: |file, _| every_row(file) },
    Format { name: "csv", file: "rows.csv", read: |file, _| every_row(file) },
    Format { name: "experiment", file: "loop.toml", read: |file, _| crate::run::config::read(file).map(drop) },
    Format { name: "grammar", file: "grammar.json", read: |file, _| grammar(file) },
    Format { name: "sampler", file: "sampler.json", read: |file, _| SamplerWeights::read(file).map(drop) },
    Format { name: "lexicon", file: "lexicon.json", read: |file, _| lexicon(file) },
    Format { name: "truth", file: "truth.json", read: |file, _| truth(file) },
    Format { name: "guard", file: "guard.toml", read: |file, _| guard(file) },
    Format { name: "attacker", file: "attacker.toml", read: |file, _| attacker(file) },
    Format { name: "pack", file: "kernels.pack", read: |file, _| pack(file) },
    Format { name: "journal", file: "journal.jsonl", read: |_, folder| journal(folder) },
    Format { name: "receipt", file: "run.toml", read: |_, folder| report::write(folder, &[]).map(drop) },
    Format { name: "summary", file: "summary.json", read: |_, folder| report::write(folder, &[]).map(drop) },
    Format { name: "outcomes", file: "outcomes.jsonl", read: |_, folder| report::write(folder, &[]).map(drop) },
];

/// A folder in which every file is right, but for the one that an input stands in for.
pub struct Reader {
    format: &'static Format,
    folder: PathBuf,
}

impl Reader {
    /// Prepares `folder` from the files that the repository at `root` holds. Fails where they cannot be copied.
    pub fn new(format: &'static Format, root: &Path, folder: &Path) -> std::io::Result<Reader> {
        let right = if format.name == "encoder" { ENCODER } else { RIGHT };
        for (from, name) in right {
            if *name != format.file && !(format.name == "index" && *name == "model.safetensors") {
                fs::copy(root.join(from), folder.join(name))?;
            }
        }
        if format.name == "index" {
            fs::copy(root.join(RIGHT[1].0), folder.join("part.safetensors"))?;
        }
        Ok(Reader { format, folder: folder.to_path_buf() })
    }

    /// Files to begin from: right ones, and those that once broke something.
    pub fn seeds(&self, root: &Path) -> Vec<PathBuf> {
        let own = fs::read_dir(root.join("fuzz/seeds").join(self.format.name)).into_iter().flatten().flatten();
        let examples = EXAMPLES.iter().filter(|(name, _)| *name == self.format.name).flat_map(|(_, files)| *files);
        own.map(|entry| entry.path()).chain(examples.map(|file| root.join(file))).collect()
    }

    /// Reads `input`; what is refused is as good as what is not. Returns whether it was read.
    pub fn read(&self, input: &[u8]) -> bool {
        let file = self.folder.join(self.format.file);
        fs::write(&file, input).expect("the folder can be written to");
        (self.format.read)(&file, &self.folder).is_ok()
    }
}

/// Of some formats the repository holds right files already; others lie in `fuzz/seeds`.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "config",
        &[
            "tests/golden/llama-reward/config.json",
            "tests/golden/llama3-reward/config.json",
            "tests/golden/qwen3-causal/config.json",
            "tests/golden/mistral-causal/config.json",
        ],
    ),
    ("encoder", &["tests/golden-encoders/bert/config.json"]),
    ("weights", &["tests/golden/llama-reward/model.safetensors"]),
    (
        "adapter-config",
        &[
            "tests/golden/llama-reward/adapter/adapter_config.json",
            "tests/golden-adapters/ranks/adapter_config.json",
            "tests/golden-adapters/pattern/adapter_config.json",
            "tests/golden-adapters/layers/adapter_config.json",
        ],
    ),
    ("adapter", &["tests/golden/llama-reward/adapter/adapter_model.safetensors"]),
    ("grammar", &["models/framing/grammar.json"]),
    ("lexicon", &["models/refusal.json"]),
    ("truth", &["models/truth.json"]),
    ("guard", &["models/guard/guard.toml", "src/judge/guard/forms/wildguard.toml"]),
];

const RIGHT: &[(&str, &str)] = &[
    ("tests/golden/llama-reward/config.json", "config.json"),
    ("tests/golden/llama-reward/model.safetensors", "model.safetensors"),
    ("tests/golden/llama-reward/adapter/adapter_config.json", "adapter_config.json"),
    ("tests/golden/llama-reward/adapter/adapter_model.safetensors", "adapter_model.safetensors"),
    ("fuzz/seeds/tokenizer/words", "tokenizer.json"),
    ("fuzz/seeds/summary/demo", "summary.json"),
    ("fuzz/seeds/outcomes/two", "outcomes.jsonl"),
];

const ENCODER: &[(&str, &str)] = &[
    ("tests/golden-encoders/bert/model.safetensors", "model.safetensors"),
    ("tests/golden-encoders/bert/tokenizer.json", "tokenizer.json"),
];

const TEXTS: [&str; 5] = [
    "",
    "w12 w13\n w14",
    "  Hello, wörld!\r\n\r\n123 4567 [INST] </s>",
    "\u{0}\u{200b}e\u{301}한글",
    "aaaaaaaaaaaaaaaa",
];

fn weights(folder: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(folder, &ModelConfig::open(folder)?)?;
    for shard in checkpoint.shards() {
        for (name, info) in shard.tensors() {
            let _ = shard.read(&name, &info, &mut Vec::new());
        }
    }
    Ok(())
}

fn encoder(folder: &Path) -> Result<()> {
    let Some(encoder) = Encoder::open(&Cpu::new(), folder, 64, Arc::default())? else {
        return ModelConfig::open(folder).map(drop);
    };
    let texts = TEXTS.map(|text| (Prompt::Raw(String::new()), text));
    let rendered = encoder.rendering.fulls(texts.iter().map(|(prompt, text)| (prompt, *text)).collect());
    encoder.scores(rendered)?.into_iter().try_for_each(|scores| scores.map(drop))
}

fn adapter(folder: &Path) -> Result<()> {
    AdapterFile::open(folder, &ModelConfig::open(folder)?).map(drop)
}

fn tokenizer(folder: &Path) -> Result<()> {
    let tokenizer = Tokenizer::open(folder, &Specials::default())?;
    for text in TEXTS {
        let _ = tokenizer.escape(text, &[]);
        if let Ok(ids) = tokenizer.encode(text, true) {
            tokenizer.decode(&ids, true)?;
        }
    }
    tokenizer.decode(&[0, 1, 2, u32::MAX], false).map(drop)
}

/// A regular expression as tokenizers have it, in a tokenizer that is right otherwise.
fn pattern(file: &Path, folder: &Path) -> Result<()> {
    let pattern = crate::text::input::read_text(file)?;
    let part = serde_json::json!({"Regex": pattern});
    let definition = serde_json::json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "decoder": null,
        "normalizer": {"type": "Replace", "pattern": part, "content": "x"}, "post_processor": null,
        "pre_tokenizer": {"type": "Split", "pattern": part, "behavior": "Isolated", "invert": false},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"}});
    fs::write(folder.join("tokenizer.json"), definition.to_string()).expect("the folder can be written to");
    tokenizer(folder)
}

fn template(folder: &Path) -> Result<()> {
    let config = ModelConfig::open(folder)?;
    let rendering = Rendering::open(folder, &config.limits())?;
    let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let chat =
        Prompt::Chat(vec![turn("system", "w1"), turn("user", "w2\nw3"), turn("assistant", "w4"), turn("user", "")]);
    for prompt in [Prompt::user("w5 w6"), chat] {
        let _ = rendering.prompt_tokens(&prompt);
        let _ = rendering.with_answer(&prompt, "w7 w8");
    }
    Ok(())
}

/// Everything that a command may ask of a row.
fn every_row(file: &Path) -> Result<()> {
    for row in rows::read(Some(file), false)? {
        for raw in [false, true] {
            let _ = (
                row.asked(raw, None),
                row.answered(raw),
                row.exchange(raw, None),
                EvalRow::read(&row, None, raw, None),
            );
        }
        let _ =
            (row.pairs(), row.calibration_pairs(), row.halves(), EvalRow::of_split(&row, None), Failure::read(&row));
        let _ = (row.name(), row.reference(), row.number("reward"));
    }
    rows::read(Some(file), true)?.iter().try_for_each(|row: &Row| row.prompt(false).map(drop))
}

fn grammar(file: &Path) -> Result<()> {
    let (grammar, mut rng) = (Grammar::read(file)?, ChaCha8Rng::seed_from_u64(0));
    let sampler = Sampler::new(SamplerKind::Thompson, &grammar);
    for _ in 0..4 {
        let [parent, mate, target] = std::array::from_fn(|_| sampler.draw(&grammar, None, &mut rng));
        let child = mutate(&grammar, (0, parent), (1, mate), &target, &mut rng);
        let _ = (grammar.compose(&child.genotype), grammar.compose_plain(&parent));
    }
    Ok(())
}

fn lexicon(file: &Path) -> Result<()> {
    let lexicon = Lexicon::open(file)?;
    let _ = TEXTS.map(|text| lexicon.hits(text));
    Ok(())
}

fn truth(file: &Path) -> Result<()> {
    let truth = Truth::open(file)?;
    let steps = vec![vec!["hello".to_string()], vec!["w12".into(), "123".into()]];
    let _ = TEXTS.map(|text| (truth.is_harmful(&steps, text), truth.is_served(&steps, text)));
    Ok(())
}

fn guard(file: &Path) -> Result<()> {
    let form = Form::parse(&crate::text::input::read_text(file)?, file)?;
    let _ = (form.ask(TEXTS[1], TEXTS[2]), form.literals("{{ '[INST]' }} <|end|>"));
    Ok(())
}

fn attacker(file: &Path) -> Result<()> {
    let form = attacker::Form::parse(&crate::text::input::read_text(file)?, file)?;
    form.between(TEXTS[2]);
    let told = Told { prompt: TEXTS[1].into(), p_harm: 0.5, margin: f64::NAN };
    for way in Way::ALL {
        let (parent, mate, text) = (Some(told.clone()), None, String::from(TEXTS[2]));
        let [goal, request, persona, tactic, example] = std::array::from_fn(|_| text.clone());
        form.told(&Task { way, goal, request, persona, tactic, example, parent, mate, elites: vec![text], number: 0 });
    }
    Ok(())
}

/// The checksum at the end is made to fit: no input would get past it by chance.
fn pack(file: &Path) -> Result<()> {
    let mut bytes = fs::read(file).unwrap_or_default();
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum);
    fs::write(file, bytes).expect("the folder can be written to");
    Pack::read(file).map(drop)
}

fn journal(folder: &Path) -> Result<()> {
    let mut journal = Journal::open(folder, Default::default())?;
    journal.stage("search");
    let _ = journal.unit(|| Ok(0_u64))?;
    journal.stage("answers");
    journal.portions(&[1, 2, 3], |items| Ok(items.iter().map(|item| *item as f64).collect())).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_read_or_refused() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for format in FORMATS {
            let folder = tempfile::tempdir().unwrap();
            let reader = Reader::new(format, root, folder.path()).unwrap();
            let seeds = reader.seeds(root);
            let read = seeds.iter().filter(|file| reader.read(&fs::read(file).unwrap())).count();
            // A fuzzer that begins from nothing right stays at the door.
            assert!(read > 0, "{}: {read} of {} seeds are read", format.name, seeds.len());
        }
    }
}
