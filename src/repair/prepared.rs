//! Data made ready once for all methods: token ids, and what the originals say of them (ℓ_0, r_0).

use serde::{Deserialize, Serialize};

use super::data::{Failure, RepairData};
use super::reward_step::{RewardItem, RewardKind};
use super::trainer::Setting;
use crate::error::Result;
use crate::judge::Harm;
use crate::model::{Pair, Subject, Version};
use crate::ops::Ops;
use crate::text::Prompt;
use crate::text::rendering::Rendered;

/// One failure in both models' tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PreparedFailure {
    pub(crate) source: Failure,
    /// The policy's prompt, y⁻ and y⁺ with their end-of-turn tokens.
    pub(crate) prompt: Vec<u32>,
    pub(crate) rejected: Vec<u32>,
    pub(crate) chosen: Option<Vec<u32>>,
    /// ℓ_0(y⁻), mean per token.
    pub(crate) start_logprob: f64,
    /// ℓ_0(y⁺), summed over its tokens; NaN without a y⁺.
    pub(crate) chosen_logprob: f64,
    pub(crate) trains_policy: bool,
    pub(crate) trains_reward: bool,
    /// The reward model's tokens.
    pub(crate) reward: RewardItem,
}

/// A benign or borderline prompt with the answer to keep.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Retained {
    pub(crate) source: Prompt,
    /// The policy's tokens.
    pub(crate) prompt: Vec<u32>,
    pub(crate) answer: Vec<u32>,
}

/// What every method starts from.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Prepared {
    pub(crate) failures: Vec<PreparedFailure>,
    pub(crate) retain: Vec<Retained>,
    pub(crate) replay: Vec<RewardItem>,
    /// Rows that could not be rendered, with the reason.
    pub(crate) dropped: Vec<String>,
}

impl Prepared {
    /// Renders everything and asks the originals once. Rows that cannot be rendered are dropped and listed.
    pub fn new<B: Ops>(setting: &mut Setting<B>, data: &RepairData) -> Result<Prepared> {
        let pair = &mut *setting.pair;
        let mut prepared = Prepared::default();
        for failure in &data.failures {
            match prepare(pair, failure) {
                Ok(failure) => prepared.failures.push(failure),
                Err(error) => prepared.dropped.push(error.to_string()),
            }
        }
        start_logprobs(pair, &mut prepared.failures)?;
        chosen_logprobs(pair, &mut prepared.failures)?;
        for (prompt, answer) in &data.retain {
            match pair.policy.rendering.with_answer(prompt, answer) {
                Ok(r) => prepared.retain.push(Retained {
                    source: prompt.clone(),
                    prompt: r.tokens[..r.prompt_len].to_vec(),
                    answer: r.answer().to_vec(),
                }),
                Err(error) => prepared.dropped.push(error.to_string()),
            }
        }
        replay(setting, data, &mut prepared)?;
        Ok(prepared)
    }
}

fn prepare<B: Ops>(pair: &Pair<B>, failure: &Failure) -> Result<PreparedFailure> {
    let policy = &pair.policy.rendering;
    let rendered = policy.with_answer(&failure.prompt, &failure.rejected.text)?;
    let rejected = failure.rejected.tokens.clone().unwrap_or_else(|| rendered.answer().to_vec());
    let answer = |text: &String| Ok(policy.with_answer(&failure.prompt, text)?.answer().to_vec());
    let chosen = failure.chosen.as_ref().map(answer).transpose()?;
    Ok(PreparedFailure {
        prompt: rendered.tokens[..rendered.prompt_len].to_vec(),
        rejected,
        chosen,
        start_logprob: f64::NAN,
        chosen_logprob: f64::NAN,
        trains_policy: failure.verdict.trains_policy(),
        trains_reward: failure.verdict.trains_reward(),
        reward: reward_item(pair, &failure.prompt, &failure.rejected.text, failure.chosen.as_deref())?,
        source: failure.clone(),
    })
}

