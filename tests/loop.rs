//! The method on the built-in suite: what `method.md` derives must hold bit for bit, and a seed decides everything.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ares::backend::Cpu;
use ares::detect::{Evaluator, Examiner};
use ares::judge::{Judges, Thresholds, Verdict};
use ares::model::{Checkpoint, Decoding, HostTensor, ModelConfig, Pair, Pretrained, Subject, Version};
use ares::repair::{
    Failure, Method, Prepared, Recipe, RepairConfig, RepairData, Reply, Setting, StepMetrics, Trainer, admit,
};
use ares::run::{Suite, SuitePair};
use ares::text::ngrams::overlap;
use ares::text::rows::{Row, read};
use ares::text::{IdLimits, Prompt, Rendering};

const CPU: fn() -> Cpu = Cpu::new;

/// A pair with judges and a small repair, everything real.
struct World {
    examiner: Examiner<Pair<Cpu>>,
    thresholds: Thresholds,
    data: Prepared,
    /// Failures that no repair sees.
    held: Vec<Failure>,
    config: RepairConfig,
}

fn world() -> World {
    let suite = Suite::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models"))).unwrap();
    let entry = &suite.pairs()[0];
    let interrupt = Arc::default();
    let open = |spec| Pretrained::open(&CPU(), spec, 2048, Arc::clone(&interrupt)).unwrap();
    let pair = Pair::new(open(&entry.model("policy")), open(&entry.model("reward"))).unwrap();
    let judges = Judges::only(suite.judge().open(&CPU(), 2048, &interrupt).unwrap());
    let calibration = rows(entry, "calibration", 200).iter().map(|row| row.pair().unwrap()).collect();
    let evaluator = Evaluator::calibrate(Examiner::new(pair, judges, 0.5, 48), calibration, 0).unwrap();
    let (thresholds, mut examiner) = (evaluator.thresholds, evaluator.examiner);
    let mut data = repair_data(entry);
    let held = data.failures.split_off(18);
    let mut setting = setting(&mut examiner, thresholds);
    let left_out = admit(&mut data, &mut setting).unwrap();
    assert!(left_out.len() < 6, "{left_out:?}");
    let data = Prepared::new(&mut setting, &data).unwrap();
    let config =
        RepairConfig { steps: 3, resample: 0, items: 4, retain_items: 3, replay_items: 3, ..suite.repair_config() };
    World { examiner, thresholds, data, held, config }
}

fn setting(examiner: &mut Examiner<Pair<Cpu>>, thresholds: Thresholds) -> Setting<'_, Cpu> {
    let Examiner { subject: pair, judges, .. } = examiner;
    Setting { pair, judge: &mut *judges.judge, thresholds, decoding: Decoding::greedy(48) }
}

fn rows(pair: &SuitePair, split: &str, n: usize) -> Vec<Row> {
    let mut rows = read(Some(&pair.split(split)), true).unwrap();
    rows.truncate(n);
    rows
}

/// References as answers: what is trained on is known, whatever the models say.
fn repair_data(pair: &SuitePair) -> RepairData {
    let verdicts = [Verdict::Coupled, Verdict::Policy, Verdict::Reward].into_iter().cycle();
    let failure = |(row, verdict): (Row, Verdict)| Failure {
        prompt: row.prompt(false).unwrap(),
        rejected: Reply::text(row.text("harmful").unwrap()),
        chosen: Some(row.text("safe").unwrap().to_string()),
        verdict,
        forced: None,
    };
    let retain = rows(pair, "retain", 20).into_iter();
    RepairData {
        failures: rows(pair, "discovery", 60).into_iter().zip(verdicts).map(failure).collect(),
        retain: retain.map(|row| (row.prompt(false).unwrap(), row.text("response").unwrap().to_string())).collect(),
        replay: rows(pair, "replay", 20).iter().map(|row| row.pair().unwrap()).collect(),
    }
}

/// What a trainer saves, and the steps it made.
type Saved = ((String, BTreeMap<String, HostTensor>), Vec<StepMetrics>);

/// Adapters of policy and reward model after a repair, as PEFT files, and the steps' metrics.
type Repaired = ([Option<ares::model::AdapterFile>; 2], Vec<StepMetrics>);

impl World {
    fn repair(&mut self, method: Method, config: &RepairConfig) -> Repaired {
        self.repair_in_pieces(method, config, &[])
    }

