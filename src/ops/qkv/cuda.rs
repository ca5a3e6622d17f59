use super::{Qkv, Rotation, check, rotate_cost};
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, RotationParams};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::{Linear, LinearBackward, LinearForward, expect};

/// One warp per head; eight fill a block.
const HEADS_PER_BLOCK: u32 = 8;
/// A float per warp, for the sums of a row.
const SHARED: u32 = 4 * HEADS_PER_BLOCK;
const DEFINES: &[Define] = &[("HEADS_PER_BLOCK", HEADS_PER_BLOCK as u64), ("SHARED_BYTES", SHARED as u64)];

pub(crate) fn builds() -> Vec<Build> {
    let (build, threads) = (Build::new(&kernels::QKV, DEFINES, 32 * HEADS_PER_BLOCK), 32 * HEADS_PER_BLOCK);
    vec![build.with("rotate_wide_forward", threads, SHARED, 1).with("rotate_wide_backward", threads, SHARED, 1)]
}

impl Qkv for Cuda {
    fn qkv_forward(
        &self,
        product: LinearForward<Self>,
        raw: &mut Tensor<Self>,
        rotation: Rotation<Self>,
    ) -> Result<()> {
        let LinearForward { y: qkv, xa, x, weights } = product;
        self.linear_forward(LinearForward { y: qkv, xa, x, weights }, None)?;
        check(qkv, raw, &rotation)?;
        expect("qkv", "head size, a multiple of 4", rotation.spec.head_dim % 4, 0)?;
        let (params, config) = launch(&rotation, qkv, raw);
        let (normed, wide) = (rotation.qk_norm.is_some(), rotation.spec.wide);
        self.charge(|| rotate_cost(params.rows as u64, rotation.spec.rotated() as u64, 2));
        // SAFETY: `check` proved qkv, raw, positions, norms, the width of the tables, and that positions lie within them.
        unsafe {
            if normed && wide {
                return kernels::rotate_wide_forward(self, DEFINES, config, &mut qkv.buffer, &mut raw.buffer, &params);
            }
            let raw = normed.then_some(&mut raw.buffer);
            kernels::rotate_forward(self, DEFINES, config, &mut qkv.buffer, raw, &params)
        }
    }

    fn qkv_backward(
        &self,
        product: LinearBackward<Self>,
        dqkv: &mut Tensor<Self>,
        raw: &Tensor<Self>,
        rotation: Rotation<Self>,
    ) -> Result<()> {
        check(dqkv, raw, &rotation)?;
        let (params, config) = launch(&rotation, dqkv, raw);
        let (normed, wide) = (rotation.qk_norm.is_some(), rotation.spec.wide);
        self.charge(|| rotate_cost(params.rows as u64, rotation.spec.rotated() as u64, 2));
        // SAFETY: as in forward.
        unsafe {
            if normed && wide {
                kernels::rotate_wide_backward(self, DEFINES, config, &mut dqkv.buffer, &raw.buffer, &params)?;
            } else {
                let raw = normed.then_some(&raw.buffer);
                kernels::rotate_backward(self, DEFINES, config, &mut dqkv.buffer, raw, &params)?;
            }
        }
        self.linear_backward(product, dqkv)
    }
}

/// What both directions read, gains where the family has a q/k norm; and a warp for each head, or a block for each row.
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
    let threads = 32 * HEADS_PER_BLOCK;
    match qk_norm.is_some() && spec.wide {
        true => (params, LaunchConfig::linear(qkv.rows() as u32, threads).with_shared(SHARED)),
        false => (params, LaunchConfig::linear(heads.div_ceil(HEADS_PER_BLOCK as usize) as u32, threads)),
    }
}
