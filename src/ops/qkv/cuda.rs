use super::{Qkv, QkvSpec, QkvWeights, Rope, check, rotate_cost};
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, RotationParams};
use crate::backend::{Cuda, Indices, Tensor};
use crate::error::Result;
use crate::ops::lora::cuda::{linear_backward, linear_forward};
use crate::ops::{Lora, LoraGrad, expect};

/// One warp per head; eight fill a block.
const HEADS_PER_BLOCK: u32 = 8;
const DEFINES: &[Define] = &[("HEADS_PER_BLOCK", HEADS_PER_BLOCK as u64)];

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
        positions: &Indices<Self>,
        rope: &Rope<Self>,
        spec: QkvSpec,
    ) -> Result<()> {
        check(qkv, raw, weights, positions, rope, spec)?;
        expect("qkv", "head size, a multiple of 4", spec.head_dim % 4, 0)?;
        linear_forward(self, "qkv", qkv, xa, x, &weights.w, lora, weights.bias.as_ref(), None)?;
        let params = rotation(weights, positions, rope, spec, qkv, raw);
        let raw = weights.qk_norm.is_some().then_some(&mut raw.buffer);
        self.charge(|| rotate_cost(params.rows as u64, spec.rotated() as u64, 2));
        // SAFETY: `check` proved qkv, raw, positions, norms, the width of the tables, and that positions lie within them.
        unsafe { kernels::rotate_forward(self, DEFINES, launch(params.rows, spec), &mut qkv.buffer, raw, &params) }
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
        positions: &Indices<Self>,
        rope: &Rope<Self>,
        spec: QkvSpec,
    ) -> Result<()> {
        check(dqkv, raw, weights, positions, rope, spec)?;
        let params = rotation(weights, positions, rope, spec, dqkv, raw);
        let raw = weights.qk_norm.is_some().then_some(&raw.buffer);
        self.charge(|| rotate_cost(params.rows as u64, spec.rotated() as u64, 2));
        // SAFETY: as in forward.
        unsafe { kernels::rotate_backward(self, DEFINES, launch(params.rows, spec), &mut dqkv.buffer, raw, &params)? };
        linear_backward(self, "qkv", dx, grad, dxa, dqkv, x, xa, &weights.w, lora)
    }
}

/// What both directions read; gains where the family has a q/k norm.
fn rotation<'a>(
    weights: &'a QkvWeights<Cuda>,
    positions: &'a Indices<Cuda>,
    rope: &'a Rope<Cuda>,
    spec: QkvSpec,
    qkv: &Tensor<Cuda>,
    raw: &Tensor<Cuda>,
) -> RotationParams<'a> {
    RotationParams {
        positions: positions.buffer(),
        cosine: &rope.cos.buffer,
        sine: &rope.sin.buffer,
        q_norm: weights.qk_norm.as_ref().map(|(q, _)| &q.buffer),
        k_norm: weights.qk_norm.as_ref().map(|(_, k)| &k.buffer),
        rows: qkv.rows(),
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        half: spec.head_dim / 2,
        stride: qkv.stride(),
        raw_stride: raw.stride(),
        eps: spec.norm.eps,
        offset: if spec.norm.unit_offset { 1.0 } else { 0.0 },
    }
}
