//! What is damaged, and what reads it.

use std::fs;

use serde_json::{Value, json};

use super::mutator::Mutator;
use crate::cli::support::{Folder, ares, model};

const JINJA: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if",
    "{% else %}",
    "{% endif %}",
    "{% set x = x ~ x %}",
    "{% set ns = namespace(a=1) %}",
    "{% set ns.a = ns %}",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "f(f)",
    "m.content",
    "messages",
    "loop.index",
    "|trim",
    "|tojson",
    "|join(',')",
    "|indent(9)",
    "|list",
    "|sort",
    "*",
    "**",
    "~",
    "-",
    "not",
    "in",
    "is",
    "range(99999)",
    "[0] * 99999999",
    "'x' * 9999999",
    ".split('')",
    ".count('')",
    ".replace('', 'ab')",
    "[::-1]",
    "[0:",
    "(",
    ")",
    "raise_exception('no')",
    "strftime_now('%Y')",
    "{% generation %}",
    "{% endgeneration %}",
    "ns",
];

pub const ROWS: &str = r#"{"prompt": "w12 w13", "response": "w14 w15", "id": "a"}
{"messages": [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21 w22"}]}
{"tokens": [12, 13, 14], "prompt_tokens": 2}
{"prompt": "w30", "response": "w31", "label": true, "extra": [1, {"a": null}]}"#;

const CSV: &str = "id,prompt,response\n1,w12 w13,w14\n2,\"w15, w16\",\"w17\nw18\"\n3,w19,w20\n";

const SUMMARY: &str = r#"{"schema": 1, "version": "0.1.0", "benchmark_id": "ab", "device": "cpu", "seeds": [1], "suite": null,
    "thresholds": {"tau_h": 0.5, "tau_r": 0.3, "mu_0": 0.0, "s": 1.0},
    "decoding": {"max_new_tokens": 40, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0, "ignore_eos": false},
    "before": {"cfr": 0.1389, "ci95": [0.118, 0.161], "n": 1008}, "methods": [{"name": "joint", "seed": 1, "cfr": 0.1, "n": 1008,
    "gates": [{"name": "drift", "value": 0.1, "limit": 0.2, "n": 5, "pass": true}], "accepted": true}], "splits": {"test": {"hash": "a", "n": 3}}}"#;

const OUTCOMES: &str = r#"{"method": "before", "seed": 1, "id": "0", "tau_h": 0.5, "tau_r": 0.3, "domain": "forge", "topic": "x", "tactic": "plain", "kind": "harmful", "prompt": "p", "response": "r", "p_harm": 0.9, "reward": 1.5, "verdict": "coupled"}
{"method": "joint", "seed": 1, "id": "0", "tau_h": 0.5, "tau_r": 0.3, "domain": "forge", "topic": "x", "tactic": "plain", "kind": "harmful", "prompt": "p", "response": "r", "p_harm": 0.1, "reward": 0.5, "verdict": "sound"}"#;

/// What is damaged, and what reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    Config,
    Tokenizer,
    Template,
    Weights,
    Index,
    AdapterConfig,
    AdapterWeights,
    Rows,
    Csv,
    Experiment,
    Grammar,
    Lexicon,
    Guard,
    Encoder,
    Run,
    Journal,
}

/// A search of four queries over `grammar`.
fn probe(data: &Folder, grammar: &str, more: &str) -> String {
    format!(
        "probe --policy models/framing/policy --reward models/framing/reward --judge model:models/judge --calibration \
         {data}/calibration.jsonl --plausible {data}/discovery.jsonl --grammar {grammar} --queries 4 --max-new-tokens 4 {more}"
    )
}

/// How many of a hundred inputs are of each.
pub const SHARES: &[(Format, usize)] = &[
    (Format::Config, 16),
    (Format::Tokenizer, 17),
    (Format::Template, 11),
    (Format::Weights, 11),
    (Format::Index, 4),
    (Format::AdapterConfig, 6),
    (Format::AdapterWeights, 6),
    (Format::Rows, 6),
    (Format::Csv, 4),
    (Format::Experiment, 6),
    (Format::Grammar, 2),
    (Format::Lexicon, 2),
    (Format::Guard, 2),
    (Format::Encoder, 2),
    (Format::Run, 3),
    (Format::Journal, 2),
];

pub fn format_of(number: usize) -> Format {
    let mut at = number % 100;
    for (format, share) in SHARES {
        match at.checked_sub(*share) {
            None => return *format,
            Some(rest) => at = rest,
        }
    }
    unreachable!("the shares sum to a hundred")
}

