use super::{Activation, GateUp, activate_cost, check};
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::{Build, kernels};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::lora::cuda::{linear_backward, linear_forward};
use crate::ops::{Lora, LoraGrad};

const THREADS: u32 = 256;
/// 16-byte accesses where the feed-forward's width allows: `up` begins `f` elements behind `gate`.
const WIDE: &[Define] = &[("THREADS", THREADS as u64), ("VECTOR", 8)];
const NARROW: &[Define] = &[("THREADS", THREADS as u64), ("VECTOR", 1)];

/// Both widths of access.
pub(crate) fn builds() -> Vec<Build> {
    [WIDE, NARROW].map(|defines| Build::new(&kernels::GATE_UP, defines, THREADS)).into()
}

/// Defines and geometry for `rows` × `f` activations.
fn launch(rows: usize, f: usize) -> (&'static [Define], LaunchConfig) {
    let (defines, vector) = if f.is_multiple_of(8) { (WIDE, 8) } else { (NARROW, 1) };
    (defines, LaunchConfig::linear((rows * (f / vector)).div_ceil(THREADS as usize) as u32, THREADS))
}

impl GateUp for Cuda {
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
        check(act, gate_up)?;
        linear_forward(self, "gate_up", gate_up, xa, x, w, lora, None, None)?;
        self.activate(act, gate_up, activation)
    }

    fn activate(&self, act: &mut Tensor<Self>, gate_up: &Tensor<Self>, activation: Activation) -> Result<()> {
        let (rows, f) = check(act, gate_up)?;
        let Activation::Silu = activation;
        let (defines, config) = launch(rows, f);
        let (n, f, act_stride, stride) = (rows as u32, f as u32, act.stride() as u32, gate_up.stride() as u32);
        self.charge(|| activate_cost(n.into(), f.into(), 2));
        let (act, gate_up) = (&mut act.buffer, &gate_up.buffer);
        // SAFETY: `check` proved act (rows, f) and gate_up (rows, 2f).
        unsafe { kernels::silu_forward(self, defines, config, act, gate_up, n, f, act_stride, stride) }
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
        let (rows, f) = check(dact, gate_up)?;
        let Activation::Silu = activation;
        let (defines, config) = launch(rows, f);
        let (n, f, act_stride, stride) = (rows as u32, f as u32, dact.stride() as u32, gate_up.stride() as u32);
        self.charge(|| activate_cost(n.into(), f.into(), 2) + activate_cost(n.into(), f.into(), 1));
        // SAFETY: `check` proved dact (rows, f) and gate_up (rows, 2f).
        unsafe {
            let (gate_up, dact) = (&mut gate_up.buffer, &dact.buffer);
            kernels::silu_backward(self, defines, config, gate_up, dact, n, f, act_stride, stride)?;
        }
        linear_backward(self, "gate_up", dx, grad, dxa, gate_up, x, xa, w, lora)
    }
}
