//! Whole models and one whole joint step on a device = the same on `Cpu::rounded()`, with the random checkpoints of
//! `tests/golden`. (Each operation: `tests/ops`.) On the simulator always; on a GPU with ARES_PARITY_DEVICE=cuda
//! (ARES_REQUIRE_GPU=1 turns a skip into a failure).

#[path = "common/joint.rs"]
mod joint;
#[path = "ops/toolkit.rs"]
mod toolkit;

use std::collections::BTreeMap;
use std::path::Path;

use ares::model::generate::{Continue, Generator};
use ares::model::{Adapter, AdapterGrad, AnswerTokens, Batch, Decoding, Heads, HostTensor};
use ares::model::{Transformer, Workspace};
use ares::ops::Ops;

use ares::backend::Cpu;

use joint::Golden;
use toolkit::device;

const FOLDERS: &[&str] = &["llama", "llama3", "mistral", "qwen2", "qwen3"];

/// A model with its adapter, and a ragged batch: a shared prompt, a prompt of its own, none.
struct Case<B: Ops> {
    model: Transformer<B>,
    adapter: Adapter<B>,
    workspace: Workspace<B>,
}

impl<B: Ops> Case<B> {
    fn open(ops: &B, name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let model = Transformer::open(ops, &dir).unwrap();
        let adapter = model.open_adapter(&dir.join("adapter")).unwrap();
        let workspace = Workspace::new(ops, &model.config, adapter.rank(), 256, true).unwrap();
        Case { model, adapter, workspace }
    }

    fn batch(&self, heads: Heads) -> Batch {
        let vocab = self.model.config.vocab_size as u32;
        let tokens = |seed: u32, n: u32| (0..n).map(|i| (seed * 131 + i * i * 7 + i) % vocab).collect::<Vec<u32>>();
        let mut batch = Batch::default();
        let (a, b, c) = (tokens(1, 9), tokens(2, 17), tokens(3, 1));
        batch.push(&tokens(4, 21), &[AnswerTokens::new(&a), AnswerTokens { tokens: &b, context: 3 }], heads);
        batch.push(&tokens(5, 2), &[AnswerTokens::new(&c)], heads);
        batch.push(&[], &[AnswerTokens::new(&tokens(6, 70))], heads);
        batch
    }

    /// Values without and with the adapter, then the adapter's gradients.
    fn outcome(&mut self) -> Outcome {
        let causal = self.model.config.is_causal();
        let batch = self.batch(if causal { Heads::Targets } else { Heads::Ends });
        let (model, adapter, ws) = (&self.model, &self.adapter, &mut self.workspace);
        let mut grad = AdapterGrad::new(&model.ops, adapter, !causal).unwrap();
        let values = if causal {
            let plain = model.forward_targets(ws, &batch, None, false).unwrap();
            let adapted = model.forward_targets(ws, &batch, Some(adapter), true).unwrap();
            let weights: Vec<f32> = (0..batch.rows.len()).map(|i| (i as f32 * 0.7).sin()).collect();
            model.backward_targets(ws, &weights, adapter, &mut grad).unwrap();
            vec![plain.logprob, plain.log_rest, adapted.logprob, adapted.log_rest]
        } else {
            let plain = model.forward_scores(ws, &batch, None).unwrap();
            let adapted = model.forward_scores(ws, &batch, Some(adapter)).unwrap();
            let weights: Vec<f32> = (0..adapted.len()).map(|i| 1.0 - 0.6 * i as f32).collect();
            model.backward_scores(ws, &weights, adapter, &mut grad).unwrap();
            vec![plain, adapted]
        };
        (values, adapter.gradients_to_file(&model.ops, &grad).unwrap().tensors)
    }
}

/// Root of the mean square difference over the root of the mean square; NaN where either has one.
fn apart(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(f, e)| f64::from(f - e)));
    (difference / square(&mut expected.iter().map(|&e| f64::from(e)))).sqrt()
}

type Gradients = BTreeMap<String, HostTensor>;
type Outcome = (Vec<Vec<f32>>, Gradients);

/// How far two ways of rounding to bf16 may lie apart, as a multiple of how far rounding itself lies from f32: two sums of equal
/// and independent errors are apart by √2 of one of them, more over a handful of values; a term left out or misplaced is apart by tens.
const APART: f64 = 2.0;

/// And how far at most, relative to what is expected, however much bf16 itself loses: 0.038 was found.
const AT_MOST: f64 = 0.06;

