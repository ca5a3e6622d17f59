use super::{ScoreBackward, ScoreHead, check, check_backward};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::product::{add_scaled, dot};

impl ScoreHead for Cpu {
    fn score_forward(&self, r: &mut Tensor<Self, f32>, h: &Tensor<Self>, w: &Tensor<Self, f32>) -> Result<()> {
        check(r, h, w)?;
        let (labels, cols) = w.shape();
        for (r, h) in r.buffer.chunks_exact_mut(labels).zip(h.buffer.chunks_exact(cols).take(h.rows())) {
            for (r, w) in r.iter_mut().zip(w.buffer.chunks_exact(cols)) {
                *r = dot(h, w);
            }
        }
        Ok(())
    }

    fn score_backward(&self, operands: ScoreBackward<Self>) -> Result<()> {
        check_backward(&operands)?;
        let ScoreBackward { dh, mut dw, dr, h, w } = operands;
        let (labels, cols) = w.shape();
        for (s, dr) in dr.buffer.chunks_exact(labels).take(h.rows()).enumerate() {
            let dh = &mut dh.buffer[s * cols..][..cols];
            dh.fill(0.0);
            for (label, dr) in dr.iter().enumerate() {
                add_scaled(dh, &w.buffer[label * cols..][..cols], *dr);
                if let Some(dw) = &mut dw {
                    add_scaled(&mut dw.buffer[label * cols..][..cols], &h.buffer[s * cols..][..cols], *dr);
                }
            }
            self.store(dh);
        }
        Ok(())
    }
}
