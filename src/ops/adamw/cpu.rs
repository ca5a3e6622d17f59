use rayon::prelude::*;

use super::{AdamW, AdamWSpec, Parameter, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::expect;
use crate::ops::product::simd;

/// Numbers per task; the norm's partial sums are cut here too, so that their order is fixed.
const CHUNK: usize = 1 << 14;

impl AdamW for Cpu {
    fn adamw(&self, norm: &mut Tensor<Self, f32>, parameters: &mut [Parameter<Self>], spec: AdamWSpec) -> Result<()> {
        check(parameters)?;
        let mut square = 0.0f64;
        for p in parameters.iter() {
            let partial: Vec<f64> = p.grad.buffer.par_chunks(CHUNK).map(sum_of_squares).collect();
            square += partial.iter().sum::<f64>();
        }
        let total = square.sqrt() as f32;
        norm.buffer[0] = total;
        if !total.is_finite() {
            return Ok(());
        }
        let factor = if total > spec.clip { spec.clip / total } else { 1.0 };
        for p in parameters {
            let moments = p.m.buffer.par_chunks_mut(CHUNK).zip(p.v.buffer.par_chunks_mut(CHUNK));
            let values = p.master.buffer.par_chunks_mut(CHUNK).zip(p.grad.buffer.par_chunks(CHUNK));
            values.zip(moments).for_each(|((master, grad), (m, v))| {
                update(master, m, v, grad, factor, spec);
            });
            if let Some((operand, scale)) = &mut p.operand {
                self.write_operand(operand, p.master, *scale)?;
            }
        }
        Ok(())
    }

    fn write_operand(&self, operand: &mut Tensor<Self>, master: &Tensor<Self, f32>, factor: f32) -> Result<()> {
        expect("adamw", "operand", operand.shape(), master.shape())?;
        operand.buffer.iter_mut().zip(&master.buffer).for_each(|(operand, master)| *operand = master * factor);
        self.store(&mut operand.buffer);
        Ok(())
    }
}

simd! {
    /// In eight running sums of f64.
    fn sum_of_squares<'a>(values: &'a [f32]) -> f64 {
        let mut sums = [0.0f64; 8];
        let blocks = values.chunks_exact(8);
        let rest: f64 = blocks.remainder().iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        for block in blocks {
            for i in 0..8 {
                sums[i] += f64::from(block[i]) * f64::from(block[i]);
            }
        }
        sums.iter().sum::<f64>() + rest
    }
}

simd! {
    fn update<'a>(master: &'a mut [f32], m: &'a mut [f32], v: &'a mut [f32], grad: &'a [f32], factor: f32, spec: AdamWSpec) {
        let correct1 = 1.0 / (1.0 - spec.beta1.powi(spec.step as i32));
        let correct2 = 1.0 / (1.0 - spec.beta2.powi(spec.step as i32));
        for (((m, v), master), grad) in m.iter_mut().zip(v).zip(master).zip(grad) {
            let g = grad * factor;
            *m = spec.beta1 * *m + (1.0 - spec.beta1) * g;
            *v = spec.beta2 * *v + (1.0 - spec.beta2) * g * g;
            let step = *m * correct1 / ((*v * correct2).sqrt() + spec.eps);
            *master -= spec.lr * (step + spec.decay * *master);
        }
    }
}
