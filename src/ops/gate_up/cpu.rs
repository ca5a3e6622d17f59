use rayon::prelude::*;

use super::curve::{Curve, Gelu, GeluTanh, Silu};
use super::{Activation, GateUp, GateUpSpec, check};
use crate::backend::{Cpu, Tensor};
use crate::error::Result;
use crate::ops::product::simd;

/// Rows per task.
const ROWS: usize = 32;
/// Numbers of one vector step.
const LANES: usize = 16;

impl GateUp for Cpu {
    fn activate(&self, act: &mut Tensor<Self>, gate_up: &Tensor<Self>, spec: GateUpSpec) -> Result<()> {
        let (rows, cols) = check(act, gate_up, spec)?;
        let out = act.buffer[..rows * cols].par_chunks_mut(ROWS * cols);
        out.zip(gate_up.buffer.par_chunks(ROWS * spec.width(cols))).for_each(|(act, gate_up)| {
            forward(act, gate_up, cols, spec);
            self.store(act);
        });
        Ok(())
    }

    fn activate_backward(&self, gate_up: &mut Tensor<Self>, dact: &Tensor<Self>, spec: GateUpSpec) -> Result<()> {
        let (rows, cols) = check(dact, gate_up, spec)?;
        let width = spec.width(cols);
        let both = gate_up.buffer[..rows * width].par_chunks_mut(ROWS * width);
        both.zip(dact.buffer.par_chunks(ROWS * cols)).for_each(|(gate_up, dact)| {
            backward(gate_up, dact, cols, spec);
            self.store(gate_up);
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
    fn backward<'a>(gate_up: &'a mut [f32], dact: &'a [f32], cols: usize, spec: GateUpSpec) {
        let width = spec.width(cols);
        match spec.activation {
            Activation::Silu => backward_rows::<Silu>(gate_up, dact, cols, width),
            Activation::Gelu => backward_rows::<Gelu>(gate_up, dact, cols, width),
            Activation::GeluTanh => backward_rows::<GeluTanh>(gate_up, dact, cols, width),
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
fn backward_rows<C: Curve>(gate_up: &mut [f32], dact: &[f32], cols: usize, width: usize) {
    for (gate_up, dact) in gate_up.chunks_exact_mut(width).zip(dact.chunks_exact(cols)) {
        let (gate, up) = gate_up.split_at_mut(cols);
        if up.is_empty() {
            for (gate, dact) in gate.iter_mut().zip(dact) {
                *gate = dact * C::at(*gate).1;
            }
        } else {
            backward_gated::<C>(gate, up, dact);
        }
    }
}

#[inline(always)]
fn backward_gated<C: Curve>(gate: &mut [f32], up: &mut [f32], dact: &[f32]) {
    let blocks = gate.chunks_exact_mut(LANES).zip(up.chunks_exact_mut(LANES)).zip(dact.chunks_exact(LANES));
    for ((gate, up), dact) in blocks {
        // All of a block is read before any of it is written: whole vectors, whatever the compiler knows of overlaps.
        let (mut dgate, mut dup) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            (dgate[i], dup[i]) = gradients::<C>(gate[i], up[i], dact[i]);
        }
        gate.copy_from_slice(&dgate);
        up.copy_from_slice(&dup);
    }
    for i in dact.len() / LANES * LANES..dact.len() {
        (gate[i], up[i]) = gradients::<C>(gate[i], up[i], dact[i]);
    }
}

/// Of gate and up.
#[inline(always)]
fn gradients<C: Curve>(gate: f32, up: f32, dact: f32) -> (f32, f32) {
    let (value, slope) = C::at(gate);
    (dact * up * slope, dact * value)
}
