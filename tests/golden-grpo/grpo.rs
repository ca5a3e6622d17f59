//! A step of Dr.GRPO against TRL's own trainer, which `scripts/golden_grpo.py` asked.

use ares::backend::Cpu;
use ares::repair::RepairConfig;
use ares::repair::objective::advantages;
use ares::repair::rlhf::{Scored, grpo_step};
use serde::Deserialize;

use super::joint::{self, Opened};
use super::{TERM_LIMIT, assert_close, assert_gradients};

/// Answers with their rewards, and what TRL makes of them.
#[derive(Deserialize)]
struct Grpo {
    policy: String,
    beta: f64,
    group: usize,
    longest: usize,
    samples: Vec<Rewarded>,
    advantages: Vec<f64>,
    loss: f64,
}

#[derive(Deserialize)]
struct Rewarded {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    reward: f64,
}

/// Advantages, loss and gradients are TRL's, in one piece and in several.
#[test]
fn dr_grpo_is_trls() {
    let folder = joint::tests().join("golden-grpo");
    let golden: Grpo = serde_json::from_slice(&std::fs::read(folder.join("step.json")).unwrap()).unwrap();
    let groups = golden.samples.chunks(golden.group);
    let found: Vec<f64> =
        groups.flat_map(|group| advantages(&group.iter().map(|sample| sample.reward).collect::<Vec<_>>())).collect();
    assert_close("advantages", &found, &golden.advantages, TERM_LIMIT);
    let sample = |(sample, advantage): (&Rewarded, f64)| {
        let Rewarded { prompt, tokens, .. } = sample;
        Scored { prompt: prompt.clone(), tokens: tokens.clone(), advantage }
    };
    let samples: Vec<Scored> = golden.samples.iter().zip(found).map(sample).collect();
    let opened = Opened::new(&Cpu::new(), &golden.policy);
    for batch_tokens in [24, 4096] {
        let config = RepairConfig { rlhf_kl: golden.beta, batch_tokens, ..RepairConfig::default() };
        let (loss, gradients) = opened.train(|half| grpo_step(half, &samples, &config, golden.longest).unwrap());
        assert_close("loss", &[loss], &[golden.loss], TERM_LIMIT);
        assert_gradients(&format!("{batch_tokens} rows at a time"), gradients, &folder.join("step.safetensors"));
    }
}
