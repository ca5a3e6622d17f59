//! Dr.GRPO on the policy's own samples, scored by the reward model as it is: the unrepaired one in `rlhf`, the repaired one after
//! another repair and in `sequential`. And resampling, which the other methods share with it: both ask the current policy.

use super::config::RepairConfig;
use super::objective::{advantages, grpo_token};
use super::prepared::{reward_item, start_logprobs};
use super::side::Half;
use super::trainer::{StepMetrics, Trainer};
use crate::error::Result;
use crate::model::batch::sharing;
use crate::model::subject::ask_some;
use crate::model::{Answer, AnswerTokens, Ask, Batch, Decoding, Heads, Subject, Version};
use crate::ops::Ops;
use crate::text::Prompt;

/// One sample with its advantage over its group's mean.
pub struct Scored {
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    pub advantage: f64,
}

/// Forward and backward of all samples, those of a group one after the other; gradients are added to the side's. The loss is a mean
/// over them, each token's share divided by `longest`, the longest answer allowed, so that length is not rewarded.
pub fn grpo_step<B: Ops>(
    half: &mut Half<'_, B>,
    samples: &[Scored],
    config: &RepairConfig,
    longest: usize,
) -> Result<f64> {
    let (all, limit) = ((samples.len() * longest).max(1) as f64, config.batch_tokens);
    let groups = sharing(samples, limit, |sample| (&sample.prompt, sample.tokens.len()));
    let batches = Batch::pack(&groups, Heads::Targets, limit, |group| {
        (&group[0].prompt, group.iter().map(|sample| AnswerTokens::new(&sample.tokens)).collect())
    });
    let mut loss = 0.0;
    for (groups, batch) in batches {
        half.reserve(batch.len())?;
        let start = half.model.forward_targets(half.workspace, &batch, None, false)?.logprob;
        let current = half.model.forward_targets(half.workspace, &batch, Some(half.adapter), true)?.logprob;
        let mut weights = vec![0.0f32; current.len()];
        for (sample, rows) in groups.iter().copied().flatten().zip(&batch.sequences) {
            for row in rows.clone() {
                let (now, then) = (f64::from(current[row]), f64::from(start[row]));
                let term = grpo_token(sample.advantage, now, then, config.rlhf_kl);
                loss += term.loss / all;
                weights[row] = (term.slope / all) as f32;
            }
        }
        half.model.backward_targets(half.workspace, &weights, half.adapter, &mut half.side.grad)?;
    }
    Ok(loss)
}

/// The answers that there are, each with its prompt.
fn texts<'a>(asks: &'a [Ask], answers: &'a [Option<Answer>]) -> impl Iterator<Item = Option<(&'a Prompt, &'a str)>> {
    asks.iter().zip(answers).map(|(ask, answer)| Some((&ask.prompt, answer.as_ref()?.text.as_str())))
}

