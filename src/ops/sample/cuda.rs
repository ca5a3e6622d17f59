use super::{History, Sample, SampleSpec, SampleTable, check, check_advance};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::Cost;
use crate::ops::product::cuda::logits;

const THREADS: u32 = 256;
/// A double and a count per thread, a float per warp, and the token, at the double's alignment.
const SHARED: u32 = (12 * THREADS + 4 * (THREADS / 32) + 4).next_multiple_of(8);
const DEFINES: &[Define] = &[("THREADS", THREADS as u64), ("SHARED_BYTES", SHARED as u64)];

/// What is compiled for any model.
pub(crate) fn builds() -> Vec<Build> {
    let build = Build::new(&kernels::SAMPLE, DEFINES, THREADS);
    vec![build.with("sample_draw", THREADS, SHARED, 1).with("sample_greedy", THREADS, SHARED, 1)]
}

impl Sample for Cuda {
    const BURST: usize = 8;

    fn sample(
        &self,
        tokens: &mut Tensor<Self, u32>,
        scores: &mut Tensor<Self, f32>,
        h: &Tensor<Self>,
        table: &SampleTable<Self>,
        w: &Self::Weight,
        spec: SampleSpec,
    ) -> Result<()> {
        check(tokens, scores, h, table, w)?;
        logits(self, scores, h, w)?;
        let vocab = scores.cols() as u32;
        let config = LaunchConfig::linear(h.rows() as u32, THREADS).with_shared(SHARED);
        let (tokens, rows) = (&mut tokens.buffer, &mut scores.buffer);
        let (ids, positions) = (&table.ids.buffer, &table.positions.buffer);
        let SampleSpec { temperature, top_k, top_p, seed } = spec;
        self.charge(|| Cost { flops: 0, bytes: 4 * h.rows() as u64 * u64::from(vocab) });
        // SAFETY: `check` proved one row of logits, one token, one position and two halves of an id per row of h.
        unsafe {
            if temperature > 0.0 {
                let (k, t) = (top_k as u32, temperature);
                kernels::sample_draw(self, DEFINES, config, tokens, rows, ids, positions, vocab, t, k, top_p, seed)
            } else {
                kernels::sample_greedy(self, DEFINES, config, tokens, rows, vocab)
            }
        }
    }

    fn advance(
        &self,
        history: &mut History<Self>,
        tokens: &mut Tensor<Self, u32>,
        positions: &mut Tensor<Self, u32>,
        drawn: &mut Tensor<Self, u32>,
        next: &Tensor<Self, u32>,
    ) -> Result<()> {
        let (rows, columns) = check_advance(history, [tokens, positions, drawn], next)?;
        let (n, columns, config) = (rows as u32, columns as u32, LaunchConfig::linear(1, THREADS));
        let (history, step) = (&mut history.tokens.buffer, &mut history.step.buffer);
        let (tokens, positions, drawn) = (&mut tokens.buffer, &mut positions.buffer, &mut drawn.buffer);
        // SAFETY: `check_advance` proved one row of each column and of the history per sequence.
        unsafe {
            kernels::advance(self, DEFINES, config, history, step, tokens, positions, drawn, &next.buffer, n, columns)
        }
    }
}
