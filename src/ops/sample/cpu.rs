use rayon::prelude::*;

use super::{Advance, Sample, SampleSpec, SampleTokens, check, check_advance, uniform};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::lm_head::cpu::{cap_row, multiply};
use crate::ops::product::{exp, maximum, simd};

impl Sample for Cpu {
    const BURST: usize = 1;

    fn sample(&self, operands: SampleTokens<Self>) -> Result<()> {
        check(&operands)?;
        let SampleTokens { tokens, logits, h, table, w, softcap, spec } = operands;
        let (rows, vocab) = logits.shape();
        multiply(&mut logits.buffer, &h.buffer, w, rows);
        let keys = table.ids.buffer.par_chunks_exact(2).zip(&table.positions.buffer);
        let tasks = logits.buffer[..rows * vocab].par_chunks_exact_mut(vocab).zip(tokens.buffer_mut()).zip(keys);
        tasks.for_each(|((logits, token), (id, &position))| {
            let finite = finite(logits);
            cap_row(logits, softcap, false);
            *token = if !finite {
                vocab as u32
            } else if spec.temperature > 0.0 {
                let u = uniform(spec.seed, [id[0], id[1]], position);
                draw(logits, u, spec)
            } else {
                largest(logits)
            };
        });
        Ok(())
    }

    fn advance(&self, operands: Advance<Self>) -> Result<()> {
        let (rows, columns) = check_advance(&operands)?;
        let Advance { history, tokens, positions, drawn, next } = operands;
        let last = (positions.bound() as u32).saturating_sub(1);
        let vocab = tokens.bound() as u32;
        let column = history.step.buffer[0] as usize;
        for i in 0..rows {
            if column < columns {
                history.tokens.buffer[i * columns + column] = next.buffer()[i];
            }
            tokens.buffer_mut()[i] = if next.buffer()[i] < vocab { next.buffer()[i] } else { 0 };
            let position = &mut positions.buffer_mut()[i];
            *position = (*position + 1).min(last);
            drawn.buffer[i] += 1;
        }
        history.step.buffer[0] += 1;
        Ok(())
    }
}

simd! {
    /// Magnitudes order as their bits do, and a maximum of integers is one vector instruction.
    fn finite<'a>(logits: &'a [f32]) -> bool {
        logits.iter().fold(0, |most: u32, l| most.max(l.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits()
    }
}

simd! {
    /// The largest logit's id, the lowest on a tie.
    fn largest<'a>(logits: &'a [f32]) -> u32 {
        let max = maximum(logits);
        logits.iter().position(|&l| l == max).unwrap_or(0) as u32
    }
}

simd! {
    /// Inverse of the cumulative distribution at `u`, over the kept tokens: by id when all are kept, else from the largest down.
    fn draw<'a>(logits: &'a mut [f32], u: f32, spec: SampleSpec) -> u32 {
        let max = maximum(logits);
        let inverse = 1.0 / spec.temperature;
        logits.iter_mut().for_each(|l| *l = exp((*l - max) * inverse));
        if spec.top_k > 0 || spec.top_p < 1.0 {
            let kept = kept(logits, spec);
            pick(u, &|| kept.iter().map(|&id| (id, logits[id as usize])))
        } else {
            pick(u, &|| (0..).zip(logits.iter().copied()))
        }
    }
}

/// The token at which the running sum of weights passes `u` of all.
#[inline(always)]
fn pick<I: Iterator<Item = (u32, f32)>>(u: f32, tokens: &impl Fn() -> I) -> u32 {
    let mut left = f64::from(u) * tokens().map(|(_, weight)| f64::from(weight)).sum::<f64>();
    let mut last = 0;
    for (id, weight) in tokens() {
        last = id;
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// The tokens that top-k and top-p keep, largest first. Sorts only as far as top-p reaches.
fn kept(weights: &[f32], spec: SampleSpec) -> Vec<u32> {
    let larger = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
    let weight = |id: &u32| f64::from(weights[*id as usize]);
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    if spec.top_k > 0 && spec.top_k < order.len() {
        order.select_nth_unstable_by(spec.top_k, larger);
        order.truncate(spec.top_k);
    }
    let limit =
        if spec.top_p < 1.0 { f64::from(spec.top_p) * order.iter().map(weight).sum::<f64>() } else { f64::INFINITY };
    let (mut count, mut sorted, mut sum) = (0, 0, 0.0);
    while count == sorted && sorted < order.len() {
        let end = (2 * sorted).max(64).min(order.len());
        if end < order.len() {
            order[sorted..].select_nth_unstable_by(end - sorted, larger);
        }
        order[sorted..end].sort_unstable_by(larger);
        while count < end && sum < limit {
            sum += weight(&order[count]);
            count += 1;
        }
        sorted = end;
    }
    order.truncate(count.max(1));
    order
}