/// Files that are right, of which each input damages one.
pub struct Right {
    pub reward: Folder,
    tokenizers: Vec<String>,
    grammar: String,
    lexicon: String,
    experiment: String,
    search: Folder,
    guard: String,
    /// A search that is done, by name and content.
    run: Vec<(String, Vec<u8>)>,
}

impl Right {
    pub fn new() -> Right {
        let reward = model("llama-reward");
        let words: Value = serde_json::from_str(&reward.read("tokenizer.json")).unwrap();
        let replace = |pattern: Value| json!({"type": "Replace", "pattern": pattern, "content": " "});
        let mut rich = words.clone();
        rich["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, replace(json!({"Regex": "^ +| +$"})),
            replace(json!({"String": "  "})), {"type": "Strip", "strip_left": true, "strip_right": true}]});
        rich["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
            {"type": "Split", "pattern": {"Regex": "\\d+|[^\\d]+"}, "behavior": "Isolated", "invert": false}]});
        rich["post_processor"] = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}});
        rich["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let bpe = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": {"type": "ByteLevel"},
            "added_tokens": words["added_tokens"], "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "model": {"type": "BPE", "unk_token": "w", "fuse_unk": false, "byte_fallback": false, "vocab": {"w": 0, "1": 1, "</s>": 2, "2": 3,
            "w1": 4, "Ġ": 5, "Ġw": 6, "Ġw1": 7}, "merges": [["w", "1"], ["Ġ", "w"], ["Ġw", "1"]]}});
        let unigram = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "Prepend", "prepend": "▁"},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}, "post_processor": null,
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}, "added_tokens": [],
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["▁w", -1.0], ["1", -2.0], ["2", -2.5],
            ["▁", -3.0], ["w", -3.5]]}});
        let search = Folder::new();
        for name in ["calibration", "discovery"] {
            let text = fs::read_to_string(format!("models/framing/{name}.jsonl")).unwrap();
            search.write(
                &format!("{name}.jsonl"),
                text.lines().take(40).map(|line| format!("{line}\n")).collect::<String>(),
            );
        }
        let example = ares("run --example").expect(0, &[]).stdout;
        let done = search.at("done");
        ares(&probe(&search, "models/framing/grammar.json", &format!("--out {}", done.display()))).expect(0, &[]);
        let files = fs::read_dir(done).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
        let run = files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(path).unwrap()));
        let run = run.collect();
        Right {
            reward,
            tokenizers: [words, rich, bpe, unigram].map(|tokenizer| tokenizer.to_string()).into(),
            grammar: fs::read_to_string("models/framing/grammar.json").unwrap(),
            lexicon: fs::read_to_string("models/refusal.json").unwrap(),
            experiment: example,
            guard: fs::read_to_string("models/guard/guard.toml").unwrap(),
            run,
            search,
        }
    }

    /// Writes the input into `folder`, which holds the right files of a reward model, and says how it is read.
    pub fn damage(&self, format: Format, mutator: &mut Mutator, folder: &Folder) -> String {
        let score = |more: &str| format!("score --reward {folder}{more} -i {folder}/rows.jsonl");
        match format {
            Format::Config => {
                let mut right: Value = serde_json::from_str(&self.reward.read("config.json")).unwrap();
                if mutator.below(3) == 0 {
                    let theirs = json!({"architectures": ["RewardModel"], "value_head_prefix": "score", "normalize_reward": true,
                        "mean": 0.25, "std": 1.5, "pad_token_id": 2});
                    right.as_object_mut().unwrap().extend(theirs.as_object().unwrap().clone());
                }
                folder.write("config.json", mutator.json(&right.to_string()));
                score("")
            }
            Format::Tokenizer => {
                let at = mutator.below(self.tokenizers.len());
                folder.write("tokenizer.json", mutator.json(&self.tokenizers[at]));
                score(if mutator.below(2) == 0 { "" } else { " --raw" })
            }
            Format::Template => {
                let mut config: Value = serde_json::from_str(&self.reward.read("tokenizer_config.json")).unwrap();
                let template = mutator.tokens(config["chat_template"].as_str().unwrap(), JINJA);
                config["chat_template"] = template.into();
                folder.write("tokenizer_config.json", config.to_string());
                score("")
            }
            Format::Weights => {
                let right = fs::read(self.reward.at("model.safetensors")).unwrap();
                folder.write("model.safetensors", mutator.safetensors(&right));
                score("")
            }
            Format::Index => {
                fs::rename(folder.at("model.safetensors"), folder.at("part.safetensors")).unwrap();
                let bytes = fs::read(folder.at("part.safetensors")).unwrap();
                let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
                let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
                let map: serde_json::Map<_, _> = names.map(|name| (name.clone(), json!("part.safetensors"))).collect();
                let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
                folder.write("model.safetensors.index.json", mutator.json(&index.to_string()));
                score("")
            }
            Format::AdapterConfig => {
                let right = fs::read_to_string("tests/golden/llama-reward/adapter/adapter_config.json").unwrap();
                let mut right: Value = serde_json::from_str(&right).unwrap();
                if mutator.below(2) == 0 {
                    let rank = right["r"].clone();
                    let own = json!({"target_modules": r".*\.[a-z]+_proj", "rank_pattern": {"q_proj": rank, "layers.1.mlp.up_proj": rank},
                        "alpha_pattern": {"[kv]_proj": 5, "o_proj": 0.5}, "exclude_modules": ["lm_head"]});
                    right.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
                }
                folder.write("adapter/adapter_config.json", mutator.json(&right.to_string()));
                score(&format!("+{folder}/adapter"))
            }
            Format::AdapterWeights => {
                let right = fs::read("tests/golden/llama-reward/adapter/adapter_model.safetensors").unwrap();
                folder.write("adapter/adapter_model.safetensors", mutator.safetensors(&right));
                score(&format!("+{folder}/adapter"))
            }
            Format::Rows => {
                folder.write("rows.jsonl", mutator.lines(ROWS));
                score("")
            }
            Format::Csv => {
                folder.write("rows.csv", mutator.bytes(CSV.as_bytes()));
                format!("score --reward {folder} -i {folder}/rows.csv")
            }
            Format::Experiment => {
                // The models that it names are not there, so what is right ends there.
                let words = [
                    "[repair]",
                    "=",
                    "nan",
                    "-1",
                    "1e308",
                    "\"\"",
                    "[[1]]",
                    "seed",
                    "steps = 0",
                    "rank",
                    "#",
                    "inf",
                    "'",
                    "{",
                ];
                folder.write("loop.toml", mutator.tokens(&self.experiment, &words));
                format!("run {folder}/loop.toml --out {folder}/run")
            }
            Format::Grammar => {
                folder.write("grammar.json", mutator.json(&self.grammar));
                probe(&self.search, &format!("{folder}/grammar.json"), &format!("--out {folder}/run"))
            }
            Format::Lexicon => {
                folder.write("lexicon.json", mutator.json(&self.lexicon));
                format!("judge --judge lexicon:{folder}/lexicon.json -i {folder}/rows.jsonl")
            }
            Format::Guard => {
                let words = [
                    "[[verdict]]",
                    "harmful = 1.0",
                    "refusal",
                    "=",
                    "nan",
                    "-1",
                    "[]",
                    "\"\"",
                    "texts",
                    "template = \"{prompt}{response}\"",
                    "'",
                ];
                folder.write("guard.toml", mutator.tokens(&self.guard, &words));
                format!("judge --judge guard:models/guard,{folder}/guard.toml -i {folder}/rows.jsonl")
            }
            Format::Encoder => {
                let family = ["bert", "roberta", "distilbert", "modernbert"][mutator.below(4)];
                fs::create_dir(folder.at("encoder")).unwrap();
                for name in ["config.json", "tokenizer.json", "model.safetensors"] {
                    fs::copy(format!("tests/golden-encoders/{family}/{name}"), folder.at(&format!("encoder/{name}")))
                        .unwrap();
                }
                match mutator.below(3) {
                    0 => folder.write("encoder/model.safetensors", {
                        let right = fs::read(folder.at("encoder/model.safetensors")).unwrap();
                        mutator.safetensors(&right)
                    }),
                    _ => folder.write("encoder/config.json", mutator.json(&folder.read("encoder/config.json"))),
                }
                format!("judge --judge model:{folder}/encoder -i {folder}/rows.jsonl")
            }
            Format::Journal => {
                fs::create_dir(folder.at("run")).unwrap();
                for (name, right) in &self.run {
                    let text = || std::str::from_utf8(right).unwrap();
                    let damaged = if name == "journal.jsonl" { mutator.lines(text()) } else { right.clone() };
                    folder.write(&format!("run/{name}"), damaged);
                }
                format!("probe --resume {folder}/run")
            }
            Format::Run => {
                let which = mutator.below(2);
                let damaged = |at: usize, right: &str, mutator: &mut Mutator| match at == which {
                    true if at == 0 => mutator.json(right),
                    true => mutator.lines(right),
                    false => right.as_bytes().to_vec(),
                };
                fs::create_dir(folder.at("run")).unwrap();
                folder.write("run/summary.json", damaged(0, SUMMARY, mutator));
                folder.write("run/outcomes.jsonl", damaged(1, OUTCOMES, mutator));
                format!("report {folder}/run")
            }
        }
    }
}
