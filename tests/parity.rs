//! Whole models and one whole joint step on a device = the same on `Cpu::rounded()`, with the random checkpoints of
//! `tests/golden`. (Each operation: `tests/ops`.) On the simulator, or the device that ARES_PARITY_DEVICE names.

#[path = "common/joint.rs"]
mod joint;
#[path = "ops/toolkit.rs"]
mod toolkit;

use ares::backend::{Cpu, Cuda};
use ares::model::generate::{Continue, Generator};
use ares::model::{AdapterGrad, AnswerTokens, Batch, Decoding, Heads, Keep, Workspace};
use ares::ops::Ops;

use joint::{Golden, Gradients, Opened};
use toolkit::{device, hopper};

const FOLDERS: &[&str] = &[
    "llama", "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3", "granite", "phi3", "olmo2",
    "olmo3",
];

/// A ragged batch: a shared prompt, a prompt of its own, none.
fn batch(vocab: usize, heads: Heads) -> Batch {
    let tokens = |seed: usize, n| (0..n).map(|i| ((seed * 131 + i * i * 7 + i) % vocab) as u32).collect::<Vec<u32>>();
    let mut batch = Batch::default();
    let (a, b, c) = (tokens(1, 9), tokens(2, 17), tokens(3, 1));
    batch.push(&tokens(4, 21), &[AnswerTokens::new(&a), AnswerTokens { tokens: &b, context: 3 }], heads);
    batch.push(&tokens(5, 2), &[AnswerTokens::new(&c)], heads);
    batch.push(&[], &[AnswerTokens::new(&tokens(6, 70))], heads);
    // A reward model has one value a sequence: of four, chance alone may set two roundings far apart.
    (7..15).for_each(|seed| batch.push(&tokens(seed, 3), &[AnswerTokens::new(&tokens(seed, 6))], heads));
    batch
}

/// Values without and with the adapter, then the adapter's gradients.
fn outcome<B: Ops>(ops: &B, name: &str) -> Outcome {
    let opened = Opened::new(ops, name);
    outcome_in(ops, &opened, &mut opened.workspace(256, Keep::Everything))
}

fn outcome_in<B: Ops>(ops: &B, opened: &Opened<B>, ws: &mut Workspace<B>) -> Outcome {
    let Opened { model, adapter, .. } = opened;
    let causal = model.config.is_causal();
    let batch = batch(model.config.vocab_size, if causal { Heads::Targets } else { Heads::Ends });
    let mut grad = AdapterGrad::new(ops, adapter, !causal).unwrap();
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
    (values, opened.gradients(&grad))
}

/// Root of the mean square difference over the root of the mean square; NaN where either has one.
fn apart(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(f, e)| f64::from(f - e)));
    (difference / square(&mut expected.iter().map(|&e| f64::from(e)))).sqrt()
}

type Outcome = (Vec<Vec<f32>>, Gradients);

/// How far two ways of rounding to bf16 may lie apart, as a multiple of how far rounding itself lies from f32: two sums of equal
/// and independent errors are apart by √2 of one of them, more over a handful of values; a term left out or misplaced is apart by tens.
const APART: f64 = 2.0;

/// And how far at most, relative to what is expected, however much bf16 itself loses, which for a gradient of these models is 0.086 at
/// most: 0.061 was found.
const AT_MOST: f64 = 0.1;

/// `exact` is the f32 reference, `rounded` the one that rounds where the device does.
fn assert_near(what: &str, found: &[f32], rounded: &[f32], exact: &[f32]) {
    let (distance, own) = (apart(found, rounded), apart(rounded, exact));
    let limit = (APART * own + 1e-4).min(AT_MOST);
    let from_exact = apart(found, exact);
    assert!(distance <= limit, "{what}: apart by {distance}, limit {limit}; from f32 {from_exact}, bf16's own {own}");
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
            if name == "granite-reward" {
                continue; // transformers has no such class
            }
            let [rounded, exact] = [Cpu::rounded(), Cpu::new()].map(|cpu| outcome(&cpu, &name));
            let found = outcome(&device, &name);
            for (i, found) in found.0.iter().enumerate() {
                assert_near(&format!("{name}, values {i}"), found, &rounded.0[i], &exact.0[i]);
            }
            gradients(&name, &found.1, &rounded.1, &exact.1);
        }
    }
}

