use rayon::prelude::*;

use super::{LmHead, LmHeadForward, LmHeadKl, check_forward, check_kl};
use crate::backend::{Cpu, Matrix};
use crate::error::Result;
use crate::ops::product::{View, ViewMut, exp, folded, maximum, product, simd};

/// A chunk of logits stays below this many values, so that it lies in the last cache for small vocabularies.
const CHUNK: usize = 1 << 20;

impl LmHead for Cpu {
    fn lm_head_chunk(vocab: usize) -> usize {
        (CHUNK / vocab.max(1) / 64 * 64).clamp(128, 1024)
    }

    fn lm_head_forward(&self, operands: LmHeadForward<Self>) -> Result<()> {
        let [rows, vocab, cols] = check_forward(&operands)?;
        let LmHeadForward { out, mut dh, chunk, h, targets, w, softcap } = operands;
        for first in (0..rows).step_by(chunk.capacity()) {
            let count = chunk.capacity().min(rows - first);
            let logits = &mut chunk.buffer[..count * vocab];
            multiply(logits, &h.buffer[first * cols..], w, count);
            let outs = out.logprob.buffer[first..].par_iter_mut().zip(&mut out.lse.buffer[first..]);
            let outs = outs.zip(&mut out.log_rest.buffer[first..]).zip(&targets.buffer[first..]);
            logits.par_chunks_exact_mut(vocab).zip(outs).for_each(|(row, (((logprob, lse), rest), &target))| {
                let slopes = cap_row(row, softcap, dh.is_some());
                (*logprob, *lse, *rest) = target_row(row, target as usize, dh.is_some());
                scale(row, &slopes);
                self.store(row);
            });
            if let Some(dh) = &mut dh {
                back(&mut dh.buffer[first * cols..], logits, w, count);
                self.store(&mut dh.buffer[first * cols..][..count * cols]);
            }
        }
        Ok(())
    }

    fn lm_head_kl(&self, operands: LmHeadKl<Self>) -> Result<()> {
        let [rows, vocab, cols] = check_kl(&operands)?;
        let LmHeadKl { kl, dh, chunk, chunk0, h, h0, w, softcap } = operands;
        let size = chunk.capacity().min(chunk0.capacity());
        for first in (0..rows).step_by(size) {
            let count = size.min(rows - first);
            let (logits, logits0) = (&mut chunk.buffer[..count * vocab], &mut chunk0.buffer[..count * vocab]);
            multiply(logits, &h.buffer[first * cols..], w, count);
            multiply(logits0, &h0.buffer[first * cols..], w, count);
            let kls = kl.buffer[first..].par_iter_mut();
            let pairs = logits.par_chunks_exact_mut(vocab).zip(logits0.par_chunks_exact_mut(vocab));
            pairs.zip(kls).for_each(|((row, row0), kl)| {
                let slopes = cap_row(row, softcap, true);
                cap_row(row0, softcap, false);
                *kl = kl_row(row, row0);
                scale(row, &slopes);
                self.store(row);
            });
            back(&mut dh.buffer[first * cols..], logits, w, count);
            self.store(&mut dh.buffer[first * cols..][..count * cols]);
        }
        Ok(())
    }
}

/// logits = h·Wᵀ
pub(crate) fn multiply(logits: &mut [f32], h: &[f32], w: &crate::backend::cpu::CpuMatrix, rows: usize) {
    let (vocab, cols) = (w.rows(), w.cols());
    product(ViewMut::new(logits, rows, vocab, vocab), View::new(h, rows, cols, cols), w.forward(), false);
}

/// dh = dlogits·W
fn back(dh: &mut [f32], dlogits: &[f32], w: &crate::backend::cpu::CpuMatrix, rows: usize) {
    let (vocab, cols) = (w.rows(), w.cols());
    product(ViewMut::new(dh, rows, cols, cols), View::new(dlogits, rows, vocab, vocab), w.backward(), false);
}

