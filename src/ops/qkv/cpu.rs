use super::{Qkv, QkvSpec, Rope, Rotation, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::lora::check as check_product;
use crate::ops::lora::cpu::{at_once, backward_by_blocks, blocks, forward_by_blocks};
use crate::ops::norm::{rms_backward_row, rms_row};
use crate::ops::product::simd;
use crate::ops::{LinearBackward, LinearForward};

impl Qkv for Cpu {
    fn qkv_forward(
        &self,
        product: LinearForward<Self>,
        raw: &mut Tensor<Self>,
        rotation: Rotation<Self>,
    ) -> Result<()> {
        check(product.y, raw, &rotation)?;
        let Rotation { qk_norm, positions, rope, spec } = rotation;
        let (shape, rotated) = ((product.y.rows(), raw.cols()), spec.rotated());
        let raws = blocks(&mut raw.buffer, shape, at_once(product.weights.w, shape.0));
        forward_by_blocks(self, product, None, raws, |first, qkv, raw| {
            for (t, row) in qkv.chunks_exact_mut(spec.width()).enumerate() {
                let row = &mut row[..rotated];
                if let Some(norms) = qk_norm {
                    let raw = &mut raw[t * rotated..][..rotated];
                    raw.copy_from_slice(row);
                    norm_heads(row, raw, norms, spec);
                }
                rotate(row, positions.buffer()[first + t], rope, 1.0);
                self.store(row);
            }
        })
    }

    fn qkv_backward(
        &self,
        product: LinearBackward<Self>,
        dqkv: &mut Tensor<Self>,
        raw: &Tensor<Self>,
        rotation: Rotation<Self>,
    ) -> Result<()> {
        check(dqkv, raw, &rotation)?;
        check_product(dqkv, product.dxa, product.dx.as_deref(), &product.weights)?;
        let Rotation { qk_norm, positions, rope, spec } = rotation;
        let (shape, rotated) = (dqkv.shape(), spec.rotated());
        let dqkvs = blocks(&mut dqkv.buffer, shape, at_once(product.weights.w, shape.0));
        backward_by_blocks(self, product, shape.0, dqkvs, |first, dqkv| {
            for (row, t) in dqkv.chunks_exact_mut(spec.width()).zip(first..) {
                let row = &mut row[..rotated];
                rotate(row, positions.buffer()[t], rope, -1.0);
                if let Some(norms) = qk_norm {
                    unnorm(row, &raw.buffer[t * rotated..][..rotated], norms, spec);
                }
                self.store(row);
            }
            dqkv
        });
        Ok(())
    }
}

simd! {
    /// Rotates every head of one row by its position's angles; `sign` -1 rotates back, which is the gradient.
    fn rotate<'a>(heads: &'a mut [f32], position: u32, rope: &'a Rope<Cpu>, sign: f32) {
        let half = rope.cos.cols();
        let cos = &rope.cos.buffer[position as usize * half..][..half];
        let sin = &rope.sin.buffer[position as usize * half..][..half];
        for head in heads.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let sin = sin * sign;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

simd! {
    /// Norms q∣k.
    fn norm_heads<'a>(row: &'a mut [f32], raw: &'a [f32], norms: &'a (Tensor<Cpu>, Tensor<Cpu>), spec: QkvSpec) {
        for (columns, of_q) in spec.spans() {
            let w = if of_q { &norms.0 } else { &norms.1 };
            rms_row(&mut row[columns.clone()], &raw[columns], &w.buffer, spec.norm);
        }
    }
}

simd! {
    /// Gradient of the q/k norm, in place; rstd is recomputed from `raw`.
    fn unnorm<'a>(row: &'a mut [f32], raw: &'a [f32], norms: &'a (Tensor<Cpu>, Tensor<Cpu>), spec: QkvSpec) {
        let mut space = vec![0.0; 2 * spec.normed()[0]];
        for (columns, of_q) in spec.spans() {
            let w = &if of_q { &norms.0 } else { &norms.1 }.buffer;
            let (d, raw) = (&mut row[columns.clone()], &raw[columns]);
            let (forward, rest) = space.split_at_mut(d.len());
            let dy = &mut rest[..d.len()];
            let rstd = rms_row(forward, raw, w, spec.norm);
            dy.copy_from_slice(d);
            d.fill(0.0);
            rms_backward_row(d, dy, raw, rstd, w, spec.norm);
        }
    }
}
