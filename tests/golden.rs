//! The engine against transformers + PEFT, which share no code with it: `scripts/golden.py` wrote a tiny random checkpoint of
//! every architecture and head, and what the framework says of it in float64.
//!
//! `scripts/golden_joint.py` did the same for a whole joint step: terms, coupling weights, gradients of both models; TRL did for a step of
//! Dr.GRPO (`grpo`).
//!
//! The limits are ten to forty times the distance between the framework's own float32 and float64 on these folders (logits
//! 1.1e-5, gradients 3.9e-6 of a tensor's largest); a term misread moves the values by 0.01 and more.

#[path = "golden-grpo/grpo.rs"]
mod grpo;
#[path = "golden-heads/heads.rs"]
mod heads;
#[path = "common/joint.rs"]
mod joint;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use ares::backend::Cpu;
use ares::model::generate::{Continue, Generator};
use ares::model::pretrained::{ModelSpec, Pretrained};
use ares::model::{
    Adapter, AdapterGrad, AnswerTokens, Ask, Batch, Decoding, Heads, HostTensor, Keep, Version, Workspace,
};
use ares::text::Prompt;
use joint::{Gradients, Opened};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Absolute, for log-probabilities and rewards.
const VALUE_LIMIT: f64 = 1e-4;
/// Absolute, for a joint step's terms and weights, which are means.
const TERM_LIMIT: f64 = 1e-5;
/// Relative to the largest element of each gradient.
const GRADIENT_LIMIT: f64 = 1e-4;

/// `golden.json`
#[derive(Deserialize)]
struct Golden {
    architecture: String,
    /// 0: causal language model.
    labels: usize,
    sequences: Vec<Sequence>,
    base: Vec<Values>,
    adapted: Vec<Values>,
    /// Of the adapted model.
    loss: f64,
}

#[derive(Deserialize)]
struct Sequence {
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// Weights of the loss: one for a language model, one per label for a classifier.
    c: Vec<f64>,
}

/// What one model says of one sequence.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Values {
    /// Of every answer token.
    logprobs: Vec<f64>,
    /// Positions whose logits are given whole.
    positions: Vec<usize>,
    logits: Vec<Vec<f64>>,
    /// What follows the prompt, up to the first near tie.
    greedy: Vec<u32>,
    /// Per label, at the last token.
    reward: Vec<f64>,
}

/// A folder of `tests/golden` with its values.
struct Case {
    name: String,
    golden: Golden,
    opened: Opened<Cpu>,
}

impl Deref for Case {
    type Target = Opened<Cpu>;

    fn deref(&self) -> &Opened<Cpu> {
        &self.opened
    }
}

impl Case {
    fn open(name: String) -> Case {
        let opened = Opened::new(&Cpu::new(), &name);
        let golden: Golden = serde_json::from_slice(&std::fs::read(opened.dir.join("golden.json")).unwrap()).unwrap();
        assert_eq!(opened.model.config.labels(), golden.labels, "{name}");
        assert_eq!((golden.base.len(), golden.adapted.len()), (golden.sequences.len(), golden.sequences.len()));
        Case { name, golden, opened }
    }

