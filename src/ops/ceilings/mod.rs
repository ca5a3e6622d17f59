//! What a device can do at best: the denominators of every share. No operation of a model.

mod cpu;
pub(super) mod cuda;

use serde::Serialize;

pub use cpu::{copy_rate, cpu_rates, matrix_rate};
pub(crate) use cuda::{Ceilings, measure};

use super::{Cost, Ops};
use crate::backend::cost::KernelRun;
use crate::error::Result;

/// The two rates that work is held against.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Of matrix products.
    pub(crate) matrix_flops_per_s: f64,
    /// Bytes per second of a copy beyond the caches, those read and those written counted each.
    pub(crate) copy_bytes_per_s: f64,
}

impl Rates {
    /// Of an H200, as others measured it on random numbers: 790 TFLOP/s of bf16 within its power, 4.3 TB/s.
    pub(crate) const H200: Rates = Rates { matrix_flops_per_s: 790e12, copy_bytes_per_s: 4.3e12 };

    /// Of two measurements the better: other work on the machine only ever makes it slower.
    pub(crate) fn best(self, other: Rates) -> Rates {
        Rates {
            matrix_flops_per_s: self.matrix_flops_per_s.max(other.matrix_flops_per_s),
            copy_bytes_per_s: self.copy_bytes_per_s.max(other.copy_bytes_per_s),
        }
    }

    /// Seconds that `cost` takes at least: its FLOPs or its bytes, whichever takes longer.
    pub(crate) fn floor(&self, cost: Cost) -> f64 {
        (cost.flops as f64 / self.matrix_flops_per_s).max(cost.bytes as f64 / self.copy_bytes_per_s)
    }
}

/// What `ares bench` asks of a device beside its operations.
pub trait Measured: Ops {
    /// Measured now; `None` where a time means nothing, on the simulator.
    fn rates(&self) -> Result<Option<Rates>>;

    /// `Rates::floor` of an operation that is run by itself again and again.
    fn floor(&self, rates: &Rates, cost: Cost) -> f64 {
        rates.floor(cost)
    }

    /// Begins to record how long each kernel takes; what was recorded before is forgotten. Nothing where there are no kernels.
    fn profile_begin(&self) -> Result<()> {
        Ok(())
    }

    /// Ends the recording: every kernel's run, in order.
    fn profile_end(&self) -> Result<Vec<KernelRun>> {
        Ok(Vec::new())
    }
}
