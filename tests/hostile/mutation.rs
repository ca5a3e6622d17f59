//! Thousands of damaged files, each given to a process of its own with bounds on time and memory. The program may refuse them, or
//! accept them and then give whole, finite results; all else fails the test.
//!
//! `ARES_HOSTILE=100000` tries so many, `ARES_HOSTILE_SEED=7` others; `--nocapture` shows the counts of each format. In
//! `ARES_HOSTILE_KEEP=DIR` the models that were accepted stay, for `scripts/hostile_check.py`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::mutator::Mutator;
use crate::cli::support::{Folder, command, model};

const INPUTS: usize = 2000;
/// Of computing. The slowest that is accepted takes a tenth; a template may take 5 s in a process of its own.
const SECONDS: u64 = 5;
/// From start to end, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MEMORY: u64 = 6 << 30;

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

const ROWS: &str = r#"{"prompt": "w12 w13", "response": "w14 w15", "id": "a"}
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
enum Format {
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
    Run,
}

/// How many of a hundred inputs are of each.
const SHARES: &[(Format, usize)] = &[
    (Format::Config, 16),
    (Format::Tokenizer, 18),
    (Format::Template, 12),
    (Format::Weights, 12),
    (Format::Index, 4),
    (Format::AdapterConfig, 6),
    (Format::AdapterWeights, 6),
    (Format::Rows, 8),
    (Format::Csv, 4),
    (Format::Experiment, 6),
    (Format::Grammar, 2),
    (Format::Lexicon, 2),
    (Format::Run, 4),
];

