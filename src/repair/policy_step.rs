//! The policy's half of a step: NPO or unlikelihood on y⁻, cross entropy on y⁺, retention on benign answers.

use super::config::{RepairConfig, RetainLoss};
use super::objective::{cross_entropy, dpo, total, unlearn};
use super::side::Half;
use crate::error::Result;
use crate::model::{AnswerTokens, Batch, Heads};
use crate::ops::Ops;

/// One prompt of the step with what is trained on it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicyItem {
    pub prompt: Vec<u32>,
    /// y⁻ with π_0's mean log-probability and the coupling weight.
    pub rejected: Option<(Vec<u32>, f64, f64)>,
    /// Forced tokens followed by y⁺, and how many are forced.
    pub chosen: Option<(Vec<u32>, usize)>,
    /// π_0's summed log-probability of y⁺: DPO takes the place of unlearning y⁻ and of learning y⁺.
    pub paired: Option<f64>,
    /// A benign answer to keep.
    pub retain: Option<Vec<u32>>,
}

/// Loss terms of one step, each a mean over the items that carry it, and the mean log-probabilities that show displacement.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PolicyTerms {
    /// L_npo, or L_unlikelihood in its place.
    pub npo: f64,
    pub safe: f64,
    pub retain: f64,
    /// Mean of ℓ(y⁺) and ℓ(y⁻) over the step's items.
    pub(crate) logp_chosen: Option<f64>,
    pub(crate) logp_rejected: Option<f64>,
    /// Mean coupling weight.
    pub coupling: Option<f64>,
}

impl PolicyTerms {
    /// The weighted sum that is minimised.
    pub(crate) fn loss(&self, config: &RepairConfig) -> f64 {
        config.lambda_npo * self.npo + config.lambda_safe * self.safe + config.lambda_retain * self.retain
    }
}

/// How many items carry each term: known before the first forward, so that a step may run in several pieces.
struct Counts {
    rejected: f64,
    chosen: f64,
    retain: f64,
}

/// Forward and backward of all items; gradients are added to the side's.
pub fn policy_step<B: Ops>(half: &mut Half<'_, B>, items: &[PolicyItem], config: &RepairConfig) -> Result<PolicyTerms> {
    let count = |f: fn(&PolicyItem) -> bool| items.iter().filter(|i| f(i)).count() as f64;
    let counts = Counts {
        rejected: count(|i| i.rejected.is_some()),
        chosen: count(|i| i.chosen.is_some()),
        retain: count(|i| i.retain.is_some()),
    };
    let mut terms = PolicyTerms::default();
    let sum = items.iter().filter_map(|i| Some(i.rejected.as_ref()?.2)).sum::<f64>();
    terms.coupling = (counts.rejected > 0.0).then(|| sum / counts.rejected);
    // Retained answers last: KL needs their head rows in one piece.
    let mut ordered: Vec<&PolicyItem> = items.iter().collect();
    ordered.sort_by_key(|item| item.retain.is_some());
    for (items, batch) in
        Batch::pack(&ordered, Heads::Targets, config.batch_tokens, |item| (&item.prompt, answers(item)))
    {
        piece(half, items, &batch, config, &counts, &mut terms)?;
    }
    Ok(terms)
}

pub(crate) fn answers(item: &PolicyItem) -> Vec<AnswerTokens<'_>> {
    let rejected = item.rejected.iter().map(|(tokens, ..)| AnswerTokens::new(tokens));
    let chosen = item.chosen.iter().map(|(tokens, context)| AnswerTokens { tokens, context: *context });
    rejected.chain(chosen).chain(item.retain.iter().map(|tokens| AnswerTokens::new(tokens))).collect()
}

fn piece<B: Ops>(
    half: &mut Half<'_, B>,
    items: &[&PolicyItem],
    batch: &Batch,
    config: &RepairConfig,
    counts: &Counts,
    terms: &mut PolicyTerms,
) -> Result<()> {
    let before_retain: usize = items.iter().filter(|i| i.retain.is_none()).map(|i| answers(i).len()).sum();
    let kl_from = batch.sequences.get(before_retain).map_or(batch.rows.len(), |range| range.start);
    let kl = config.retain == RetainLoss::Kl && kl_from < batch.rows.len();
    half.reserve(batch.len())?;
    if kl {
        let mut retained = Batch::default();
        items.iter().filter(|i| i.retain.is_some()).for_each(|i| retained.push(&i.prompt, &answers(i), Heads::Targets));
        half.model.keep_start_rows(half.workspace, &retained)?;
    }
    let read = half.model.forward_targets(half.workspace, batch, Some(half.adapter), true)?;
    let kls = if kl { half.model.kl_targets(half.workspace, kl_from)? } else { Vec::new() };
    let mut weights = vec![0.0f32; batch.rows.len()];
    let mut sequences = batch.sequences.iter().cloned();
    for item in items {
        if let (Some(start), Some((_, rejected, _)), Some(_)) = (item.paired, &item.rejected, &item.chosen) {
            let (Some(y), Some(safe)) = (sequences.next(), sequences.next()) else { break };
            let of = |rows: &std::ops::Range<usize>| total(&read.logprob[rows.clone()]);
            let term = dpo(of(&safe) - start, of(&y) - rejected * y.len() as f64);
            terms.npo += term.loss / counts.rejected;
            add(&mut terms.logp_rejected, of(&y) / y.len() as f64 / counts.rejected);
            add(&mut terms.logp_chosen, of(&safe) / safe.len() as f64 / counts.chosen);
            let slope = (config.lambda_npo / counts.rejected * term.slope) as f32;
            weights[safe].fill(slope);
            weights[y].fill(-slope);
            continue;
        }
        if let (Some((_, start, w)), Some(rows)) =
            (&item.rejected, item.rejected.as_ref().and_then(|_| sequences.next()))
        {
            let (logprob, rest) = (&read.logprob[rows.clone()], &read.log_rest[rows.clone()]);
            let (loss, slopes) = unlearn(config, logprob, rest, *start, *w);
            terms.npo += loss / counts.rejected;
            add(&mut terms.logp_rejected, total(logprob) / logprob.len() as f64 / counts.rejected);
            let factor = config.lambda_npo / counts.rejected;
            weights[rows].iter_mut().zip(slopes).for_each(|(weight, slope)| *weight = (factor * slope) as f32);
        }
        if let Some(rows) = item.chosen.as_ref().and_then(|_| sequences.next()) {
            let term = cross_entropy(total(&read.logprob[rows.clone()]), rows.len());
            terms.safe += term.loss / counts.chosen;
            add(&mut terms.logp_chosen, -term.loss / counts.chosen);
            weights[rows].fill((config.lambda_safe / counts.chosen * term.slope) as f32);
        }
        if let Some(rows) = item.retain.as_ref().and_then(|_| sequences.next()) {
            let n = rows.len();
            let (loss, slope) = if kl {
                (total(&kls[rows.start - kl_from..rows.end - kl_from]) / n as f64, 1.0 / n as f64)
            } else {
                let term = cross_entropy(total(&read.logprob[rows.clone()]), n);
                (term.loss, term.slope)
            };
            terms.retain += loss / counts.retain;
            weights[rows].fill((config.lambda_retain / counts.retain * slope) as f32);
        }
    }
    half.model.backward_targets(half.workspace, &weights, half.adapter, &mut half.side.grad)
}

fn add(sum: &mut Option<f64>, value: f64) {
    *sum = Some(sum.unwrap_or(0.0) + value);
}
