use super::{Qkv, Rotation, check, rotate_cost};
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, RotationParams};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::expect;

/// One warp per head; eight fill a block.
const HEADS_PER_BLOCK: u32 = 8;
const DEFINES: &[Define] = &[("HEADS_PER_BLOCK", HEADS_PER_BLOCK as u64)];

pub(crate) fn builds() -> Vec<Build> {
    vec![Build::new(&kernels::QKV, DEFINES, 32 * HEADS_PER_BLOCK)]
}

impl Qkv for Cuda {
    fn rotate_forward(&self, qkv: &mut Tensor<Self>, raw: &mut Tensor<Self>, rotation: Rotation<Self>) -> Result<()> {
        check(qkv, raw, &rotation)?;
        expect("qkv", "head size, a multiple of 4", rotation.spec.head_dim % 4, 0)?;
        let (params, config) = launch(&rotation, qkv, raw);
        let raw = rotation.qk_norm.is_some().then_some(&mut raw.buffer);
        self.charge(|| rotate_cost(params.rows as u64, rotation.spec.rotated() as u64, 2));
        // SAFETY: `check` proved qkv, raw, positions, norms, the width of the tables, and that positions lie within them.
        unsafe { kernels::rotate_forward(self, DEFINES, config, &mut qkv.buffer, raw, &params) }
    }

    fn rotate_backward(&self, dqkv: &mut Tensor<Self>, raw: &Tensor<Self>, rotation: Rotation<Self>) -> Result<()> {
        check(dqkv, raw, &rotation)?;
        let (params, config) = launch(&rotation, dqkv, raw);
        let raw = rotation.qk_norm.is_some().then_some(&raw.buffer);
        self.charge(|| rotate_cost(params.rows as u64, rotation.spec.rotated() as u64, 2));
        // SAFETY: as in forward.
        unsafe { kernels::rotate_backward(self, DEFINES, config, &mut dqkv.buffer, raw, &params) }
    }
}

/// What both directions read, gains where the family has a q/k norm; and a warp for each head.
fn launch<'a>(
    rotation: &Rotation<'a, Cuda>,
    qkv: &Tensor<Cuda>,
    raw: &Tensor<Cuda>,
) -> (RotationParams<'a>, LaunchConfig) {
    let Rotation { qk_norm, positions, rope, spec } = rotation;
    let params = RotationParams {
        positions: positions.buffer(),
        cosine: &rope.cos.buffer,
        sine: &rope.sin.buffer,
        q_norm: qk_norm.map(|(q, _)| &q.buffer),
        k_norm: qk_norm.map(|(_, k)| &k.buffer),
        rows: qkv.rows(),
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        half: spec.head_dim / 2,
        stride: qkv.stride(),
        raw_stride: raw.stride(),
        eps: spec.norm.eps,
        offset: if spec.norm.unit_offset { 1.0 } else { 0.0 },
    };
    let heads = qkv.rows() * (spec.heads + spec.kv_heads);
    (params, LaunchConfig::linear(heads.div_ceil(HEADS_PER_BLOCK as usize) as u32, 32 * HEADS_PER_BLOCK))
}
