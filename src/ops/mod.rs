//! One folder per operation. `mod.rs` holds the formula, the trait with both directions, the shape check and the cost; `naive.rs` both
//! directions in plain loops, which is where to begin reading and what tests hold the others against; `cpu.rs` the fast CPU
//! kernel; `cuda.rs` the constants and geometry of the GPU's, which stand in `kernels/`.
//!
//! Word order everywhere: outputs, inputs, weights, scalars; a gradient is `d` + name; statistics go by their usual names.
//! The residual stream's gradient and adapter gradients accumulate, every other gradient is overwritten; each method's doc
//! says which. Ops are cut where a GPU fuses; a backend may run one as several kernels.

pub mod adamw;
pub mod attention;
pub mod ceilings;
pub mod decode;
pub mod embed;
pub mod gate_up;
pub mod layer_norm;
pub mod lm_head;
pub mod lora;
pub mod norm;
pub mod product;
pub mod project;
pub mod qkv;
pub mod rows;
pub mod sample;
pub mod score_head;

pub use adamw::{AdamW, AdamWSpec, Parameter};
pub use attention::{Attention, AttentionSpec, Packing, Segment};
pub(crate) use ceilings::{Measured, Rates};
pub use decode::{Decode, KvCache, SlotTable};
pub use embed::Embed;
pub use gate_up::{Activation, GateUp, GateUpSpec};
pub use layer_norm::LayerNorm;
pub use lm_head::{HeadRows, LmHead};
pub use lora::{Lora, LoraGrad};
pub use norm::{Norm, NormSpec};
pub use project::Project;
pub use qkv::{Qkv, QkvSpec, QkvWeights, Rope};
pub use rows::Rows;
pub use sample::{History, Sample, SampleSpec, SampleTable};
pub use score_head::ScoreHead;

use crate::backend::Backend;
pub use crate::backend::cost::Cost;
use crate::backend::cuda::Build;
use crate::error::{Error, Result};

/// All that a transformer needs of a device.
pub trait Ops:
    Backend
    + Embed
    + Norm
    + LayerNorm
    + Qkv
    + Attention
    + Project
    + GateUp
    + Rows
    + LmHead
    + ScoreHead
    + AdamW
    + Decode
    + Sample
{
}

impl Ops for crate::backend::Cpu {}
impl Ops for crate::backend::Cuda {}

/// Every kernel with the constants of typical models, for `ares kernels` and the tests. An operation with kernels adds its own.
pub fn builds() -> Vec<Build> {
    let builds = [
        adamw::cuda::builds(),
        attention::cuda::builds(),
        ceilings::cuda::builds(),
        decode::cuda::builds(),
        gate_up::cuda::builds(),
        layer_norm::cuda::builds(),
        lm_head::cuda::builds(),
        lora::cuda::builds(),
        norm::cuda::builds(),
        product::cuda::builds(),
        qkv::cuda::builds(),
        rows::cuda::builds(),
        sample::cuda::builds(),
        score_head::cuda::builds(),
    ];
    builds.into_iter().flatten().collect()
}

/// Fails unless `found == expected`; `what` names the operand.
pub(crate) fn expect<T: PartialEq + std::fmt::Debug>(
    op: &'static str,
    what: &str,
    found: T,
    expected: T,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{what} {expected:?}"), found: format!("{found:?}") })
}
