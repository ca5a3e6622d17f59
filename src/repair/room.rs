//! The memory that a repair's forwards and backwards run in.

use super::config::{Method, Recipe};
use crate::error::Result;
use crate::model::{Pair, Transformer, Workspace};
use crate::ops::Ops;

/// Takes the activations' memory that a repair by one of these methods will, and gives it back: that a device is too small is to be
/// known before hours of search, not after.
pub(crate) fn rehearse<B: Ops>(pair: &Pair<B>, methods: &[Method], config: &Recipe) -> Result<()> {
    let trained = [(Method::trains_policy as fn(_) -> _, &pair.policy), (Method::trains_reward, &pair.reward)];
    let models = trained.into_iter().filter(|(trains, _)| methods.iter().any(|&method| trains(method)));
    of(&pair.policy.transformer, models.map(|(_, model)| (&model.transformer, config.rank)), config).map(drop)
}

/// As large as the largest of the models asks, with their adapters' ranks; `shape` says what it begins as.
pub(super) fn of<'a, B: Ops>(
    shape: &Transformer<B>,
    models: impl Iterator<Item = (&'a Transformer<B>, usize)>,
    config: &Recipe,
) -> Result<Workspace<B>> {
    let mut workspace = Workspace::new(&shape.ops, &shape.config, 0, 0, config.recompute.keep())?;
    for (model, rank) in models {
        workspace.fit(&model.ops, &model.config, rank, config.batch_tokens)?;
    }
    Ok(workspace)
}
