//! One trained model's gradients, moments and scratch, lent to a step together with the model.

use crate::error::Result;
use crate::model::{Adapter, AdapterGrad, Moments, Transformer, Workspace};
use crate::ops::Ops;

/// What a step works with: one model, its adapter, and where gradients go.
pub struct Half<'a, B: Ops> {
    pub(crate) model: &'a Transformer<B>,
    pub(crate) adapter: &'a Adapter<B>,
    pub(crate) side: &'a mut Side<B>,
}

impl<B: Ops> Half<'_, B> {
    /// Counts `rows` and makes room for them.
    pub(crate) fn reserve(&mut self, rows: usize) -> Result<()> {
        self.side.tokens += rows as u64;
        if self.side.workspace.capacity < rows {
            let Transformer { ops, config, .. } = self.model;
            self.side.workspace = Workspace::new(ops, config, self.adapter.rank(), rows, true)?;
        }
        Ok(())
    }
}

/// One trained model's state beside its adapter.
pub struct Side<B: Ops> {
    pub grad: AdapterGrad<B>,
    pub(crate) moments: Moments<B>,
    pub(crate) workspace: Workspace<B>,
    /// Packed rows run forward and backward so far.
    pub(super) tokens: u64,
    /// AdamW steps that the moments have seen: more than a repair's own where it goes on from another.
    pub(super) updates: u32,
}

impl<B: Ops> Side<B> {
    /// Memory for steps of at most `rows` packed rows at a time; a longer batch makes more.
    pub fn new(model: &Transformer<B>, adapter: &Adapter<B>, train_head: bool, rows: usize) -> Result<Self> {
        let ops = &model.ops;
        Ok(Side {
            grad: AdapterGrad::new(ops, adapter, train_head)?,
            moments: Moments::new(ops, adapter)?,
            workspace: Workspace::new(ops, &model.config, adapter.rank(), rows, true)?,
            tokens: 0,
            updates: 0,
        })
    }

    /// Clears the gradients and lends everything a step needs.
    pub fn half<'a>(&'a mut self, model: &'a Transformer<B>, adapter: &'a Adapter<B>) -> Result<Half<'a, B>> {
        self.grad.clear(&model.ops)?;
        Ok(Half { model, adapter, side: self })
    }
}