    /// Every folder with a language model, or every one with a classifier.
    fn all(causal: bool) -> Vec<Case> {
        let folders = std::fs::read_dir(joint::tests().join("golden")).unwrap();
        let mut names: Vec<String> = folders.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.ends_with(if causal { "-causal" } else { "-reward" }));
        names.sort();
        let cases: Vec<Case> = names.into_iter().map(Case::open).collect();
        let architecture = if causal { "ForCausalLM" } else { "ForSequenceClassification" };
        for family in [
            "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3", "Granite", "Phi3", "Olmo2",
            "Olmo3",
        ] {
            let wanted = match (family, causal) {
                ("Granite", false) => continue, // transformers has no such class
                ("Gemma3", false) => "Gemma3TextForSequenceClassification".to_string(),
                _ => format!("{family}{architecture}"),
            };
            assert!(cases.iter().any(|case| case.golden.architecture == wanted), "no golden folder for {wanted}");
        }
        cases
    }

    /// (without the adapter, its golden values), (with it, its).
    fn versions(&self) -> [(Option<&Adapter<Cpu>>, &[Values]); 2] {
        [(None, &self.golden.base), (Some(&self.adapter), &self.golden.adapted)]
    }

    /// All sequences, those with the same prompt sharing its rows; and each as one segment, its prompt being context.
    fn batches(&self) -> [(&'static str, Batch); 2] {
        let heads = if self.model.config.is_causal() { Heads::Targets } else { Heads::Ends };
        let (mut shared, mut apart) = (Batch::default(), Batch::default());
        for group in self.golden.sequences.chunk_by(|a, b| a.prompt() == b.prompt()) {
            let answers: Vec<_> = group.iter().map(|s| AnswerTokens::new(&s.tokens[s.prompt_tokens..])).collect();
            shared.push(group[0].prompt(), &answers, heads);
            group.iter().for_each(|sequence| sequence.push(&mut apart, heads));
        }
        assert!(shared.groups.len() < apart.groups.len(), "{}: no two sequences share a prompt", self.name);
        [("shared", shared), ("apart", apart)]
    }

    /// Log-probabilities of the answers' tokens, or rewards.
    fn values(&self, ws: &mut Workspace<Cpu>, batch: &Batch, adapter: Option<&Adapter<Cpu>>) -> Vec<f32> {
        if self.model.config.is_causal() {
            self.model.forward_targets(ws, batch, adapter, adapter.is_some()).unwrap().logprob
        } else {
            self.model.forward_scores(ws, batch, adapter).unwrap()
        }
    }
}

impl Sequence {
    fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens]
    }

    fn push(&self, batch: &mut Batch, heads: Heads) {
        batch.push(&[], &[AnswerTokens { tokens: &self.tokens, context: self.prompt_tokens - 1 }], heads);
    }
}

/// Fails unless every value is within `limit` of what is expected; NaN is never within.
fn assert_close<F: Copy + Into<f64>, E: Copy + Into<f64>>(what: &str, found: &[F], expected: &[E], limit: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let (found, expected) = (found.into(), expected.into());
        let difference = (found - expected).abs();
        assert!(difference <= limit, "{what}, value {i}: expected {expected}, found {found}, apart {difference:e}");
    }
}

/// log softmax in f64.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - lse).collect()
}

#[test]
fn log_probabilities_and_rewards() {
    for case in [true, false].into_iter().flat_map(Case::all) {
        let mut ws = case.workspace(256, Keep::Everything);
        for (version, (adapter, expected)) in case.versions().into_iter().enumerate() {
            let expected: Vec<f64> = expected.iter().flat_map(|v| [&v.logprobs[..], &v.reward].concat()).collect();
            assert!(expected.len() >= case.golden.sequences.len());
            for (kind, batch) in case.batches() {
                let what = format!("{}, version {version}, {kind}", case.name);
                assert_close(&what, &case.values(&mut ws, &batch, adapter), &expected, VALUE_LIMIT);
            }
        }
    }
}

/// Ranks and alphas of their own, patterns, layers: `scripts/golden_adapters.py` let PEFT save and read them.
#[test]
fn adapters_of_every_kind() {
    let case = Case::open("llama-causal".to_string());
    let folder = joint::tests().join("golden-adapters");
    let golden: BTreeMap<String, Vec<Vec<f64>>> =
        serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
    assert_eq!(golden.len(), 7);
    for (kind, expected) in golden {
        let adapter = case.model.open_adapter(&folder.join(&kind)).unwrap();
        let mut ws =
            Workspace::new(&case.model.ops, &case.model.config, adapter.rank(), 256, Keep::Everything).unwrap();
        let [(_, batch), _] = case.batches();
        let found = case.values(&mut ws, &batch, Some(&adapter));
        assert_close(&kind, &found, &expected.concat(), VALUE_LIMIT);
        // Saved again, it is the same adapter.
        let again = tempfile::tempdir().unwrap();
        let again = again.path().join("adapter");
        adapter.to_file(&case.model.ops).unwrap().save(&again).unwrap();
        let again = case.model.open_adapter(&again).unwrap();
        assert_eq!(case.values(&mut ws, &batch, Some(&again)), found, "{kind}");
    }
}

