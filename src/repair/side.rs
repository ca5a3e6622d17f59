//! One trained model's gradients, moments and scratch, lent to a step together with the model.

use super::config::RepairConfig;
use crate::error::{Error, Result};
use crate::model::{Adapter, AdapterGrad, Moments, Pretrained, Transformer, Workspace};
use crate::ops::{AdamWSpec, Ops};

/// What a step works with: one model, its adapter, and where gradients go.
pub struct Half<'a, B: Ops> {
    pub model: &'a Transformer<B>,
    pub adapter: &'a Adapter<B>,
    pub grad: &'a mut AdapterGrad<B>,
    pub workspace: &'a mut Workspace<B>,
    /// Packed rows run forward and backward so far.
    pub tokens: &'a mut u64,
}

impl<B: Ops> Half<'_, B> {
    /// Counts `rows` and makes room for them.
    pub(crate) fn reserve(&mut self, rows: usize) -> Result<()> {
        *self.tokens += rows as u64;
        if self.workspace.capacity() < rows {
            let Transformer { ops, config, .. } = self.model;
            *self.workspace = Workspace::new(ops, config, self.adapter.rank(), rows, true)?;
        }
        Ok(())
    }
}

/// One trained model's state beside its adapter.
pub(super) struct Side<B: Ops> {
    pub(super) grad: AdapterGrad<B>,
    moments: Moments<B>,
    workspace: Workspace<B>,
    pub(super) tokens: u64,
}

impl<B: Ops> Side<B> {
    pub(super) fn new(model: &Transformer<B>, adapter: &Adapter<B>, config: &RepairConfig) -> Result<Self> {
        let ops = &model.ops;
        Ok(Side {
            grad: AdapterGrad::new(ops, adapter, config.train_head)?,
            moments: Moments::new(ops, adapter)?,
            workspace: Workspace::new(ops, &model.config, adapter.rank(), config.batch_tokens, true)?,
            tokens: 0,
        })
    }

    /// Clears the gradients and lends everything a step needs.
    pub(super) fn half<'a>(&'a mut self, model: &'a Pretrained<B>) -> Result<Half<'a, B>> {
        let adapter = model.adapter.as_ref().ok_or_else(|| Error::Shape {
            op: "repair",
            expected: "an adapter to train".into(),
            found: "none".into(),
        })?;
        self.grad.clear(&model.transformer.ops)?;
        let Side { grad, workspace, tokens, .. } = self;
        Ok(Half { model: &model.transformer, adapter, grad, workspace, tokens })
    }

    /// AdamW with the step's learning rate; the gradients' norm. A norm that is not finite ends the repair.
    pub(super) fn update(&mut self, model: &mut Pretrained<B>, config: &RepairConfig, step: usize) -> Result<f64> {
        let Some(adapter) = &mut model.adapter else { return Ok(0.0) };
        let spec = AdamWSpec {
            lr: config.learning_rate(step) as f32,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            decay: config.decay as f32,
            clip: config.clip as f32,
            step: step as u32 + 1,
        };
        let norm = self.moments.step(&model.transformer.ops, adapter, &self.grad, spec)?;
        if norm.is_finite() {
            return Ok(f64::from(norm));
        }
        Err(Error::NotFinite {
            what: format!("step {step}: gradient norm of {}", model.dir.display()),
            found: norm.to_string(),
            remedy: "lower --lr".into(),
        })
    }
}
