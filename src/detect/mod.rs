//! Outcomes, measures with their intervals, gates.

pub(crate) mod agreement;
pub(crate) mod audit;
pub(crate) mod evaluate;
pub(crate) mod examiner;
#[cfg(test)]
mod fake;
pub(crate) mod gates;
pub(crate) mod measure;
pub(crate) mod observe;
pub(crate) mod outcome;
pub(crate) mod rows;
pub(crate) mod stats;

pub use evaluate::Evaluator;
pub use examiner::Examiner;