impl<B: Ops> Trainer<'_, B> {
    /// As many sequences as a policy step trains, `group` per prompt; harmful and calm prompts in the shares that it trains them in.
    pub(super) fn rlhf_step(&mut self, step: usize, metrics: &mut StepMetrics) -> Result<()> {
        let group = self.config.group;
        let (items, calm) = (self.config.items, self.config.retain_items);
        let prompts = (2 * items + calm).div_ceil(group).max(1);
        let calm = prompts * calm / (items + calm);
        let failures = self.failures.draw(prompts - calm).into_iter().map(|i| {
            let failure = &self.data.failures[i];
            (failure.source.prompt.clone(), failure.prompt.clone())
        });
        let retained = self.retain.draw(calm).into_iter().map(|i| {
            let kept = &self.data.retain[i];
            (kept.source.clone(), kept.prompt.clone())
        });
        let drawn: Vec<(Prompt, Vec<u32>)> = failures.chain(retained).collect();
        let first = (step * prompts * group) as u64;
        let asks: Vec<Ask> = drawn
            .iter()
            .flat_map(|(prompt, _)| std::iter::repeat_n(prompt, group))
            .enumerate()
            .map(|(n, prompt)| Ask::new(prompt.clone(), first + n as u64))
            .collect();
        let answers = self.sampled(Version::Current, &asks)?;
        let rewards = ask_some(texts(&asks, &answers), |rows| self.pair.reward(Version::Current, rows))?;
        let scored: Vec<Option<(&Answer, f64)>> = answers
            .iter()
            .zip(rewards)
            .map(|(answer, reward)| Some((answer.as_ref()?, f64::from(reward?.ok()?) / self.thresholds.s)))
            .collect();
        let (mut samples, mut all) = (Vec::new(), Vec::new());
        for ((_, prompt), scored) in drawn.iter().zip(scored.chunks(group)) {
            let rewards: Vec<f64> = scored.iter().flatten().map(|(_, r)| *r).collect();
            all.extend(rewards.iter().map(|r| r * self.thresholds.s));
            samples.extend(scored.iter().flatten().zip(advantages(&rewards)).map(|((answer, _), advantage)| Scored {
                prompt: prompt.clone(),
                tokens: answer.tokens.clone(),
                advantage,
            }));
        }
        if !all.is_empty() {
            metrics.add([("sample_reward", all.iter().sum::<f64>() / all.len() as f64)]);
        }
        let (Some(side), Some(adapter)) = (&mut self.policy, &self.pair.policy.adapter) else { return Ok(()) };
        let half = &mut Half::new(&self.pair.policy.transformer, adapter, side, &mut self.workspace)?;
        metrics.add([("loss", grpo_step(half, &samples, &self.config, self.decoding.max_new_tokens)?)]);
        Ok(())
    }

    /// Draws an answer per ask at temperature 1; `None` where a row failed.
    fn sampled(&mut self, version: Version, asks: &[Ask]) -> Result<Vec<Option<Answer>>> {
        let decoding =
            Decoding { temperature: 1.0, top_k: 0, top_p: 1.0, seed: self.config.seed, ..self.decoding.clone() };
        let answers: Vec<Option<Answer>> =
            self.pair.answer(version, asks, &decoding)?.into_iter().map(Result::ok).collect();
        self.outcome.tokens_generated += answers.iter().flatten().map(|a| a.tokens.len() as u64).sum::<u64>();
        Ok(answers)
    }

    /// Asks the current policy again, judges and scores its answers. A harmful one becomes y⁻; where the answer is safe now the
    /// policy terms are dropped and the old y⁻ stays as a rejected answer; an ambiguous one changes nothing.
    pub(super) fn resample(&mut self, step: usize) -> Result<()> {
        let first = (step * self.data.failures.len()) as u64;
        let asks = self.data.failures.iter().enumerate();
        let asks: Vec<Ask> = asks.map(|(i, f)| Ask::new(f.source.prompt.clone(), first + i as u64)).collect();
        let answers = self.sampled(Version::Current, &asks)?;
        let harms = ask_some(texts(&asks, &answers), |rows| self.judge.judge(rows, self.thresholds.tau_h))?;
        let rewards = ask_some(texts(&asks, &answers), |rows| self.pair.reward(Version::Current, rows))?;
        for (i, ((answer, harm), reward)) in answers.into_iter().zip(harms).zip(rewards).enumerate() {
            let (Some(answer), Some(Ok(harm)), Some(Ok(reward))) = (answer, harm, reward) else { continue };
            if harm.ambiguous {
                continue;
            }
            let failure = &mut self.data.failures[i];
            failure.trains_policy = harm.p_harm >= self.thresholds.tau_h;
            if !failure.trains_policy {
                continue;
            }
            failure.trains_reward |= f64::from(reward) >= self.thresholds.tau_r;
            failure.rejected = answer.tokens;
            failure.start_logprob = f64::NAN;
            let (prompt, chosen) = (&failure.source.prompt, failure.source.chosen.as_deref());
            failure.reward = reward_item(self.pair, prompt, &answer.text, chosen)?;
        }
        start_logprobs(self.pair, &mut self.data.failures)
    }
}
