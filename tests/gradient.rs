//! Backward of a whole transformer of two layers = central differences of its forward, every family, both heads: gradients of
//! LoRA A, LoRA B and the score head through packed batches in which answers share prompts. The checkpoints are the tiny random
//! ones of `tests/golden`. (Of each operation: `tests/ops`.)
//!
//! Every tensor is checked along one dense direction, which sees all of its elements, and at its largest element alone.

#[path = "ops/toolkit.rs"]
mod toolkit;

use std::path::Path;

use ares::backend::Cpu;
use ares::model::{Adapter, AdapterFile, AdapterGrad, AdapterInit, AnswerTokens, Batch, Heads, Transformer, Workspace};

use toolkit::{functional, noise};

const RANK: usize = 3;

/// Two groups with shared prompts (one answer begins with forced tokens) and a sequence without prompt.
fn batch(heads: Heads) -> Batch {
    let tokens = |seed: u64, len: usize| -> Vec<u32> {
        noise(seed, len).iter().map(|v| ((v + 1.0) * 45.0) as u32 + 5).collect()
    };
    let mut batch = Batch::default();
    let (a, b, c) = (tokens(1, 7), tokens(2, 4), tokens(3, 1));
    let forced = AnswerTokens { tokens: &b, context: 2 };
    batch.push(&tokens(4, 12), &[AnswerTokens::new(&a), forced, AnswerTokens::new(&c)], heads);
    batch.push(&tokens(5, 1), &[AnswerTokens::new(&b)], heads);
    batch.push(&[], &[AnswerTokens::new(&a)], heads);
    batch
}

/// A model, its adapter as a file, and the loss that is differentiated.
struct Case {
    model: Transformer<Cpu>,
    file: AdapterFile,
    batch: Batch,
    weights: Vec<f32>,
    /// Head rows from here on enter the loss with KL(π_0‖π_θ) instead of log p.
    kl_from: usize,
}

impl Case {
    fn new(name: &str, heads: Heads) -> Case {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let model = Transformer::open(&Cpu::new(), &folder).unwrap();
        let adapter = model.new_adapter(RANK, 5.0, AdapterInit::Random { seed: 9 }).unwrap();
        let file = adapter.to_file(&model.ops).unwrap();
        let batch = batch(heads);
        let outputs = batch.rows.len() * model.config.labels().max(1);
        Case { file, weights: noise(11, outputs), kl_from: batch.rows.len() * 2 / 3, batch, model }
    }

    /// The loss under `file`; with `grad` its gradient as well, under the same names.
    fn run(&self, ws: &mut Workspace<Cpu>, file: &AdapterFile, grad: Option<&mut AdapterGrad<Cpu>>) -> f64 {
        let (model, batch) = (&self.model, &self.batch);
        let adapter = Adapter::load(&model.ops, &model.config, file, None).unwrap();
        let outputs = if model.config.is_causal() {
            let mut outputs = model.forward_targets(ws, batch, Some(&adapter), true).unwrap().logprob;
            outputs.truncate(self.kl_from);
            outputs.extend(model.kl_targets(ws, self.kl_from).unwrap());
            outputs
        } else {
            model.forward_scores(ws, batch, Some(&adapter)).unwrap()
        };
        match grad {
            Some(grad) if model.config.is_causal() => {
                model.backward_targets(ws, &self.weights, &adapter, grad).unwrap()
            }
            Some(grad) => model.backward_scores(ws, &self.weights, &adapter, grad).unwrap(),
            None => {}
        }
        functional(&self.weights, &outputs)
    }

    /// Central difference of the loss along `direction` of one tensor.
    fn slope(&self, ws: &mut Workspace<Cpu>, tensor: &str, direction: &[f32]) -> f64 {
        let mut central = |step: f32| {
            let mut at = |step: f32| {
                let mut file = self.file.clone();
                let data = &mut file.tensors.get_mut(tensor).unwrap().data;
                data.iter_mut().zip(direction).for_each(|(v, d)| *v += step * d);
                self.run(ws, &file, None)
            };
            (at(step) - at(-step)) / (2.0 * f64::from(step))
        };
        (4.0 * central(5e-3) - central(1e-2)) / 3.0
    }
}

fn check(name: &str, heads: Heads) {
    let case = Case::new(name, heads);
    let (ops, config) = (&case.model.ops, &case.model.config);
    let mut ws = Workspace::new(ops, config, RANK, case.batch.len() + 5, true).unwrap();
    if config.is_causal() {
        case.model.keep_start_rows(&mut ws, &case.batch, case.kl_from).unwrap();
    }
    let adapter = Adapter::load(ops, config, &case.file, None).unwrap();
    let mut grad = AdapterGrad::new(ops, &adapter, true).unwrap();
    case.run(&mut ws, &case.file, Some(&mut grad));
    let found = adapter.gradients_to_file(ops, &grad).unwrap();
    assert_eq!(found.tensors.len(), case.file.tensors.len(), "{name}: a gradient for every tensor");
    for (i, (tensor, gradient)) in found.tensors.iter().enumerate() {
        let gradient = &gradient.data;
        let norm = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        assert!(norm > 1e-4, "{name}, {tensor}: the loss does not depend on it (gradient norm {norm:e})");
        // ±1 in every element: the slope is of the gradient's norm, and no element can hide.
        let dense: Vec<f32> = noise(100 + i as u64, gradient.len()).iter().map(|v| v.signum()).collect();
        let single = |at: usize| -> Vec<f32> { (0..gradient.len()).map(|j| f32::from(j == at)).collect() };
        let largest = (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
        for (kind, direction) in [("dense", dense), ("largest", single(largest))] {
            let expected = case.slope(&mut ws, tensor, &direction);
            let slope = functional(&direction, gradient);
            assert!(
                (slope - expected).abs() <= 2e-3 * norm,
                "{name}, {tensor}, {kind}: found {slope}, expected {expected} (gradient norm {norm})"
            );
        }
    }
}

#[test]
fn policies() {
    for name in ["llama-causal", "llama3-causal", "mistral-causal", "qwen2-causal", "qwen3-causal"] {
        check(name, Heads::Targets);
    }
}

#[test]
fn reward_models() {
    for name in ["llama-reward", "llama3-reward", "mistral-reward", "qwen2-reward", "qwen3-reward"] {
        check(name, Heads::Ends);
    }
}