    /// The same, after each of `stops` steps by another trainer, which gets nothing but what the last one saved.
    fn repair_in_pieces(&mut self, method: Method, config: &RepairConfig, stops: &[usize]) -> Repaired {
        let recipe = config.clone().try_into().unwrap();
        let mut saved: Option<Saved> = None;
        for stop in stops.iter().chain([&usize::MAX]) {
            let setting = setting(&mut self.examiner, self.thresholds);
            let mut trainer = Trainer::new(setting, &self.data, method, &recipe, None).unwrap();
            if let Some(((state, tensors), history)) = saved {
                trainer.restore(&state, &tensors, history).unwrap();
            }
            while trainer.history().len() < *stop && trainer.advance().unwrap().is_some() {}
            saved = Some((trainer.save().unwrap(), trainer.history().to_vec()));
        }
        let steps = saved.unwrap().1;
        let each = if matches!(method, Method::Sequential | Method::Alternating) { 2 } else { 1 };
        assert_eq!(steps.len(), each * config.steps);
        let file = |model: &Pretrained<Cpu>| {
            let adapter = model.adapter.as_ref()?;
            Some(adapter.to_file(&model.transformer.ops).unwrap())
        };
        ([file(&self.examiner.subject.policy), file(&self.examiner.subject.reward)], steps)
    }
}

#[test]
fn without_resampling_the_halves_do_not_meet_but_in_the_coupling_weight() {
    let mut world = world();
    let config = world.config.clone();
    let ([policy, none], _) = world.repair(Method::Policy, &config);
    assert!(none.is_none(), "policy trains no reward model");
    let ([none, reward], _) = world.repair(Method::Reward, &config);
    assert!(none.is_none(), "reward trains no policy");
    let ([joint_policy, joint_reward], steps) = world.repair(Method::Joint, &config);
    let ([free_policy, free_reward], _) = world.repair(Method::JointUncoupled, &config);
    assert_eq!(joint_reward, reward, "joint's reward adapter is reward's");
    assert_eq!(free_reward, reward, "uncoupled joint's reward adapter is reward's");
    assert_eq!(free_policy, policy, "uncoupled joint's policy adapter is policy's");
    assert_ne!(joint_policy, policy, "the coupling weight reaches the policy");
    let ([shuffled_policy, shuffled_reward], _) = world.repair(Method::JointShuffled, &config);
    assert_eq!(shuffled_reward, reward, "shuffled joint's reward adapter is reward's");
    assert!(shuffled_policy != policy && shuffled_policy != joint_policy, "the same weights, on other failures");
    // The reward model in turns with a policy, or before one, is the reward model alone.
    for method in [Method::Alternating, Method::Sequential] {
        let ([other, same], _) = world.repair(method, &config);
        assert_eq!(same, reward, "the reward adapter of {}", method.name());
        assert!(other.is_some() && other != policy && other != joint_policy);
    }
    let weights: Vec<f64> = steps.iter().filter_map(|m| m.terms["coupling"]).collect();
    assert!(weights.len() == 3 && weights.iter().all(|w| *w > 0.5 && *w < 1.5 && *w != 1.0), "{weights:?}");
}

#[test]
fn a_repair_goes_on_from_where_it_stood() {
    let mut world = world();
    let config = RepairConfig { steps: 5, resample: 2, train_head: true, ..world.config.clone() };
    let methods =
        [Method::Joint, Method::JointShuffled, Method::Dpo, Method::Rlhf, Method::Sequential, Method::Alternating];
    for method in methods {
        let (whole, metrics) = world.repair(method, &config);
        let (pieces, resumed) = world.repair_in_pieces(method, &config, &[1, 4, 7]);
        assert!(whole == pieces, "adapters of {}", method.name());
        let untimed = |m: &StepMetrics| StepMetrics { seconds: None, tokens_per_second: None, ..m.clone() };
        assert!(metrics.iter().map(untimed).eq(resumed.iter().map(untimed)), "steps of {}", method.name());
    }
}

#[test]
fn a_seed_decides_everything() {
    let mut world = world();
    let config = RepairConfig { resample: 2, ..world.config.clone() };
    for method in [Method::Joint, Method::Rlhf] {
        let (first, metrics) = world.repair(method, &config);
        let (second, again) = world.repair(method, &config);
        assert_eq!(first, second, "{}", method.name());
        let losses = |m: &[StepMetrics]| m.iter().map(|m| m.loss().to_bits()).collect::<Vec<_>>();
        assert_eq!(losses(&metrics), losses(&again));
        let (other, _) = world.repair(method, &RepairConfig { seed: 7, ..config.clone() });
        assert_ne!(first, other, "{}: another seed is another repair", method.name());
    }
}