fn format_of(number: usize) -> Format {
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
struct Right {
    reward: Folder,
    tokenizers: Vec<String>,
    grammar: String,
    lexicon: String,
    experiment: String,
    search: Folder,
}

impl Right {
    fn new() -> Right {
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
        let example = crate::cli::support::ares("run --example").expect(0, &[]).stdout;
        Right {
            reward,
            tokenizers: [words, rich, bpe, unigram].map(|tokenizer| tokenizer.to_string()).into(),
            grammar: fs::read_to_string("models/framing/grammar.json").unwrap(),
            lexicon: fs::read_to_string("models/refusal.json").unwrap(),
            experiment: example,
            search,
        }
    }

    /// Writes the input into `folder`, which holds the right files of a reward model, and says how it is read.
    fn damage(&self, format: Format, mutator: &mut Mutator, folder: &Folder) -> String {
        let score = |more: &str| format!("score --reward {folder}{more} -i {folder}/rows.jsonl");
        match format {
            Format::Config => {
                folder.write("config.json", mutator.json(&self.reward.read("config.json")));
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
                folder.write("adapter/adapter_config.json", mutator.json(&right));
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
                let data = &self.search;
                format!(
                    "probe --policy models/framing/policy --reward models/framing/reward --judge model:models/judge --calibration \
                     {data}/calibration.jsonl --plausible {data}/discovery.jsonl --grammar {folder}/grammar.json --queries 4 \
                     --max-new-tokens 4 --out {folder}/run"
                )
            }
            Format::Lexicon => {
                folder.write("lexicon.json", mutator.json(&self.lexicon));
                format!("judge --judge lexicon:{folder}/lexicon.json -i {folder}/rows.jsonl")
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

/// What the program did with one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Refused,
    Accepted,
    Panic,
    Abort,
    Hang,
    Wrong,
}

impl Ending {
    fn is_fine(self) -> bool {
        matches!(self, Ending::Refused | Ending::Accepted)
    }
}

/// Runs one command within bounds; returns how it ended, and what it wrote to either stream.
fn ending(line: &str, gives_rows: bool, rows: Option<usize>) -> (Ending, String, String) {
    let mut command = command(line);
    command.stdin(Stdio::null());
    let bounds = [(libc::RLIMIT_CPU, SECONDS), (libc::RLIMIT_AS, MEMORY), (libc::RLIMIT_CORE, 0)];
    // SAFETY: between fork and exec only `setrlimit` is called, which may be.
    unsafe {
        command.pre_exec(move || {
            for (resource, most) in bounds {
                libc::setrlimit(resource, &libc::rlimit { rlim_cur: most, rlim_max: most });
            }
            Ok(())
        });
    }
    let (begin, mut child) = (Instant::now(), command.spawn().unwrap());
    // Read while it runs: a full pipe would make it wait.
    let (out, err) = (read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap()));
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if begin.elapsed() > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let (out, err) = (out.join().unwrap(), err.join().unwrap());
    let fault = err.contains("a fault in ares") || err.contains("fault of ares") || err.contains("panicked");
    let ending = match status {
        None => Ending::Hang,
        Some(status) if matches!(status.signal(), Some(libc::SIGXCPU | libc::SIGKILL)) => Ending::Hang,
        Some(_) if fault => Ending::Panic,
        Some(status) if status.signal().is_some() => Ending::Abort,
        Some(status) if status.code() == Some(0) => match gives_rows {
            true if !whole(&out, rows) => Ending::Wrong,
            _ => Ending::Accepted,
        },
        // A refusal says what is wrong.
        Some(_) if err.contains("error: ") && err.trim().len() > 20 => Ending::Refused,
        Some(_) => Ending::Wrong,
    };
    (ending, out, err)
}

/// Copies the input to where it can be looked at, with what was typed and what came out.
fn keep(folder: &Folder, place: &Path, format: Format, line: &str, out: &str) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let to = place.join(format!("{format:?}-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(to.join("adapter")).unwrap();
    for name in [".", "adapter"] {
        for entry in fs::read_dir(folder.at(name)).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), to.join(name).join(entry.file_name())).unwrap();
        }
    }
    fs::write(to.join("line"), line).unwrap();
    fs::write(to.join("out.jsonl"), out).unwrap();
}

fn read(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Whether each line is a row with a finite number or an error, and, where that is known, there are as many as were asked for.
fn whole(out: &str, rows: Option<usize>) -> bool {
    let good = |line: &str| {
        let Ok(row) = serde_json::from_str::<Value>(line) else { return false };
        let number = ["reward", "p_harm"].iter().any(|key| row[key].as_f64().is_some_and(f64::is_finite));
        number != row["error"].is_string()
    };
    out.lines().all(good) && rows.is_none_or(|rows| out.lines().count() == rows)
}

/// What came of one input.
fn attempt(right: &Right, format: Format, mut mutator: Mutator) -> (Ending, String) {
    let folder = Folder::new();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        fs::copy(right.reward.at(name), folder.at(name)).unwrap();
    }
    fs::create_dir(folder.at("adapter")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = format!("tests/golden/llama-reward/adapter/{name}");
        fs::copy(from, folder.at(&format!("adapter/{name}"))).unwrap();
    }
    folder.write("rows.jsonl", ROWS);
    let line = right.damage(format, &mut mutator, &folder);
    let gives_rows = line.starts_with("score") || line.starts_with("judge");
    let rows = (!matches!(format, Format::Rows | Format::Csv)).then(|| ROWS.lines().count());
    let (ending, out, err) = ending(&line, gives_rows, rows);
    if let Some(place) =
        std::env::var_os("ARES_HOSTILE_KEEP").filter(|_| ending == Ending::Accepted && line.starts_with("score"))
    {
        keep(&folder, &PathBuf::from(place), format, &line, &out);
    }
    (ending, format!("ares {line}\n{err}\n{out}"))
}

/// Else nothing would be known of damage: the experiment alone names models that are not there.
#[test]
fn undamaged_files_are_read() {
    let right = Right::new();
    for (format, _) in SHARES {
        // Each of the tokenizers.
        for _ in 0..4 {
            let (ending, said) = attempt(&right, *format, Mutator::idle());
            match format {
                Format::Experiment => assert!(said.contains("error: grammar.json: cannot read"), "{said}"),
                _ => assert_eq!(ending, Ending::Accepted, "{format:?}: {said}"),
            }
        }
    }
}

#[test]
fn damaged_files_are_refused_or_read_right() {
    let set = |name: &str, default: usize| std::env::var(name).map_or(default, |text| text.parse().expect(name));
    let (inputs, seed) = (set("ARES_HOSTILE", INPUTS), set("ARES_HOSTILE_SEED", 1) as u64);
    let right = Right::new();
    let (next, done) = (AtomicUsize::new(0), Mutex::new((BTreeMap::<_, usize>::new(), Vec::new())));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    // A stride that is prime to a hundred mixes the formats.
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= inputs {
                        return;
                    }
                    let (number, format) = (number * 37, format_of(number * 37));
                    let (ending, said) = attempt(&right, format, Mutator::new(seed << 32 | number as u64));
                    let mut done = done.lock().unwrap();
                    *done.0.entry((format, ending)).or_default() += 1;
                    if !ending.is_fine() {
                        done.1.push(format!("{ending:?} of {format:?}, number {number}: {said}"));
                    }
                }
            });
        }
    });
    let (counts, faults) = done.into_inner().unwrap();
    for ((format, ending), n) in &counts {
        println!("{format:?} {ending:?}: {n}");
    }
    let shown: Vec<&str> = faults.iter().take(20).map(|fault| &fault[..fault.floor_char_boundary(1500)]).collect();
    assert!(faults.is_empty(), "{} of {inputs} inputs (seed {seed}):\n{}", faults.len(), shown.join("\n\n"));
    // That most are refused for another reason, or none is accepted, would say that nothing was tried.
    let total = |ending| counts.iter().filter(|((_, found), _)| *found == ending).map(|(_, n)| n).sum::<usize>();
    assert!(total(Ending::Accepted) > inputs / 10 && total(Ending::Refused) > inputs / 10, "{counts:?}");
}
