//! Backward of a whole block and of whole models = central differences of their forward. (Of each operation: `tests/ops`.)

#[path = "gradient/block.rs"]
mod block;
#[path = "ops/toolkit.rs"]
mod toolkit;
#[path = "gradient/transformer.rs"]
mod transformer;
