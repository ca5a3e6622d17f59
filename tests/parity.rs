//! The CUDA backend against `Cpu::rounded()`: per op, per model, one whole joint step. On the simulator always; on a GPU with
//! ARES_PARITY_DEVICE=cuda (ARES_REQUIRE_GPU=1 turns a skip into a failure).

mod common;
#[path = "parity/harness.rs"]
mod harness;

#[path = "parity/attention.rs"]
mod attention;
#[path = "parity/decode.rs"]
mod decode;
#[path = "parity/elementwise.rs"]
mod elementwise;
#[path = "parity/fused.rs"]
mod fused;
#[path = "common/joint.rs"]
mod joint;
#[path = "parity/large.rs"]
mod large;
#[path = "parity/layer_norm.rs"]
mod layer_norm;
#[path = "parity/lm_head.rs"]
mod lm_head;
#[path = "parity/model.rs"]
mod model;
#[path = "parity/product.rs"]
mod product;