#[test]
fn pieces_of_a_step_add_up_to_the_whole() {
    let mut world = world();
    let whole = RepairConfig { steps: 1, ..world.config.clone() };
    let pieces = RepairConfig { batch_tokens: 100, ..whole.clone() };
    let (_, a) = world.repair(Method::Joint, &whole);
    let (_, b) = world.repair(Method::Joint, &pieces);
    let near = |x: f64, y: f64| (x - y).abs() <= 1e-4 * (1.0 + y.abs());
    assert!(near(a[0].loss(), b[0].loss()), "{} against {}", a[0].loss(), b[0].loss());
    let norms = |m: &StepMetrics| [m.grad_norm_policy, m.grad_norm_reward].map(Option::unwrap);
    for (x, y) in norms(&a[0]).into_iter().zip(norms(&b[0])) {
        assert!(near(x, y), "gradient norm {x} against {y}");
    }
}

/// Answers that share their prompt's rows, and each with rows of its own: one gradient.
#[test]
fn a_group_that_shares_its_prompt_trains_as_its_answers_do() {
    let mut world = world();
    let shared = RepairConfig { steps: 2, ..world.config.clone() };
    let alone = RepairConfig { batch_tokens: 1, ..shared.clone() };
    let (_, a) = world.repair(Method::Rlhf, &shared);
    let (_, b) = world.repair(Method::Rlhf, &alone);
    let near = |x: f64, y: f64| (x - y).abs() <= 1e-4 * y.abs() && y != 0.0;
    for (a, b) in a.iter().zip(&b) {
        assert!(near(a.loss(), b.loss()), "loss {} against {}", a.loss(), b.loss());
        let [x, y] = [a, b].map(|m| m.grad_norm_policy.unwrap());
        assert!(near(x, y), "gradient norm {x} against {y}");
    }
}

/// Mean of ℓ(y⁺) − ℓ(y⁻), per token, and of r(y⁺) − r(y⁻).
fn margins(world: &mut World, version: Version) -> [f64; 2] {
    let World { examiner: Examiner { subject: pair, .. }, held, .. } = world;
    let safe: Vec<_> = held.iter().map(|f| (&f.prompt, f.chosen.as_deref().unwrap())).collect();
    let harmful: Vec<_> = held.iter().map(|f| (&f.prompt, f.rejected.text.as_str())).collect();
    let mut logprob = |rows: &[(&Prompt, &str)]| -> f64 {
        pair.logprob(version, rows).unwrap().into_iter().map(Result::unwrap).map(|(sum, n)| sum / n as f64).sum()
    };
    let policy = logprob(&safe) - logprob(&harmful);
    let mut reward = |rows: &[(&Prompt, &str)]| -> f64 {
        pair.reward(version, rows).unwrap().into_iter().map(|r| f64::from(r.unwrap())).sum()
    };
    let reward = reward(&safe) - reward(&harmful);
    [policy, reward].map(|sum| sum / held.len() as f64)
}

#[test]
fn repair_helps_prompts_that_it_has_not_seen() {
    let mut world = world();
    let config = RepairConfig { steps: 12, ..world.config.clone() };
    world.repair(Method::Joint, &config);
    let (before, after) = (margins(&mut world, Version::Start), margins(&mut world, Version::Current));
    assert!(after[0] > before[0] && after[1] > before[1], "margins of policy and reward: {before:?} -> {after:?}");
}

/// Whatever `Recipe` lets pass trains.
#[test]
fn numbers_that_are_accepted_give_finite_losses() {
    let mut world = world();
    let base = RepairConfig { steps: 2, items: 2, retain_items: 1, replay_items: 1, ..world.config.clone() };
    let table = toml::Table::try_from(&base).unwrap();
    let mut runs = 0;
    for key in table.iter().filter(|(_, v)| v.is_integer() || v.is_float()).map(|(key, _)| key) {
        for value in [toml::Value::Integer(0), toml::Value::Float(1.5)] {
            let mut table = table.clone();
            table.insert(key.clone(), value.clone());
            let Ok(recipe) = Recipe::try_from(table) else { continue };
            let (_, steps) = world.repair(Method::Joint, &recipe);
            assert!(steps.len() == 2 && steps.iter().all(|step| step.loss().is_finite()), "{key} = {value}: {steps:?}");
            runs += 1;
        }
    }
    assert!(runs > 20, "{runs}");
}

/// Every model of the suite opens with its own tokenizer and template, and no prompt stands in two splits.
#[test]
fn the_suite_opens_and_its_splits_are_apart() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models"));
    let mut models = vec![root.join("judge"), root.join("second-judge")];
    for pair in Suite::open(root).unwrap().pairs() {
        models.extend([pair.model("policy").dir, pair.model("reward").dir]);
        let names = ["calibration", "replay", "discovery", "gate", "test"];
        let rows = names.map(|name| rows(pair, name, usize::MAX));
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