/// The head gives log-probabilities of targets only, so every token of the vocabulary is made a target of the same row.
#[test]
fn whole_distributions() {
    for case in Case::all(true) {
        let vocab = case.model.config.vocab_size as u32;
        let mut ws = case.workspace(4 * vocab as usize, Keep::Nothing);
        for (version, (adapter, expected)) in case.versions().into_iter().enumerate() {
            for (i, (sequence, values)) in case.golden.sequences.iter().zip(expected).enumerate() {
                assert!(values.positions.contains(&(sequence.tokens.len() - 1)));
                // One token more than the sequence has, so that its last row is in the batch; nobody reads that token.
                let longer = Sequence { tokens: [&sequence.tokens[..], &[3]].concat(), c: Vec::new(), ..*sequence };
                let mut batch = Batch::default();
                longer.push(&mut batch, Heads::Targets);
                let (first, positions) = (sequence.prompt_tokens - 1, &values.positions);
                let row_of = |position: &usize| batch.rows[position - first];
                let rows: Vec<u32> = positions.iter().flat_map(|p| vec![row_of(p); vocab as usize]).collect();
                batch.targets = positions.iter().flat_map(|_| 0..vocab).collect();
                batch.sequences = vec![0..rows.len(); 1];
                batch.rows = rows;
                let found = case.model.forward_targets(&mut ws, &batch, adapter, false).unwrap().logprob;
                let logits: Vec<f64> = values.logits.iter().flat_map(|row| log_softmax(row)).collect();
                assert_close(&format!("{}, version {version}, sequence {i}", case.name), &found, &logits, VALUE_LIMIT);
            }
        }
    }
}

/// The framework ran each step over the whole sequence again; the engine decodes with its cache, in two slots that are refilled.
#[test]
fn greedy_continuations() {
    let decoding = Decoding { ignore_eos: true, ..Decoding::greedy(12) };
    for case in Case::all(true) {
        let mut ws = case.workspace(256, Keep::Nothing);
        for (version, (adapter, expected)) in case.versions().into_iter().enumerate() {
            let mut generator = Generator::new(&case.model.ops, &case.model.config, 2, 256, ws.capacity).unwrap();
            let sequences = case.golden.sequences.iter().enumerate();
            let requests: Vec<Continue> =
                sequences.map(|(i, s)| Continue { tokens: s.prompt().to_vec(), forced: 0, id: i as u64 }).collect();
            let found = case
                .model
                .generate(&mut [(&mut ws, &mut generator)], &requests, adapter, &decoding, |_| Ok(()))
                .unwrap();
            assert_eq!(found.len(), expected.len());
            for (i, (found, values)) in found.iter().zip(expected).enumerate() {
                let what = format!("{}, version {version}, sequence {i}", case.name);
                assert!(values.greedy.len() >= 8 && found.tokens.len() == 12, "{what}");
                assert_eq!(found.tokens[..values.greedy.len()], values.greedy, "{what}");
            }
        }
    }
}

/// A *trained* checkpoint: its published greedy text, 200 tokens long, comes out letter by letter.
#[test]
#[ignore = "ARES_STORIES260K must name that checkpoint's folder"]
fn published_greedy_text() {
    let dir = PathBuf::from(std::env::var_os("ARES_STORIES260K").expect("ARES_STORIES260K names the folder"));
    let spec = ModelSpec { dir: dir.clone(), adapter: None };
    let mut model = Pretrained::open(&Cpu::new(), &spec, 256, Default::default()).unwrap();
    let decoding = Decoding { ignore_eos: true, ..Decoding::greedy(200) };
    let answers = model.generate(Version::Start, &[Ask::new(Prompt::Tokens(vec![1]), 0)], &decoding).unwrap();
    let expected = std::fs::read_to_string(dir.join("greedy_expected.txt")).unwrap();
    assert_eq!(answers[0].as_ref().unwrap().text.trim(), expected.trim());
}

