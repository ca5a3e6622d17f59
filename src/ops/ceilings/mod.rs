//! What a device can do at best: the denominators of every share. No operation of a model.

pub(super) mod cuda;

pub use cuda::{Ceilings, measure};
