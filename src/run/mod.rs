//! Run directory, journal, and the whole method from end to end.

pub mod dir;
pub mod interrupt;
pub mod journal;
pub mod manifest;
pub mod records;
pub mod summary;

pub use dir::{Earlier, RunDir};
pub use journal::Journal;
pub use manifest::Manifest;
