use super::{Embed, check};
use crate::backend::{Cuda, Indices, Tensor};
use crate::error::Result;
use crate::ops::rows::gather;

impl Embed for Cuda {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Indices<Self>, table: &Self::Weight) -> Result<()> {
        check(x, tokens, table)?;
        // SAFETY: `check` proved one token per row, equal columns, and that every token is below V.
        unsafe { gather(self, x, &table.buffer, tokens) }
    }
}
