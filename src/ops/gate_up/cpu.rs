use rayon::prelude::*;

use super::{Activation, GateUp, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::lora::{linear_backward, linear_forward};
use crate::ops::product::{exp, simd};
use crate::ops::{Lora, LoraGrad};

/// Rows per task.
const ROWS: usize = 32;
/// Numbers of one vector step.
const LANES: usize = 16;

impl GateUp for Cpu {
    fn gate_up_forward(
        &self,
        act: &mut Tensor<Self>,
        gate_up: &mut Tensor<Self>,
        xa: &mut Tensor<Self>,
        x: &Tensor<Self>,
        w: &Self::Weight,
        lora: Option<&Lora<Self>>,
        activation: Activation,
    ) -> Result<()> {
        let (rows, cols) = check(act, gate_up)?;
        linear_forward(self, "gate_up", gate_up, xa, x, w, lora, false)?;
        self.store(&mut gate_up.buffer[..rows * cols * 2]);
        self.activate(act, gate_up, activation)
    }

    fn activate(&self, act: &mut Tensor<Self>, gate_up: &Tensor<Self>, activation: Activation) -> Result<()> {
        let (rows, cols) = check(act, gate_up)?;
        let Activation::Silu = activation;
        let out = act.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        out.zip(gate_up.buffer.par_chunks(ROWS * 2 * cols)).for_each(|(act, gate_up)| {
            silu(act, gate_up, cols);
            self.store(act);
        });
        Ok(())
    }

    fn gate_up_backward(
        &self,
        dx: &mut Tensor<Self>,
        grad: Option<&mut LoraGrad<Self>>,
        gate_up: &mut Tensor<Self>,
        dxa: &mut Tensor<Self>,
        dact: &Tensor<Self>,
        x: &Tensor<Self>,
        xa: &Tensor<Self>,
        w: &Self::Weight,
        lora: Option<&Lora<Self>>,
        activation: Activation,
    ) -> Result<()> {
        let (rows, cols) = check(dact, gate_up)?;
        let Activation::Silu = activation;
        let both = gate_up.buffer[..rows * cols * 2].par_chunks_mut(ROWS * 2 * cols);
        both.zip(dact.buffer.par_chunks(ROWS * cols)).for_each(|(gate_up, dact)| {
            silu_backward(gate_up, dact, cols);
            self.store(gate_up);
        });
        linear_backward(self, "gate_up", dx, grad, dxa, gate_up, x, xa, w, lora)
    }
}

simd! {
    fn silu<'a>(act: &'a mut [f32], gate_up: &'a [f32], cols: usize) {
        for (act, gate_up) in act.chunks_exact_mut(cols).zip(gate_up.chunks_exact(2 * cols)) {
            let (gate, up) = gate_up.split_at(cols);
            for ((act, gate), up) in act.iter_mut().zip(gate).zip(up) {
                *act = gate * sigmoid(*gate) * up;
            }
        }
    }
}

simd! {
    fn silu_backward<'a>(gate_up: &'a mut [f32], dact: &'a [f32], cols: usize) {
        for (gate_up, dact) in gate_up.chunks_exact_mut(2 * cols).zip(dact.chunks_exact(cols)) {
            let (gate, up) = gate_up.split_at_mut(cols);
            let blocks = gate.chunks_exact_mut(LANES).zip(up.chunks_exact_mut(LANES)).zip(dact.chunks_exact(LANES));
            for ((gate, up), dact) in blocks {
                // All of a block is read before any of it is written: whole vectors, whatever the compiler knows of overlaps.
                let (mut dgate, mut dup) = ([0.0; LANES], [0.0; LANES]);
                for i in 0..LANES {
                    (dgate[i], dup[i]) = silu_gradient(gate[i], up[i], dact[i]);
                }
                gate.copy_from_slice(&dgate);
                up.copy_from_slice(&dup);
            }
            for i in cols / LANES * LANES..cols {
                (gate[i], up[i]) = silu_gradient(gate[i], up[i], dact[i]);
            }
        }
    }
}

/// Gradients of gate and up.
#[inline(always)]
fn silu_gradient(gate: f32, up: f32, dact: f32) -> (f32, f32) {
    let s = sigmoid(gate);
    let silu = gate * s;
    (dact * up * (s + silu * (1.0 - s)), dact * silu)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
