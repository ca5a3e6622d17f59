use rayon::prelude::*;

use super::{Embed, check};
use crate::backend::{Cpu, Indices, Tensor};
use crate::error::Result;

/// Rows per task: enough work to pay for handing it to another thread.
const ROWS: usize = 64;

impl Embed for Cpu {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight) -> Result<()> {
        check(x, tokens, table)?;
        let (rows, cols) = x.shape();
        let x = x.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        x.zip(tokens.buffer()[..rows].par_chunks(ROWS)).for_each(|(x, tokens)| {
            let rows = x.chunks_exact_mut(cols).zip(tokens);
            rows.for_each(|(row, &token)| table.read_row(token as usize, row));
        });
        Ok(())
    }
}