/// Caps a row of logits; returns the cap's slopes where they are wanted, and nothing where there is no cap.
pub(crate) fn cap_row(row: &mut [f32], softcap: Option<f32>, slopes: bool) -> Vec<f32> {
    let Some(cap) = softcap else { return Vec::new() };
    capped(row, cap);
    let slope = |l: &f32| 1.0 - (l / cap) * (l / cap);
    if slopes { row.iter().map(slope).collect() } else { Vec::new() }
}

simd! {
    fn capped<'a>(row: &'a mut [f32], cap: f32) -> () {
        for l in row {
            // tanh x = 1 − 2/(e^2x + 1)
            *l = cap * (1.0 - 2.0 / (exp(*l * (2.0 / cap)) + 1.0));
        }
    }
}

fn scale(row: &mut [f32], slopes: &[f32]) {
    row.iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope);
}

simd! {
    /// Returns (log p, lse, log(1 − p)) of the target. Logits become 1[target] − p with `gradient`, else they are used up.
    fn target_row<'a>(row: &'a mut [f32], target: usize, gradient: bool) -> (f32, f32, f32) {
        let logit = row[target];
        let max = maximum(row);
        // Summed without the target: 1 − p must not come out of a subtraction.
        row[target] = f32::NEG_INFINITY;
        let mut rest = 0.0;
        for piece in row.chunks_mut(PIECE) {
            rest += exp_sum(piece, max);
        }
        let sum = rest + exp(logit - max);
        let lse = max + sum.ln();
        let inverse = 1.0 / sum;
        if gradient {
            row.iter_mut().for_each(|p| *p *= -inverse);
            row[target] = rest * inverse;
        }
        (logit - lse, lse, (rest * inverse).ln())
    }
}

simd! {
    /// `row`: θ's logits → π_θ − π_0; `row0`: π_0's logits → π_0. Returns Σ π_0·(log π_0 − log π_θ).
    fn kl_row<'a>(row: &'a mut [f32], row0: &'a mut [f32]) -> f32 {
        let (lse, lse0) = (log_sum_exp(row), log_sum_exp(row0));
        let mut sums = [0.0f32; 16];
        for (row, row0) in row.chunks_mut(16).zip(row0.chunks_mut(16)) {
            for ((l, l0), sum) in row.iter_mut().zip(row0).zip(&mut sums) {
                let (p, p0) = (exp(*l - lse), exp(*l0 - lse0));
                *sum += p0 * ((*l0 - lse0) - (*l - lse));
                (*l, *l0) = (p - p0, p0);
            }
        }
        folded(sums)
    }
}

/// Columns that are summed by themselves: of 150,000 small terms, one after the other onto a large sum, rounding takes a share.
const PIECE: usize = 4096;

#[inline(always)]
fn log_sum_exp(row: &[f32]) -> f32 {
    // Loops, no closures: those the compiler may keep as functions for the oldest processor.
    let (max, mut total) = (maximum(row), 0.0);
    for piece in row.chunks(PIECE) {
        let (mut sums, mut rest) = ([0.0f32; 16], 0.0);
        let blocks = piece.chunks_exact(16);
        for l in blocks.remainder() {
            rest += exp(l - max);
        }
        for block in blocks {
            for i in 0..16 {
                sums[i] += exp(block[i] - max);
            }
        }
        total += folded(sums) + rest;
    }
    max + total.ln()
}

/// Values become e^(value − max); returns their sum.
#[inline(always)]
fn exp_sum(row: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let mut blocks = row.chunks_exact_mut(16);
    for block in &mut blocks {
        for i in 0..16 {
            block[i] = exp(block[i] - max);
            sums[i] += block[i];
        }
    }
    let mut rest = 0.0;
    for value in blocks.into_remainder() {
        *value = exp(*value - max);
        rest += *value;
    }
    folded(sums) + rest
}
