//! ARES finds prompts on which a language model (the *policy*) and the *reward model* that guides its training fail
//! together, repairs both in one joint LoRA step, and proves on held-out prompts that it worked.
//!
//! The map, lower layers first; no arrow turns back (`tests/layers.rs`):
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`] | one error type; every message says expected, found, where, what to do |
//! | [`backend`] | memory, copies, launching; knows no operation |
//! | [`ops`] | one folder per operation: formula, shape check, cost, both directions; plain loops, fast CPU kernel and CUDA geometry beside it |
//! | [`journal`] | what a run has done, unit by unit; a run resumes from it |
//! | [`text`] | rows in and out, tokenizer, chat template |
//! | [`model`] | checkpoints by mmap, transformer forward and backward, heads, adapters, packed batches, generation |
//! | [`judge`] | who says what is harmful; calibration; verdicts |
//! | [`attacker`] | who writes prompts for the search: a language model, a program |
//! | [`repair`] | the joint objective, its optimiser loop and the methods compared with it |
//! | [`probe`] | search for prompts that expose coupled failures |
//! | [`detect`] | outcomes, measures with their intervals, gates |
//! | [`run`] | run directory, the loop, the demo and the comparison from end to end |
//! | [`mod@bench`] | how fast: a joint step, scoring, decoding, each operation, loading |
//! | [`report`] | tables, charts, HTML |
//! | [`cli`] | commands: what was typed becomes valid options and one call |

pub mod attacker;
pub mod backend;
pub mod bench;
pub mod cli;
pub mod detect;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod journal;
pub mod judge;
pub mod model;
pub mod ops;
pub mod probe;
pub mod repair;
pub mod report;
pub mod run;
pub mod text;

pub use error::{Error, Result, visible};
