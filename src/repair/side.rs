//! One trained model's gradients and moments, lent to a step together with the model and the memory it runs in.

use crate::error::Result;
use crate::model::{Adapter, AdapterGrad, Moments, Transformer, Workspace};
use crate::ops::Ops;

/// What a step works with: one model, its adapter, where gradients go, and what it runs in.
pub struct Half<'a, B: Ops> {
    pub(crate) model: &'a Transformer<B>,
    pub(crate) adapter: &'a Adapter<B>,
    pub(crate) side: &'a mut Side<B>,
    /// Of both models, which take turns.
    pub(crate) workspace: &'a mut Workspace<B>,
}

impl<'a, B: Ops> Half<'a, B> {
    /// Clears the gradients and gives the model's sizes to the workspace.
    pub fn new(
        model: &'a Transformer<B>,
        adapter: &'a Adapter<B>,
        side: &'a mut Side<B>,
        workspace: &'a mut Workspace<B>,
    ) -> Result<Self> {
        side.grad.clear(&model.ops)?;
        workspace.fit(&model.ops, &model.config, adapter.rank(), workspace.capacity)?;
        Ok(Half { model, adapter, side, workspace })
    }

    /// Counts `rows` and makes room for them.
    pub(crate) fn reserve(&mut self, rows: usize) -> Result<()> {
        self.side.tokens += rows as u64;
        if self.workspace.capacity < rows {
            self.workspace.fit(&self.model.ops, &self.model.config, self.adapter.rank(), rows)?;
        }
        Ok(())
    }
}

/// One trained model's state beside its adapter.
pub struct Side<B: Ops> {
    pub grad: AdapterGrad<B>,
    pub(crate) moments: Moments<B>,
    /// Packed rows run forward and backward so far.
    pub(super) tokens: u64,
    /// AdamW steps that the moments have seen: more than a repair's own where it goes on from another.
    pub(super) updates: u32,
}

impl<B: Ops> Side<B> {
    /// Gradients and moments of an adapter, and of the head where it is trained; all zero.
    pub fn new(model: &Transformer<B>, adapter: &Adapter<B>, train_head: bool) -> Result<Self> {
        let (grad, moments) = (AdapterGrad::new(&model.ops, adapter, train_head)?, Moments::new(&model.ops, adapter)?);
        Ok(Side { grad, moments, tokens: 0, updates: 0 })
    }
}
