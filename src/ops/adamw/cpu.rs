use super::{AdamW, AdamWSpec, Parameter};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::expect;

impl AdamW for Cpu {
    fn adamw(
        &self,
        norm: &mut Tensor<Self, f32>,
        parameters: &mut [Parameter<'_, Self>],
        spec: AdamWSpec,
    ) -> Result<()> {
        let mut square = 0.0f64;
        for p in parameters.iter() {
            for tensor in [&*p.m, &*p.v, p.grad] {
                expect("adamw", "shape", tensor.shape(), p.master.shape())?;
            }
            square += p.grad.buffer.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
        let total = square.sqrt() as f32;
        norm.buffer[0] = total;
        if !total.is_finite() {
            return Ok(());
        }
        let factor = if total > spec.clip { spec.clip / total } else { 1.0 };
        for p in parameters {
            update(p, factor, spec);
            if let Some((operand, scale)) = &mut p.operand {
                self.operand(operand, p.master, *scale)?;
            }
        }
        Ok(())
    }

    fn operand(&self, operand: &mut Tensor<Self>, master: &Tensor<Self, f32>, factor: f32) -> Result<()> {
        expect("adamw", "operand", operand.shape(), master.shape())?;
        operand.buffer.iter_mut().zip(&master.buffer).for_each(|(operand, master)| *operand = master * factor);
        self.store(&mut operand.buffer);
        Ok(())
    }
}

fn update(p: &mut Parameter<'_, Cpu>, factor: f32, spec: AdamWSpec) {
    let correct1 = 1.0 / (1.0 - spec.beta1.powi(spec.step as i32));
    let correct2 = 1.0 / (1.0 - spec.beta2.powi(spec.step as i32));
    let moments = p.m.buffer.iter_mut().zip(&mut p.v.buffer);
    for (((m, v), master), grad) in moments.zip(&mut p.master.buffer).zip(&p.grad.buffer) {
        let g = grad * factor;
        *m = spec.beta1 * *m + (1.0 - spec.beta1) * g;
        *v = spec.beta2 * *v + (1.0 - spec.beta2) * g * g;
        let step = *m * correct1 / ((*v * correct2).sqrt() + spec.eps);
        *master -= spec.lr * (step + spec.decay * *master);
    }
}
