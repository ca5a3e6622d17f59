use super::{Advance, Sample, SampleSpec, SampleTokens, check, check_advance};
use crate::backend::Cuda;
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, AdvanceParams, DrawParams};
use crate::error::Result;
use crate::ops::Cost;
use crate::ops::product::cuda::logits;

/// As many as a digit of the weights has values.
const THREADS: u32 = 1024;
/// A double, a bin and a word per thread, a double and a float per warp, a double and the border, at the double's alignment.
const SHARED: u32 = ((8 + 12 + 4) * THREADS + (8 + 4) * (THREADS / 32) + 8 + 12).next_multiple_of(8);
const DEFINES: &[Define] = &[("THREADS", THREADS as u64), ("SHARED_BYTES", SHARED as u64)];

pub(crate) fn builds() -> Vec<Build> {
    let build = Build::new(&kernels::SAMPLE, DEFINES, THREADS);
    vec![build.with("sample_draw", THREADS, SHARED, 1).with("sample_greedy", THREADS, SHARED, 1)]
}

impl Sample for Cuda {
    const BURST: usize = 8;

    fn sample(&self, operands: SampleTokens<Self>) -> Result<()> {
        check(&operands)?;
        let SampleTokens { tokens, logits: scores, h, table, w, softcap, spec } = operands;
        logits(self, scores, h, w)?;
        let vocab = scores.cols();
        let config = LaunchConfig::linear(h.rows() as u32, THREADS).with_shared(SHARED);
        let (tokens, rows) = (tokens.buffer_mut(), &mut scores.buffer);
        self.charge(|| Cost { flops: 0, bytes: 4 * (h.rows() * vocab) as u64 });
        let SampleSpec { temperature, top_k, top_p, seed } = spec;
        let (ids, positions) = (&table.ids.buffer, &table.positions.buffer);
        let softcap = softcap.unwrap_or(0.0);
        let params = DrawParams { ids, positions, seed, vocab, top_k, temperature, top_p, softcap };
        // SAFETY: `check` proved one row of logits, one token, one position and two halves of an id per row of h.
        unsafe {
            match temperature > 0.0 {
                true => kernels::sample_draw(self, DEFINES, config, tokens, rows, &params),
                false => kernels::sample_greedy(self, DEFINES, config, tokens, rows, vocab, softcap),
            }
        }
    }

    fn advance(&self, operands: Advance<Self>) -> Result<()> {
        let (rows, columns) = check_advance(&operands)?;
        let Advance { history, tokens, positions, drawn, next } = operands;
        let params = AdvanceParams {
            vocab: tokens.bound(),
            bound: positions.bound(),
            history: &mut history.tokens.buffer,
            step: &mut history.step.buffer,
            tokens: tokens.buffer_mut(),
            positions: positions.buffer_mut(),
            drawn: &mut drawn.buffer,
            next: next.buffer(),
            rows,
            columns,
        };
        // SAFETY: `check_advance` proved one row of each column and of the history per sequence.
        unsafe { kernels::advance(self, DEFINES, LaunchConfig::linear(1, THREADS), &params) }
    }
}
