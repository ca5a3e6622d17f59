//! Outcomes, measures with their intervals, gates.

pub mod measure;

pub use measure::{
    Attribution, Cells, GateResult, Measure, MethodResult, Prefill, ProbeResult, Rate, SplitInfo, Summary,
};
