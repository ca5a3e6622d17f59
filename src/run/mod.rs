//! Run directory, and the whole method from end to end.

pub(crate) mod args;
pub(crate) mod attack;
pub(crate) mod audit;
mod checkpoint;
pub(crate) mod config;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod detect;
pub(crate) mod dir;
pub(crate) mod experiment;
pub(crate) mod goals;
pub mod interrupt;
mod lab;
pub(crate) mod manifest;
pub(crate) mod models;
pub(crate) mod probe;
pub(crate) mod records;
pub(crate) mod repair;
pub(crate) mod rounds;
pub(crate) mod suite;
pub mod summary;
pub(crate) mod watch;

pub use dir::{Earlier, RunDir};
pub(crate) use manifest::Manifest;
pub(crate) use models::{Models, Scale};
pub use suite::{Suite, SuitePair};
pub(crate) use watch::Watch;