/// `exact` is the f32 reference, `rounded` the one that rounds where the device does.
fn compare(what: &str, found: &Outcome, rounded: &Outcome, exact: &Outcome) {
    for (i, (found, (rounded, exact))) in found.0.iter().zip(rounded.0.iter().zip(&exact.0)).enumerate() {
        assert_near(&format!("{what}, values {i}"), found, rounded, exact);
    }
    gradients(what, &found.1, &rounded.1, &exact.1);
}

fn assert_near(what: &str, found: &[f32], rounded: &[f32], exact: &[f32]) {
    let (distance, own) = (apart(found, rounded), apart(rounded, exact));
    let limit = (APART * own + 1e-4).min(AT_MOST);
    assert!(distance <= limit, "{what}: relative distance {distance}, limit {limit}, bf16's own {own}");
}

fn gradients(what: &str, found: &Gradients, rounded: &Gradients, exact: &Gradients) {
    assert_eq!(found.keys().collect::<Vec<_>>(), rounded.keys().collect::<Vec<_>>(), "{what}");
    for (name, exact) in exact {
        assert!(exact.data.iter().any(|&x| x != 0.0), "{what}, d {name}: a gradient of zeros proves nothing");
        assert_near(&format!("{what}, d {name}"), &found[name].data, &rounded[name].data, &exact.data);
    }
}

#[test]
fn models_of_every_family() {
    let Some(device) = device() else { return };
    for family in FOLDERS {
        for head in ["causal", "reward"] {
            let name = format!("{family}-{head}");
            let [rounded, exact] = [Cpu::rounded(), Cpu::new()].map(|cpu| Case::open(&cpu, &name).outcome());
            compare(&name, &Case::open(&device, &name).outcome(), &rounded, &exact);
        }
    }
}

#[test]
fn a_whole_joint_step() {
    let Some(device) = device() else { return };
    for variant in ["npo", "sum-kl", "unlikelihood"] {
        let golden = Golden::open(variant);
        let [found, rounded, exact] =
            [golden.step(&device, 4096), golden.step(&Cpu::rounded(), 4096), golden.step(&Cpu::new(), 4096)];
        for (i, ((found, rounded), exact)) in
            terms(&found).into_iter().zip(terms(&rounded)).zip(terms(&exact)).enumerate()
        {
            // One number has one error, which may happen to be nothing: half a percent of its size is added.
            let limit = APART * (rounded - exact).abs() + 0.005 * exact.abs() + 1e-3;
            assert!(
                (found - rounded).abs() <= limit,
                "{variant}, term {i}: expected {rounded}, found {found}, f32 {exact}"
            );
        }
        for (i, (side, found)) in found.gradients.iter().enumerate() {
            gradients(&format!("{variant}, {side}"), found, &rounded.gradients[i].1, &exact.gradients[i].1);
        }
    }
}

fn terms(step: &joint::Step) -> [f64; 7] {
    let (p, r) = (&step.policy, &step.reward);
    [p.npo, p.safe, p.retain, r.bt, r.center, r.replay, r.anchor]
}

/// What is generated, two slots for five requests of different lengths.
fn generated<B: Ops>(ops: &B, slots: usize, temperature: f32) -> Vec<Vec<u32>> {
    let Case { model, mut workspace, .. } = Case::open(ops, "qwen3-causal");
    let mut generator = Generator::new(ops, &model.config, slots, 64, 128).unwrap();
    let request =
        |i: u32| Continue { tokens: (0..3 + 5 * i).map(|t| (t * 11 + i) % 50).collect(), forced: 0, id: i.into() };
    let requests: Vec<Continue> = (0..5).map(request).collect();
    let decoding = Decoding { temperature, top_k: 20, top_p: 0.9, seed: 3, ..Decoding::greedy(9) };
    let results = model.generate(&mut workspace, &mut generator, &requests, None, &decoding, |_| Ok(())).unwrap();
    results.into_iter().map(|r| r.tokens).collect()
}

#[test]
fn generation_is_the_same_at_any_occupancy() {
    let Some(device) = device() else { return };
    for temperature in [0.0, 1.0] {
        let alone = generated(&device, 1, temperature);
        assert_eq!(generated(&device, 2, temperature), alone);
        assert_eq!(generated(&device, 5, temperature), alone);
        assert!(alone.iter().all(|tokens| !tokens.is_empty()));
    }
    let (found, expected) = (generated(&device, 5, 0.0), generated(&Cpu::rounded(), 5, 0.0));
    let same = found.iter().zip(&expected).filter(|(f, e)| f == e).count();
    assert!(same >= 4, "greedy: {same} of 5 sequences agree with the reference");
}
