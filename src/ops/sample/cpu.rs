use rayon::prelude::*;

use super::{Sample, SampleSpec, SampleTable, check, uniform};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::lm_head::cpu::multiply;
use crate::ops::product::{exp, simd};

impl Sample for Cpu {
    fn sample(
        &self,
        tokens: &mut Tensor<Self, u32>,
        logits: &mut Tensor<Self>,
        h: &Tensor<Self>,
        table: &SampleTable<Self>,
        w: &Self::Weight,
        spec: SampleSpec,
    ) -> Result<()> {
        check(tokens, logits, h, table, w)?;
        let (rows, vocab) = logits.shape();
        multiply(&mut logits.buffer, &h.buffer, w, rows);
        let keys = table.ids.buffer.par_chunks_exact(2).zip(&table.positions.buffer);
        let tasks = logits.buffer[..rows * vocab].par_chunks_exact_mut(vocab).zip(&mut tokens.buffer).zip(keys);
        tasks.for_each(|((logits, token), (id, &position))| {
            *token = if spec.temperature > 0.0 {
                draw(logits, uniform(spec.seed, [id[0], id[1]], position), spec)
            } else {
                simd(|| largest(logits))
            };
        });
        Ok(())
    }
}

/// The largest logit's id, the lowest on a tie.
#[inline(always)]
fn largest(logits: &[f32]) -> u32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &l| if l > max { l } else { max });
    logits.iter().position(|&l| l == max).unwrap_or(0) as u32
}

/// Inverse of the cumulative distribution at `u`, over the kept tokens: by id when all are kept, else from the largest down.
fn draw(logits: &mut [f32], u: f32, spec: SampleSpec) -> u32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &l| if l > max { l } else { max });
    let inverse = 1.0 / spec.temperature;
    logits.iter_mut().for_each(|l| *l = exp((*l - max) * inverse));
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let weight = |id: u32| f64::from(logits[id as usize]);
    if spec.top_k > 0 || spec.top_p < 1.0 {
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        if spec.top_k > 0 {
            order.truncate(spec.top_k);
        }
        let limit = f64::from(spec.top_p) * order.iter().map(|&id| weight(id)).sum::<f64>();
        let mut sum = 0.0;
        let kept = order.iter().take_while(|&&id| {
            let more = sum < limit;
            sum += weight(id);
            more
        });
        let kept = kept.count().max(1);
        order.truncate(kept);
    }
    let mut left = f64::from(u) * order.iter().map(|&id| weight(id)).sum::<f64>();
    for &id in &order {
        left -= weight(id);
        if left < 0.0 {
            return id;
        }
    }
    order.last().copied().unwrap_or(0)
}