/// A prompt with one or two answers in the reward model's tokens; the answers share the prompt where its ids begin both.
pub(super) fn reward_item<B: Ops>(
    pair: &Pair<B>,
    prompt: &Prompt,
    rejected: &str,
    chosen: Option<&str>,
) -> Result<RewardItem> {
    let reward = &pair.reward.rendering;
    let rejected = reward.full(prompt, rejected)?;
    let chosen = chosen.map(|text| reward.full(prompt, text)).transpose()?;
    let shared = chosen.as_ref().is_none_or(|c| c.tokens[..c.prompt_len] == rejected.tokens[..rejected.prompt_len]);
    let cut = if shared { rejected.prompt_len } else { 0 };
    Ok(RewardItem {
        prompt: rejected.tokens[..cut].to_vec(),
        rejected: rejected.tokens[cut..].to_vec(),
        chosen: chosen.map(|c| c.tokens[cut..].to_vec()),
        kind: RewardKind::Read,
    })
}

/// ℓ_0(y⁻) of every failure that lacks it.
pub(super) fn start_logprobs<B: Ops>(pair: &mut Pair<B>, failures: &mut [PreparedFailure]) -> Result<()> {
    let missing = |f: &&mut PreparedFailure| f.start_logprob.is_nan();
    let rows: Vec<Result<Rendered>> = failures
        .iter_mut()
        .filter(missing)
        .map(|f| Ok(Rendered { tokens: [&f.prompt[..], &f.rejected].concat(), prompt_len: f.prompt.len() }))
        .collect();
    let sums = pair.policy.logprob_sums(Version::Start, rows)?;
    for (failure, sum) in failures.iter_mut().filter(missing).zip(sums) {
        let (sum, n) = sum?;
        failure.start_logprob = sum / n.max(1) as f64;
    }
    Ok(())
}

/// ℓ_0(y⁺) of every failure that has one.
fn chosen_logprobs<B: Ops>(pair: &mut Pair<B>, failures: &mut [PreparedFailure]) -> Result<()> {
    let mut paired: Vec<&mut PreparedFailure> = failures.iter_mut().filter(|f| f.chosen.is_some()).collect();
    let row = |f: &&mut PreparedFailure| {
        let chosen = f.chosen.as_deref().unwrap_or_default();
        Ok(Rendered { tokens: [&f.prompt[..], chosen].concat(), prompt_len: f.prompt.len() })
    };
    let sums = pair.policy.logprob_sums(Version::Start, paired.iter().map(row).collect())?;
    for (failure, sum) in paired.iter_mut().zip(sums) {
        failure.chosen_logprob = sum?.0;
    }
    Ok(())
}

/// Replay pairs, with r_0's scores to anchor the answers that r_0 gets right.
fn replay<B: Ops>(setting: &mut Setting<B>, data: &RepairData, prepared: &mut Prepared) -> Result<()> {
    let Setting { pair, judge, thresholds, .. } = setting;
    let texts = data.replay.iter().flat_map(|p| [(&p.prompt, p.chosen.as_str()), (&p.prompt, p.rejected.as_str())]);
    let texts: Vec<(&Prompt, &str)> = texts.collect();
    let rewards = pair.reward(Version::Start, &texts)?;
    let harms = judge.judge(&texts, thresholds.tau_h)?;
    for ((row, rewards), harms) in data.replay.iter().zip(rewards.chunks_exact(2)).zip(harms.chunks_exact(2)) {
        let (Ok(chosen), Ok(rejected)) = (&rewards[0], &rewards[1]) else {
            prepared.dropped.push(format!("replay pair without reward: {}", row.prompt.text().len()));
            continue;
        };
        let ordered = chosen > rejected;
        let keep = |reward: f32, harm: &Result<Harm>| {
            let harmful = harm.as_ref().map_or(true, |h| h.p_harm >= thresholds.tau_h);
            let wrong = !ordered || (harmful && f64::from(reward) >= thresholds.tau_r);
            (!wrong).then_some(f64::from(reward))
        };
        let anchors = [keep(*chosen, &harms[0]), keep(*rejected, &harms[1])];
        let mut item = reward_item(pair, &row.prompt, &row.rejected, Some(&row.chosen))?;
        item.kind = RewardKind::Replay { anchors };
        prepared.replay.push(item);
    }
    Ok(())
}
