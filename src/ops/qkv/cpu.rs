use rayon::prelude::*;

use super::{Qkv, QkvSpec, Rope, Rotation, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::norm::{rms_backward_row, rms_row};
use crate::ops::product::simd;

impl Qkv for Cpu {
    fn rotate_forward(&self, qkv: &mut Tensor<Self>, raw: &mut Tensor<Self>, rotation: Rotation<Self>) -> Result<()> {
        check(qkv, raw, &rotation)?;
        let Rotation { qk_norm, positions, rope, spec } = rotation;
        let ((rows, width), rotated) = (qkv.shape(), spec.rotated());
        let tasks = qkv.buffer[..rows * width].par_chunks_exact_mut(width).with_min_len(32).zip(positions.buffer());
        if let Some(norms) = qk_norm {
            let raw = raw.buffer[..rows * rotated].par_chunks_exact_mut(rotated);
            tasks.zip(raw).for_each(|((row, &position), raw)| {
                raw.copy_from_slice(&row[..rotated]);
                norm_heads(&mut row[..rotated], raw, norms, spec);
                rotate(&mut row[..rotated], position, rope, 1.0);
                self.store(&mut row[..rotated]);
            });
        } else {
            tasks.for_each(|(row, &position)| {
                rotate(&mut row[..rotated], position, rope, 1.0);
                self.store(&mut row[..rotated]);
            });
        }
        Ok(())
    }

    fn rotate_backward(&self, dqkv: &mut Tensor<Self>, raw: &Tensor<Self>, rotation: Rotation<Self>) -> Result<()> {
        check(dqkv, raw, &rotation)?;
        let Rotation { qk_norm, positions, rope, spec } = rotation;
        let ((rows, width), rotated) = (dqkv.shape(), spec.rotated());
        let tasks = dqkv.buffer[..rows * width].par_chunks_exact_mut(width).with_min_len(32).zip(positions.buffer());
        tasks.enumerate().for_each(|(t, (row, &position))| {
            rotate(&mut row[..rotated], position, rope, -1.0);
            if let Some(norms) = qk_norm {
                unnorm(&mut row[..rotated], &raw.buffer[t * rotated..][..rotated], norms, spec);
            }
            self.store(&mut row[..rotated]);
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
