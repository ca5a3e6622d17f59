//! A policy with the reward model that guides its training: the engine's side of [`Subject`].

use super::pretrained::Pretrained;
use super::subject::{Answer, Ask, Decoding, Subject, Version};
use crate::error::Result;
use crate::ops::Ops;
use crate::text::Prompt;
use crate::text::rendering::Rendered;

pub struct Pair<B: Ops> {
    pub policy: Pretrained<B>,
    pub reward: Pretrained<B>,
}

impl<B: Ops> Pair<B> {
    /// Fails unless the policy is a language model and the reward model has exactly one score.
    pub fn new(policy: Pretrained<B>, reward: Pretrained<B>) -> Result<Self> {
        policy.transformer.config.expect_causal()?;
        reward.transformer.config.expect_score()?;
        Ok(Pair { policy, reward })
    }
}

impl<B: Ops> Subject for Pair<B> {
    fn answer(&mut self, version: Version, asks: &[Ask], decoding: &Decoding) -> Result<Vec<Result<Answer>>> {
        self.policy.generate(version, asks, decoding)
    }

    fn reward(&mut self, version: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<f32>>> {
        self.reward.rewards(version, rows)
    }

    fn logprob(&mut self, version: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<(f64, usize)>>> {
        let rendered = self.policy.rendering.with_answers(rows.to_vec());
        self.policy.logprob_sums(version, rendered)
    }

    fn prompt_logprob(&mut self, prompts: &[&Prompt]) -> Result<Vec<Result<(f64, usize)>>> {
        let whole = |tokens| Rendered { tokens, prompt_len: 0 };
        let rendered = self.policy.rendering.prompts(prompts.to_vec()).into_iter().map(|row| row.map(whole)).collect();
        self.policy.logprob_sums(Version::Start, rendered)
    }
}