#[test]
fn a_whole_joint_step() {
    let Some(device) = device() else { return };
    for variant in ["npo", "sum-kl", "unlikelihood"] {
        same_step(variant, &device, &Golden::open(variant));
    }
}

/// Of models whose products its tiles serve.
#[test]
fn a_whole_joint_step_on_the_tier_of_hopper() {
    let Some(device) = hopper() else { return };
    same_step("the suite's", &device, &Golden::open("npo").of_the_suite());
}

fn same_step(what: &str, device: &Cuda, golden: &Golden) {
    let [found, rounded, exact] =
        [golden.step(device, 4096), golden.step(&Cpu::rounded(), 4096), golden.step(&Cpu::new(), 4096)];
    let [f, r, e] = [&found, &rounded, &exact].map(terms);
    for i in 0..f.len() {
        // One number has one error, which may happen to be nothing: half a percent of its size is added.
        let limit = APART * (r[i] - e[i]).abs() + 0.005 * e[i].abs() + 1e-3;
        let near = (f[i] - r[i]).abs() <= limit;
        assert!(near, "{what}, term {i}: expected {}, found {}, f32 {}", r[i], f[i], e[i]);
    }
    for (i, (side, found)) in found.gradients.iter().enumerate() {
        gradients(&format!("{what}, {side}"), found, &rounded.gradients[i].1, &exact.gradients[i].1);
    }
}

fn terms(step: &joint::Step) -> [f64; 7] {
    let (p, r) = (&step.policy, &step.reward);
    [p.npo, p.safe, p.retain, r.bt, r.center, r.replay, r.anchor]
}

/// Tokens to continue, of different lengths.
fn prompts() -> Vec<Vec<u32>> {
    (0..5).map(|i| (0..3 + 5 * i).map(|t| (t * 11 + i) % 50).collect()).collect()
}

/// Nine tokens after each prompt, by a lane for each number of slots.
fn generated<B: Ops>(ops: &B, name: &str, slots: &[usize], temperature: f32) -> Vec<Vec<u32>> {
    let opened = Opened::new(ops, name);
    let generator = |&slots: &usize| Generator::new(ops, &opened.model.config, slots, 64, 128).unwrap();
    let mut generators: Vec<_> = slots.iter().map(generator).collect();
    let mut workspaces: Vec<_> = slots.iter().map(|_| opened.workspace(256, Keep::Everything)).collect();
    // One answer to the first prompt, two to the second, three to the third, one to the fourth…
    let prompts = prompts().into_iter().enumerate().flat_map(|(i, tokens)| std::iter::repeat_n(tokens, i % 3 + 1));
    let requests: Vec<_> = prompts.zip(0..).map(|(tokens, id)| Continue { tokens, forced: 0, id }).collect();
    let decoding = Decoding { temperature, top_k: 20, top_p: 0.9, seed: 3, ignore_eos: true, ..Decoding::greedy(9) };
    let mut lanes: Vec<_> = workspaces.iter_mut().zip(&mut generators).collect();
    let results = opened.model.generate(&mut lanes, &requests, None, &decoding, |_| Ok(())).unwrap();
    results.into_iter().map(|r| r.tokens).collect()
}

#[test]
fn generation_is_the_same_at_any_occupancy() {
    same_at_any_occupancy(&Cpu::new());
    device().iter().for_each(same_at_any_occupancy);
}

