use super::{Embed, check};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::rows::gather;

impl Embed for Cuda {
    fn embed(&self, x: &mut Tensor<Self>, tokens: &Tensor<Self, u32>, table: &Self::Weight) -> Result<()> {
        check(x, tokens, table)?;
        // SAFETY: `check` proved one token per row and equal columns; every token is below V, as the trait demands.
        unsafe { gather(self, x, &table.buffer, tokens) }
    }
}
