//! Outcomes, measures with their intervals, gates.

pub mod evaluate;
pub mod examiner;
#[cfg(test)]
mod fake;
pub mod gates;
pub mod measure;
pub mod observe;
pub mod outcome;
pub mod rows;
pub mod stats;

pub use evaluate::{Adapted, Changed, Counts, Evaluation, Evaluator, Settings, benchmark_id, measure_outcomes, relate};
pub use examiner::{Examiner, Memo};
pub use gates::{Limits, accepted, gates};
pub use measure::{
    Attribution, Cells, GateResult, Measure, MethodResult, Prefill, ProbeResult, Rate, SplitInfo, Summary,
};
pub use observe::{Observed, Scope, Versions, observe};
pub use outcome::Outcome;
pub use rows::{EvalRow, Family, Kind, PairRow, Response};
