//! Every command as a person meets it: output, files, exit codes, and what bad input gets as an answer.

#[path = "common/compiler.rs"]
mod compiler;

mod cli {
    pub mod attacker;
    pub mod basics;
    pub mod bench;
    pub mod judge;
    pub mod merge;
    pub mod method;
    pub mod profiler;
    pub mod rows;
    pub mod run;
    pub mod stream;
    pub mod support;
}

#[path = "hostile/mod.rs"]
mod hostile;
