//! Outcomes, measures with their intervals, gates.

pub mod measure;
pub mod stats;

pub use measure::{
    Attribution, Cells, GateResult, Measure, MethodResult, Prefill, ProbeResult, Rate, SplitInfo, Summary,
};