/// L = Σ c_i · mean of the sequence's answer log-probabilities, or Σ c_ik · reward_ik with the score head's own gradient.
#[test]
fn gradients() {
    for case in [true, false].into_iter().flat_map(Case::all) {
        let (model, adapter, mut ws) = (&case.model, &case.adapter, case.workspace(256, Keep::Everything));
        for (kind, batch) in case.batches() {
            let what = format!("{}, {kind}", case.name);
            let found = case.values(&mut ws, &batch, Some(adapter));
            let sequences = case.golden.sequences.iter().zip(&case.golden.adapted);
            let weights = sequences.flat_map(|(s, v)| match v.logprobs.len() {
                0 => s.c.clone(),
                n => vec![s.c[0] / n as f64; n],
            });
            let weights: Vec<f32> = weights.map(|weight| weight as f32).collect();
            assert_eq!(weights.len(), found.len(), "{what}");
            let loss: f64 = found.iter().zip(&weights).map(|(&f, &w)| f64::from(f) * f64::from(w)).sum();
            assert_close(&format!("{what}, loss"), &[loss as f32], &[case.golden.loss], VALUE_LIMIT);
            let mut grad = AdapterGrad::new(&model.ops, adapter, !model.config.is_causal()).unwrap();
            if model.config.is_causal() {
                model.backward_targets(&mut ws, &weights, adapter, &mut grad).unwrap();
            } else {
                model.backward_scores(&mut ws, &weights, adapter, &mut grad).unwrap();
            }
            assert_gradients(&what, case.gradients(&grad), &case.dir.join("grads.safetensors"));
        }
    }
}

/// Every term is on; the variants differ in what can be set of the objective.
#[test]
fn joint_steps() {
    for (variant, batch_tokens) in ["npo", "sum-kl", "unlikelihood"].into_iter().flat_map(|v| [(v, 24), (v, 4096)]) {
        let golden = joint::Golden::open(variant);
        let what = |part: &str| format!("{variant}, {batch_tokens} rows at a time, {part}");
        let joint::Step { policy: p, reward: r, weights, gradients } = golden.step(&Cpu::new(), batch_tokens);
        let trained = golden.failures.iter().zip(weights).filter(|(f, _)| f.verdict.trains_policy());
        let weights: Vec<f64> = trained.map(|(_, weight)| weight).collect();
        assert_close(&what("coupling"), &weights, &golden.coupling, TERM_LIMIT);
        let terms = [("anchor", r.anchor), ("bt", r.bt), ("center", r.center), ("npo", p.npo)];
        let terms = terms.into_iter().chain([("replay", r.replay), ("retain", p.retain), ("safe", p.safe)]);
        let (names, terms): (Vec<&str>, Vec<f64>) = terms.unzip();
        assert_eq!(names, golden.terms.keys().collect::<Vec<_>>());
        assert_close(&what("terms"), &terms, &golden.terms.values().copied().collect::<Vec<_>>(), TERM_LIMIT);
        let named = |(side, tensors): (&'static str, Gradients)| {
            tensors.into_iter().map(move |(name, tensor)| (format!("{side}.{name}"), tensor))
        };
        let file = joint::tests().join(format!("golden-joint/{variant}.safetensors"));
        assert_gradients(&what("gradients"), gradients.into_iter().flat_map(named).collect(), &file);
    }
}

/// Of a fused matrix: its parts share one A, so their gradients add up; those of B lie one below the other.
fn joined(found: &mut Gradients, name: &str, fused: &str) -> Option<HostTensor> {
    let parts: &[&str] = if fused == "qkv_proj" { &["q_proj", "k_proj", "v_proj"] } else { &["gate_proj", "up_proj"] };
    parts.iter().map(|part| found.remove(&name.replace(fused, part))).reduce(|sum, part| {
        let (mut sum, part) = (sum?, part?);
        if name.contains("lora_A") {
            sum.data.iter_mut().zip(&part.data).for_each(|(sum, part)| *sum += part);
        } else {
            sum.data.extend(part.data);
            sum.shape[0] += part.shape[0];
        }
        Some(sum)
    })?
}

/// Every gradient of `file`, name by name; the engine may have no other.
fn assert_gradients(what: &str, mut found: Gradients, file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    for (name, expected) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let what = format!("{what}, d {name}");
        let found = match ["qkv_proj", "gate_up_proj"].into_iter().find(|fused| name.contains(fused)) {
            Some(fused) => joined(&mut found, &name, fused),
            None => found.remove(&name),
        };
        let found = found.unwrap_or_else(|| panic!("{what}: the engine lacks it"));
        assert_eq!(found.shape, expected.shape(), "{what}");
        let bytes = expected.data().chunks_exact(4);
        let expected: Vec<f32> = bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(f64::from(x.abs())));
        assert!(largest > 0.0, "{what}: a gradient of zeros proves nothing");
        assert_close(&what, &found.data, &expected, GRADIENT_LIMIT * largest);
    }
    assert!(found.is_empty(), "{what}: unexpected gradients of {:?}", found.keys());
}
