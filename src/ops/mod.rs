//! One folder per operation. `mod.rs` holds the formula, the trait with both directions, the shape check and the cost; `naive.rs` both
//! directions in plain loops, which is where to begin reading and what tests hold the others against; `cpu.rs` the fast CPU
//! kernel; `cuda.rs` the constants and geometry of the GPU's, which stand in `kernels/`.
//!
//! Word order everywhere: outputs, inputs, weights, scalars; a gradient is `d` + name; statistics go by their usual
//! names. A direction of many operands takes them in one struct, so that none can stand in another's place. The
//! residual stream's gradient and adapter gradients accumulate, every other gradient is overwritten; each operand says
//! which. Ops are cut where a GPU fuses; a backend may run one as several kernels.

pub mod adamw;
pub mod attention;
pub mod ceilings;
pub mod decode;
pub mod gate_up;
pub mod layer_norm;
pub mod lm_head;
pub mod lora;
pub mod norm;
pub mod product;
pub mod qkv;
pub mod rows;
pub mod sample;
pub mod score_head;

pub use adamw::{AdamW, AdamWSpec, Parameter};
pub use attention::{Attention, AttentionBackward, AttentionForward, AttentionSpec, Packing, Segment};
pub(crate) use ceilings::{Measured, Rates};
pub use decode::{Decode, DecodeAttention, KvCache, SlotTable};
pub use gate_up::{Activation, GateUp, GateUpSpec};
pub use layer_norm::{LayerNorm, LayerNormBackward, LayerNormForward};
pub use lm_head::{HeadRows, LmHead, LmHeadForward, LmHeadKl};
pub use lora::{Linear, LinearBackward, LinearForward, LinearGradients, LinearWeights, Lora, LoraGrad};
pub use norm::{Norm, NormBackward, NormForward, NormSpec};
pub use qkv::{Qkv, QkvSpec, Rope, Rotation};
pub use rows::Rows;
pub use sample::{Advance, History, Sample, SampleSpec, SampleTable, SampleTokens};
pub use score_head::{ScoreBackward, ScoreHead};

use crate::backend::Backend;
pub use crate::backend::cost::Cost;
use crate::backend::cuda::Build;
use crate::error::{Error, Result};

/// All that a transformer needs of a device.
pub trait Ops:
    Backend + Norm + LayerNorm + Linear + Qkv + Attention + GateUp + Rows + LmHead + ScoreHead + AdamW + Decode + Sample
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Cpu, Indices, Tensor};

    const SPEC: AttentionSpec =
        AttentionSpec { heads: 1, kv_heads: 1, head_dim: 8, scale: 1.0, window: None, softcap: None, causal: true };

    fn ids(id: u32) -> Indices<Cpu> {
        Indices::from_host(&Cpu::new(), &[0, id], id as usize + 1).unwrap()
    }

    fn zeros(rows: usize, cols: usize) -> Tensor<Cpu> {
        Tensor::zeros(&Cpu::new(), rows, cols).unwrap()
    }

    #[test]
    fn an_id_at_the_bound_is_refused() {
        let cpu = Cpu::new();
        assert!(Indices::from_host(&cpu, &[2, 3], 4).is_ok());
        let error = Indices::from_host(&cpu, &[2, 4], 4).err().expect("refused").to_string();
        assert!(error.contains("ids below 4") && error.contains('4'), "{error}");
        let table = cpu.weight(4, 8, vec![0.0; 32]).unwrap();
        let rope = Rope::new(&cpu, &[1.0; 4], 4).unwrap();
        let norm = NormSpec { eps: 1e-6, unit_offset: false };
        let spec = QkvSpec { heads: 1, kv_heads: 1, head_dim: 8, norm, wide: false };
        let w = cpu.weight(24, 8, vec![0.0; 192]).unwrap();
        let mut cache = cpu.kv_cache(4, 4, SPEC).unwrap();
        let qkv = zeros(2, 24);
        for (id, allowed) in [(3, true), (4, false)] {
            assert_eq!(cpu.gather(&mut zeros(2, 8), &zeros(4, 8), &ids(id)).is_ok(), allowed);
            assert_eq!(cpu.scatter(&mut zeros(4, 8), &zeros(2, 8), &ids(id)).is_ok(), allowed);
            assert_eq!(cpu.embed(&mut zeros(2, 8), &ids(id), &table, 1.0).is_ok(), allowed);
            let (y, xa, x) = (&mut zeros(2, 24), &mut zeros(2, 0), &zeros(2, 8));
            let product = LinearForward { y, xa, x, weights: LinearWeights { w: &w, bias: None, lora: None } };
            let rotation = Rotation { qk_norm: None, positions: &ids(id), rope: &rope, spec };
            let rotated = cpu.qkv_forward(product, &mut zeros(2, 0), rotation);
            assert_eq!(rotated.is_ok(), allowed);
            for slots in [[id, id], [0, 1]] {
                let positions = if slots == [0, 1] { [id, id] } else { [0, 1] };
                let mut at = SlotTable::with_capacity(&cpu, 2).unwrap();
                at.set(&cpu, &slots, &positions).unwrap();
                assert_eq!(cpu.cache_append(&mut cache, &qkv, &at).is_ok(), allowed);
                let operands = DecodeAttention { o: &mut zeros(2, 8), qkv: &qkv, cache: &cache, table: &at };
                assert_eq!(cpu.decode_attention(operands).is_ok(), allowed);
            }
        }
    }

    #[test]
    fn a_position_stays_below_its_bound() {
        let cpu = Cpu::new();
        let mut history = History::with_capacity(&cpu, 2).unwrap();
        let (mut tokens, mut positions, next) = (ids(3), ids(3), ids(3));
        let mut drawn = Tensor::zeros(&cpu, 2, 1).unwrap();
        let mut advance = |next| {
            let (history, tokens, positions, drawn) = (&mut history, &mut tokens, &mut positions, &mut drawn);
            cpu.advance(Advance { history, tokens, positions, drawn, next })
        };
        assert!(advance(&next).is_ok() && advance(&ids(5)).is_err());
        assert_eq!(positions.read(&cpu).unwrap(), [1, 3]);
    }
}
