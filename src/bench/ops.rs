//! Each operation alone, forward and backward, at a model's shapes: the list of what there is, timed one by one.

use std::time::Instant;

use serde::Serialize;

use super::Workload;
pub use super::list::{Shape, each, generation};
use super::timing::{Timed, profiled};
use crate::backend::Tensor;
use crate::backend::cost::Cost;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::ops::{Measured, Rates};

/// One operation's time.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct OpTiming {
    pub(crate) op: &'static str,
    /// Of one run, among as many as a read from the device is worth.
    #[serde(flatten)]
    pub(crate) timed: Timed,
    pub(crate) bytes: u64,
    pub(crate) bytes_per_second: f64,
}

impl OpTiming {
    /// Fills in the floors, its own and each kernel's.
    pub(crate) fn hold_against<B: Measured>(&mut self, ops: &B, rates: &Rates) {
        let floor = ops.floor(rates, Cost { flops: self.timed.flops, bytes: self.bytes });
        self.timed.hold_against(rates, Some(floor));
    }
}

/// Times every operation at the shapes of `config`; `say` hears the name of each before it begins.
pub(crate) fn ops<B: Measured>(
    ops: &B,
    config: &ModelConfig,
    load: &Workload,
    mut say: impl FnMut(&str),
) -> Result<Vec<OpTiming>> {
    let (mut found, last) = (Vec::new(), Tensor::<B, f32>::zeros(ops, 1, 1)?);
    each(ops, &Shape::new(config, load), &mut |op, cost, run| {
        say(op);
        let seconds = seconds_of_runs(ops, load, &last, &mut *run)?;
        let timed = Timed::new(seconds, cost.flops, profiled(ops, run)?);
        let bytes_per_second = cost.bytes as f64 / timed.seconds.median;
        found.push(OpTiming { op, timed, bytes: cost.bytes, bytes_per_second });
        Ok(())
    })?;
    Ok(found)
}

/// What one run takes, `load.repeats` times: each among as many as are worth a read. Reading a number, `last`, waits for all that was queued.
pub(super) fn seconds_of_runs<B: Measured>(
    ops: &B,
    load: &Workload,
    last: &Tensor<B, f32>,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let mut seconds_of = |count: usize| -> Result<f64> {
        let begin = Instant::now();
        (0..count).try_for_each(|_| run())?;
        last.read(ops)?;
        Ok(begin.elapsed().as_secs_f64() / count as f64)
    };
    (0..load.warmup).try_for_each(|_| seconds_of(1).map(drop))?;
    let count = runs_between_reads(seconds_of(1)?);
    (0..load.repeats).map(|_| seconds_of(count)).collect()
}

/// As many runs as last some milliseconds: what a read costs is then little beside them.
fn runs_between_reads(seconds: f64) -> usize {
    const ENOUGH: f64 = 5e-3;
    (ENOUGH / seconds.max(1e-9)).ceil().clamp(1.0, 1000.0) as usize
}

#[cfg(test)]
mod tests {
    use super::runs_between_reads;

    #[test]
    fn short_runs_are_timed_together() {
        assert_eq!([1.0, 4e-3, 1e-5, 0.0].map(runs_between_reads), [1, 2, 500, 1000]);
    }
}
