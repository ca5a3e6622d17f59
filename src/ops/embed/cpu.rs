use super::{Embed, check};
use crate::backend::{Cpu, Matrix, Tensor};
use crate::error::Result;

impl Embed for Cpu {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Tensor<Self, u32>, table: &Self::Weight) -> Result<()> {
        check(x, tokens, table)?;
        let cols = table.cols();
        let rows = x.rows();
        for (row, &token) in x.buffer.chunks_exact_mut(cols).take(rows).zip(&tokens.buffer) {
            table.backward().read_row(token as usize, row);
        }
        Ok(())
    }
}
