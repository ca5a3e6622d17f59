use super::curve::{Curve, Gelu, GeluTanh, Silu};
use rayon::prelude::*;

use super::{Activation, GateUp, GateUpSpec, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::lora::check as check_product;
use crate::ops::lora::cpu::{at_once, backward_by_blocks, blocks, forward_by_blocks};
use crate::ops::product::simd;
use crate::ops::{LinearBackward, LinearForward};

/// Rows per task.
const ROWS: usize = 32;
/// Numbers of one vector step.
const LANES: usize = 16;

impl GateUp for Cpu {
    fn gate_up_forward(&self, act: &mut Tensor<Self>, product: LinearForward<Self>, spec: GateUpSpec) -> Result<()> {
        let (shape, cols) = (check(act, product.y, spec)?, act.cols());
        let acts = blocks(&mut act.buffer, shape, at_once(product.weights.w, shape.0));
        forward_by_blocks(self, product, None, acts, |_, gate_up, act| {
            let tasks = act.par_chunks_mut(ROWS * cols).zip(gate_up.par_chunks(ROWS * spec.width(cols)));
            tasks.for_each(|(act, gate_up)| {
                forward(act, gate_up, cols, spec);
                self.store(act);
            });
        })
    }

    fn gate_up_backward(
        &self,
        product: LinearBackward<Self>,
        gate_up: &mut Tensor<Self>,
        act: &mut Tensor<Self>,
        spec: GateUpSpec,
    ) -> Result<()> {
        check_product(gate_up, product.dxa, product.dx.as_deref(), &product.weights)?;
        let ((rows, cols), shape, at_once) =
            (check(act, gate_up, spec)?, gate_up.shape(), at_once(product.weights.w, act.rows()));
        let acts = blocks(&mut act.buffer, (rows, cols), at_once);
        let both = blocks(&mut gate_up.buffer, shape, at_once).into_iter().zip(acts).collect();
        backward_by_blocks(self, product, rows, both, |_, (gate_up, act)| {
            let tasks = gate_up.par_chunks_mut(ROWS * spec.width(cols)).zip(act.par_chunks_mut(ROWS * cols));
            tasks.for_each(|(gate_up, act)| {
                backward(gate_up, act, cols, spec);
                self.store(gate_up);
                self.store(act);
            });
            gate_up
        });
        Ok(())
    }
}

simd! {
    fn forward<'a>(act: &'a mut [f32], gate_up: &'a [f32], cols: usize, spec: GateUpSpec) {
        let width = spec.width(cols);
        match spec.activation {
            Activation::Silu => forward_rows::<Silu>(act, gate_up, cols, width),
            Activation::Gelu => forward_rows::<Gelu>(act, gate_up, cols, width),
            Activation::GeluTanh => forward_rows::<GeluTanh>(act, gate_up, cols, width),
        }
    }
}

simd! {
    fn backward<'a>(gate_up: &'a mut [f32], act: &'a mut [f32], cols: usize, spec: GateUpSpec) {
        let width = spec.width(cols);
        match spec.activation {
            Activation::Silu => backward_rows::<Silu>(gate_up, act, cols, width),
            Activation::Gelu => backward_rows::<Gelu>(gate_up, act, cols, width),
            Activation::GeluTanh => backward_rows::<GeluTanh>(gate_up, act, cols, width),
        }
    }
}

#[inline(always)]
fn forward_rows<C: Curve>(act: &mut [f32], gate_up: &[f32], cols: usize, width: usize) {
    for (act, gate_up) in act.chunks_exact_mut(cols).zip(gate_up.chunks_exact(width)) {
        let (gate, up) = gate_up.split_at(cols);
        for (act, gate) in act.iter_mut().zip(gate) {
            *act = C::at(*gate).0;
        }
        // Ungated, up is empty.
        for (act, up) in act.iter_mut().zip(up) {
            *act *= up;
        }
    }
}

#[inline(always)]
fn backward_rows<C: Curve>(gate_up: &mut [f32], act: &mut [f32], cols: usize, width: usize) {
    for (gate_up, act) in gate_up.chunks_exact_mut(width).zip(act.chunks_exact_mut(cols)) {
        let (gate, up) = gate_up.split_at_mut(cols);
        if up.is_empty() {
            for (gate, act) in gate.iter_mut().zip(act) {
                let (value, slope) = C::at(*gate);
                (*gate, *act) = (*act * slope, value);
            }
        } else {
            backward_gated::<C>(gate, up, act);
        }
    }
}

#[inline(always)]
fn backward_gated<C: Curve>(gate: &mut [f32], up: &mut [f32], act: &mut [f32]) {
    let blocks = gate.chunks_exact_mut(LANES).zip(up.chunks_exact_mut(LANES)).zip(act.chunks_exact_mut(LANES));
    for ((gate, up), act) in blocks {
        // All of a block is read before any of it is written: whole vectors, whatever the compiler knows of overlaps.
        let mut done = [[0.0; LANES]; 3];
        for i in 0..LANES {
            [done[0][i], done[1][i], done[2][i]] = gradients::<C>(gate[i], up[i], act[i]);
        }
        gate.copy_from_slice(&done[0]);
        up.copy_from_slice(&done[1]);
        act.copy_from_slice(&done[2]);
    }
    for i in act.len() / LANES * LANES..act.len() {
        [gate[i], up[i], act[i]] = gradients::<C>(gate[i], up[i], act[i]);
    }
}

/// Of gate and up, and act.
#[inline(always)]
fn gradients<C: Curve>(gate: f32, up: f32, dact: f32) -> [f32; 3] {
    let (value, slope) = C::at(gate);
    [dact * up * slope, dact * value, value * up]
}
