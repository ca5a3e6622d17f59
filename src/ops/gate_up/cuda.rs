use super::{Activation, GateUp, GateUpSpec, activate_costs, check};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::{Linear, LinearBackward, LinearForward, expect};

const THREADS: u32 = 256;

/// `vector` neighbours are one thread's.
fn defines(vector: usize, spec: GateUpSpec) -> [Define; 5] {
    [
        ("THREADS", THREADS.into()),
        ("VECTOR", vector as u64),
        ("GATED", spec.gated.into()),
        ("GELU", (spec.activation == Activation::Gelu).into()),
        ("GELU_TANH", (spec.activation == Activation::GeluTanh).into()),
    ]
}

/// Every activation, gated and not, in both widths of access.
pub(crate) fn builds() -> Vec<Build> {
    let mut builds = Vec::new();
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        for (gated, vector) in [(true, 8), (true, 1), (false, 8), (false, 1)] {
            let defines = defines(vector, GateUpSpec { activation, gated });
            builds.push(Build::new(&kernels::GATE_UP, &defines, THREADS));
        }
    }
    builds
}

/// Defines and geometry for `rows` × `f` activations.
fn launch(rows: usize, f: usize, spec: GateUpSpec) -> Result<([Define; 5], LaunchConfig)> {
    // 16-byte accesses where the width allows, since `up` begins `f` elements after `gate`.
    let vector = if f.is_multiple_of(8) { 8 } else { 1 };
    let blocks = (rows * (f / vector)).div_ceil(THREADS as usize);
    expect("activate", "threads that 32 bits count", blocks <= (u32::MAX / THREADS) as usize, true)?;
    Ok((defines(vector, spec), LaunchConfig::linear(blocks as u32, THREADS)))
}

impl GateUp for Cuda {
    fn gate_up_forward(&self, act: &mut Tensor<Self>, product: LinearForward<Self>, spec: GateUpSpec) -> Result<()> {
        let LinearForward { y: gate_up, xa, x, weights } = product;
        self.linear_forward(LinearForward { y: gate_up, xa, x, weights }, None)?;
        let (rows, f) = check(act, gate_up, spec)?;
        let (defines, config) = launch(rows, f, spec)?;
        let (act_stride, stride) = (act.stride(), gate_up.stride());
        self.charge(|| activate_costs(rows as u64, f as u64, spec, 2)[0]);
        let (act, gate_up) = (&mut act.buffer, &gate_up.buffer);
        // SAFETY: `check` proved act (rows, f) and gate_up (rows, 2f or, ungated, f).
        unsafe { kernels::activate_forward(self, &defines, config, act, gate_up, rows, f, act_stride, stride) }
    }

    fn gate_up_backward(
        &self,
        product: LinearBackward<Self>,
        gate_up: &mut Tensor<Self>,
        act: &mut Tensor<Self>,
        spec: GateUpSpec,
    ) -> Result<()> {
        let (rows, f) = check(act, gate_up, spec)?;
        let (defines, config) = launch(rows, f, spec)?;
        let (act_stride, stride) = (act.stride(), gate_up.stride());
        self.charge(|| activate_costs(rows as u64, f as u64, spec, 2)[1]);
        let (both, act) = (&mut gate_up.buffer, &mut act.buffer);
        // SAFETY: as in forward.
        unsafe { kernels::activate_backward(self, &defines, config, both, act, rows, f, act_stride, stride)? };
        self.linear_backward(product, gate_up)
    }
}
