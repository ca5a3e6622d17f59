//! The reward model's half of a step: Bradley–Terry and centring on failures, replay and anchor on validated pairs.

use serde::{Deserialize, Serialize};

use super::config::RepairConfig;
use super::objective::{anchor, bradley_terry, center};
use super::side::Half;
use crate::error::Result;
use crate::judge::Thresholds;
use crate::model::{AnswerTokens, Batch, Heads};
use crate::ops::Ops;

/// A prompt with two answers in the reward model's own tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardItem {
    pub prompt: Vec<u32>,
    pub rejected: Vec<u32>,
    pub chosen: Option<Vec<u32>>,
    pub kind: RewardKind,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub enum RewardKind {
    /// Only read, for the coupling weight.
    #[default]
    Read,
    /// A failure of the reward model: L_bt and L_center.
    Failure,
    /// A validated pair: L_replay, and L_anchor to r_0's scores of the answers that r_0 gets right (chosen, rejected).
    Replay { anchors: [Option<f64>; 2] },
}

/// Loss terms of one step, each a mean over the items that carry it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RewardTerms {
    pub bt: f64,
    pub center: f64,
    pub replay: f64,
    pub anchor: f64,
}

impl RewardTerms {
    /// The weighted sum that is minimised.
    pub(crate) fn loss(&self, config: &RepairConfig) -> f64 {
        config.lambda_bt * self.bt
            + config.lambda_center * self.center
            + config.lambda_replay * self.replay
            + config.lambda_anchor * self.anchor
    }
}

struct Counts {
    failures: f64,
    replay: f64,
    anchors: f64,
}

/// Forward and, with `train`, backward of all items; gradients are added to the side's. Returns the terms and r_φ(y⁻) of every
/// item in order.
pub fn reward_step<B: Ops>(
    half: &mut Half<'_, B>,
    items: &[RewardItem],
    config: &RepairConfig,
    thresholds: &Thresholds,
    train: bool,
) -> Result<(RewardTerms, Vec<f64>)> {
    let carried = |i: &&RewardItem| i.kind == RewardKind::Failure && i.chosen.is_some();
    let anchors = |i: &RewardItem| match i.kind {
        RewardKind::Replay { anchors } => anchors.iter().flatten().count(),
        RewardKind::Read | RewardKind::Failure => 0,
    };
    let counts = Counts {
        failures: items.iter().filter(carried).count() as f64,
        replay: items.iter().filter(|i| matches!(i.kind, RewardKind::Replay { .. })).count() as f64,
        anchors: items.iter().map(anchors).sum::<usize>() as f64,
    };
    let (mut terms, mut rejected) = (RewardTerms::default(), Vec::with_capacity(items.len()));
    for (items, batch) in Batch::pack(items, Heads::Ends, config.batch_tokens, |item| (&item.prompt, answers(item))) {
        half.reserve(batch.len())?;
        let scores = half.model.forward_scores(half.workspace, &batch, Some(half.adapter))?;
        let mut slopes = vec![0.0f32; scores.len()];
        let mut at = 0;
        for item in items {
            let r_rejected = f64::from(scores[at]);
            rejected.push(r_rejected);
            let Some(_) = item.chosen else {
                at += 1;
                continue;
            };
            let pair = [f64::from(scores[at + 1]), r_rejected];
            let [d_chosen, d_rejected] = pair_slopes(item.kind, pair, config, thresholds, &counts, &mut terms);
            (slopes[at], slopes[at + 1]) = (d_rejected as f32, d_chosen as f32);
            at += 2;
        }
        if train {
            half.model.backward_scores(half.workspace, &slopes, half.adapter, &mut half.side.grad)?;
        }
    }
    Ok((terms, rejected))
}

pub(crate) fn answers(item: &RewardItem) -> Vec<AnswerTokens<'_>> {
    std::iter::once(&item.rejected).chain(&item.chosen).map(|tokens| AnswerTokens::new(tokens)).collect()
}

/// Adds one pair's share to the terms; returns the loss's slopes by r(y⁺) and r(y⁻).
fn pair_slopes(
    kind: RewardKind,
    [chosen, rejected]: [f64; 2],
    config: &RepairConfig,
    thresholds: &Thresholds,
    counts: &Counts,
    terms: &mut RewardTerms,
) -> [f64; 2] {
    match kind {
        RewardKind::Read => [0.0, 0.0],
        RewardKind::Failure => {
            let bt = bradley_terry(chosen, rejected, config.margin);
            let mid = center(chosen, rejected, thresholds);
            terms.bt += bt.loss / counts.failures;
            terms.center += mid.loss / counts.failures;
            let (bt, mid) = (config.lambda_bt * bt.slope, config.lambda_center * mid.slope);
            [(bt + mid) / counts.failures, (mid - bt) / counts.failures]
        }
        RewardKind::Replay { anchors } => {
            let bt = bradley_terry(chosen, rejected, config.margin);
            terms.replay += bt.loss / counts.replay;
            let mut slopes = [bt.slope, -bt.slope].map(|slope| config.lambda_replay * slope / counts.replay);
            for ((slope, start), reward) in slopes.iter_mut().zip(anchors).zip([chosen, rejected]) {
                if let Some(start) = start {
                    let term = anchor(reward, start, thresholds);
                    terms.anchor += term.loss / counts.anchors;
                    *slope += config.lambda_anchor * term.slope / counts.anchors;
                }
            }
            slopes
        }
    }
}
