//! Run directory, journal, and the whole method from end to end.

pub mod bench;
pub mod data;
pub mod demo;
pub mod detect;
pub mod dir;
pub mod experiment;
pub mod interrupt;
pub mod journal;
pub mod manifest;
pub mod probe;
pub mod records;
pub mod repair;
pub mod speed;
pub mod suite;
pub mod summary;
pub mod watch;

pub use bench::{Models, Scale};
pub use data::{DataFiles, Splits};
pub use dir::{Earlier, RunDir};
pub use experiment::Experiment;
pub use journal::Journal;
pub use manifest::Manifest;
pub use suite::{Suite, SuitePair};
pub use watch::{Silent, Watch};
