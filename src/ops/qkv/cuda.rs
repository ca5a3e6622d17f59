use super::{Qkv, QkvSpec, QkvWeights, Rope, check, rotate_cost};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::lora::cuda::{linear_backward, linear_forward};
use crate::ops::{Lora, LoraGrad, expect};

/// One warp per head; eight fill a block.
const HEADS_PER_BLOCK: u32 = 8;
const DEFINES: &[Define] = &[("HEADS_PER_BLOCK", HEADS_PER_BLOCK as u64)];

/// What is compiled for any model.
pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::QKV, DEFINES, 32 * HEADS_PER_BLOCK)]
}

fn launch(rows: usize, spec: QkvSpec) -> LaunchConfig {
    let heads = rows * (spec.heads + spec.kv_heads);
    LaunchConfig::linear(heads.div_ceil(HEADS_PER_BLOCK as usize) as u32, 32 * HEADS_PER_BLOCK)
}

impl Qkv for Cuda {
    fn qkv_forward(
        &self,
        qkv: &mut Tensor<Self>,
        xa: &mut Tensor<Self>,
        raw: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weights: &QkvWeights<Self>,
        lora: Option<&Lora<Self>>,
        positions: &Tensor<Self, u32>,
        rope: &Rope<Self>,
        spec: QkvSpec,
    ) -> Result<()> {
        check(qkv, raw, weights, positions, rope, spec)?;
        expect("qkv", "head size, a multiple of 4", spec.head_dim % 4, 0)?;
        linear_forward(self, "qkv", qkv, xa, x, &weights.w, lora, weights.bias.as_ref(), None)?;
        let (rows, config) = (qkv.rows() as u32, launch(qkv.rows(), spec));
        let (heads, kv_heads, half) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32 / 2);
        let (stride, raw_stride) = (qkv.stride() as u32, raw.stride() as u32);
        let raw = weights.qk_norm.is_some().then_some(&mut raw.buffer);
        let (q, k) = norms(weights);
        let (eps, offset) = (spec.norm.eps, if spec.norm.unit_offset { 1.0 } else { 0.0 });
        let (qkv, positions, cos, sin) = (&mut qkv.buffer, &positions.buffer, &rope.cos.buffer, &rope.sin.buffer);
        self.charge(|| rotate_cost(rows.into(), spec.rotated() as u64, 2));
        // SAFETY: `check` proved qkv, raw, positions, norms and the width of the tables; positions lie within them.
        unsafe {
            kernels::rotate_forward(
                self, DEFINES, config, qkv, raw, positions, cos, sin, q, k, rows, heads, kv_heads, half, stride,
                raw_stride, eps, offset,
            )
        }
    }

    fn qkv_backward(
        &self,
        dx: &mut Tensor<Self>,
        grad: Option<&mut LoraGrad<Self>>,
        dqkv: &mut Tensor<Self>,
        dxa: &mut Tensor<Self>,
        x: &Tensor<Self>,
        xa: &Tensor<Self>,
        raw: &Tensor<Self>,
        weights: &QkvWeights<Self>,
        lora: Option<&Lora<Self>>,
        positions: &Tensor<Self, u32>,
        rope: &Rope<Self>,
        spec: QkvSpec,
    ) -> Result<()> {
        check(dqkv, raw, weights, positions, rope, spec)?;
        let (rows, config) = (dqkv.rows() as u32, launch(dqkv.rows(), spec));
        let (heads, kv_heads, half) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32 / 2);
        let (stride, raw_stride) = (dqkv.stride() as u32, raw.stride() as u32);
        let raw = weights.qk_norm.is_some().then_some(&raw.buffer);
        let (q, k) = norms(weights);
        let (eps, offset) = (spec.norm.eps, if spec.norm.unit_offset { 1.0 } else { 0.0 });
        let (positions, cos, sin) = (&positions.buffer, &rope.cos.buffer, &rope.sin.buffer);
        self.charge(|| rotate_cost(rows.into(), spec.rotated() as u64, 2));
        // SAFETY: as in forward.
        unsafe {
            let dqkv = &mut dqkv.buffer;
            kernels::rotate_backward(
                self, DEFINES, config, dqkv, raw, positions, cos, sin, q, k, rows, heads, kv_heads, half, stride,
                raw_stride, eps, offset,
            )?;
        }
        linear_backward(self, "qkv", dx, grad, dxa, dqkv, x, xa, &weights.w, lora)
    }
}

type Gain<'a> = Option<&'a crate::backend::cuda::DeviceBuffer<half::bf16>>;

/// Gains of the q/k norm, where the family has one.
fn norms(weights: &QkvWeights<Cuda>) -> (Gain<'_>, Gain<'_>) {
    match &weights.qk_norm {
        Some((q, k)) => (Some(&q.buffer), Some(&k.buffer)),
        None => (None, None),
    }
}