/// In one slot every answer reads its prompt itself, in several those to one prompt read it together.
fn same_at_any_occupancy<B: Ops>(ops: &B) {
    for temperature in [0.0, 1.0] {
        let alone = generated(ops, "qwen3-causal", &[1], temperature);
        assert!(alone.iter().all(|tokens| tokens.len() == 9));
        assert!(temperature == 0.0 || alone[1] != alone[2], "answers to one prompt are drawn apart");
        for slots in [&[2][..], &[5], &[7], &[2, 3], &[1, 1, 5]] {
            assert_eq!(generated(ops, "qwen3-causal", slots, temperature), alone, "{} {slots:?}", ops.describe());
        }
    }
}

/// How far below the likeliest token's log-probability one may lie that bf16 takes for it: 0.011 was found.
const TIE: f32 = 0.02;

/// Greedy tokens are the reference's up to a tie, which is shown to be one: both tokens are as likely to the reference.
#[test]
fn greedy_tokens_are_the_references() {
    let Some(device) = device() else { return };
    for family in FOLDERS {
        let name = format!("{family}-causal");
        let (cpu, reference) = (Cpu::rounded(), Opened::new(&Cpu::rounded(), &name));
        let mut ws = reference.workspace(256, Keep::Nothing);
        let (found, expected) = (generated(&device, &name, &[5], 0.0), generated(&cpu, &name, &[5], 0.0));
        for ((prompt, found), expected) in prompts().iter().zip(&found).zip(&expected) {
            let Some(at) = (0..9).find(|&at| found[at] != expected[at]) else { continue };
            let mut batch = Batch::default();
            let answers = [found[at], expected[at]].map(|token| [token]);
            let before = [prompt, &expected[..at]].concat();
            batch.push(&before, &answers.each_ref().map(|answer| AnswerTokens::new(answer)), Heads::Targets);
            let logprob = reference.model.forward_targets(&mut ws, &batch, None, false).unwrap().logprob;
            println!("{name}: token {at} is a tie: {logprob:?}");
            assert!(logprob[1] - logprob[0] <= TIE, "{name}: token {at}: {found:?} for {expected:?}: {logprob:?}");
        }
    }
}

/// A step's models take turns in one workspace: shallower, wider, with and without a head of logits, and back.
#[test]
fn turns_in_one_workspace_change_no_bit() {
    take_turns(&Cpu::new());
    device().iter().for_each(take_turns);
}

fn take_turns<B: Ops>(ops: &B) {
    let models = [
        "llama3-causal",
        "llama-causal",
        "mistral-reward",
        "llama3-reward",
        "qwen3-causal",
        "llama-causal",
        "llama3-causal",
    ]
    .map(|name| Opened::new(ops, name));
    let mut shared = Workspace::new(ops, &models[0].model.config, 0, 0, Keep::Everything).unwrap();
    for (turn, opened) in models.iter().enumerate() {
        // More rows than the one before had room for, and fewer.
        let rows = 190 + turn * 37 % 100;
        shared.fit(ops, &opened.model.config, opened.adapter.rank(), rows).unwrap();
        let alone = outcome_in(ops, opened, &mut opened.workspace(rows, Keep::Everything));
        assert_eq!(outcome_in(ops, opened, &mut shared), alone, "{} in turn {turn}", opened.dir.display());
    }
}

/// Backward from blocks' inputs alone: one set of activations serves every block, and the last has other rows than the rest.
#[test]
fn what_is_computed_again_changes_no_bit() {
    FOLDERS.iter().for_each(|folder| recomputed(&Cpu::new(), &format!("{folder}-causal")));
    recomputed(&Cpu::new(), "gemma2-reward");
    device().iter().for_each(|ops| ["qwen3-causal", "mistral-reward"].iter().for_each(|name| recomputed(ops, name)));
}

fn recomputed<B: Ops>(ops: &B, name: &str) {
    let opened = Opened::new(ops, name);
    assert!(opened.model.config.layers > 1, "{name}: of one layer nothing is computed again");
    let mut inputs = opened.workspace(200, Keep::Inputs);
    let expected = outcome_in(ops, &opened, &mut opened.workspace(200, Keep::Everything));
    for turn in ["at first", "again"] {
        assert_eq!(outcome_in(ops, &opened, &mut inputs), expected, "{name} {turn}");
    }
}
