//! Medians of repeats, what each kernel took, and how both stand to the least that the device could take.

use std::time::Instant;

use serde::Serialize;

use super::Workload;
use crate::backend::Tensor;
use crate::backend::cost::{Cost, KernelRun};
use crate::error::Result;
use crate::ops::{Measured, Ops, Rates};

/// One task's time.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Timing {
    pub(crate) task: &'static str,
    /// Its floor is the sum of its kernels' floors; where there are no kernels, the time of its FLOPs at the matrix rate.
    #[serde(flatten)]
    pub(crate) timed: Timed,
    /// Packed rows (generated tokens for decode) of one repeat, over both models.
    pub(crate) tokens: u64,
    pub(crate) tokens_per_second: f64,
}

/// How long something took. Rates are of the median.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Timed {
    pub(crate) seconds: Spread,
    pub(crate) flops: u64,
    pub(crate) flops_per_second: f64,
    /// The least that the device could take; none on the simulator.
    pub(crate) floor_ms: Option<f64>,
    /// The floor divided by the median: 1 is as fast as the device can be.
    pub(crate) share_of_floor: Option<f64>,
    /// By kernel, of one more repeat; empty where there are no kernels.
    pub(crate) kernels: Vec<KernelShare>,
    #[serde(skip)]
    pub(crate) runs: Vec<KernelRun>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) q1: f64,
    pub(crate) q3: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) repeats: usize,
}

/// All runs of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct KernelShare {
    pub(crate) kernel: &'static str,
    pub(crate) launches: usize,
    pub(crate) milliseconds: f64,
    pub(crate) flops: u64,
    pub(crate) bytes: u64,
    /// Of all runs, each by itself bound by its FLOPs or by its bytes. None where the kernel's cost or the device's rates are not
    /// known.
    pub(crate) floor_ms: Option<f64>,
    pub(crate) share_of_floor: Option<f64>,
}

impl Spread {
    pub(super) fn of(mut seconds: Vec<f64>) -> Spread {
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize];
        let repeats = seconds.len();
        Spread { median: at(0.5), q1: at(0.25), q3: at(0.75), min: at(0.0), max: at(1.0), repeats }
    }
}

impl KernelShare {
    /// The slowest first; floors where the rates are known.
    pub(super) fn of(runs: &[KernelRun], rates: Option<&Rates>) -> Vec<KernelShare> {
        let mut shares: Vec<KernelShare> = Vec::new();
        for run in runs {
            let at = shares.iter().position(|s| s.kernel == run.kernel).unwrap_or(shares.len());
            if at == shares.len() {
                shares.push(KernelShare { kernel: run.kernel, ..KernelShare::default() });
            }
            let share = &mut shares[at];
            share.launches += 1;
            share.milliseconds += f64::from(run.milliseconds);
            share.flops += run.cost.flops;
            share.bytes += run.cost.bytes;
            let seconds = rates.map_or(0.0, |rates| rates.floor(run.cost));
            share.floor_ms = Some(share.floor_ms.unwrap_or_default() + seconds);
        }
        for share in &mut shares {
            share.floor_ms = share.floor_ms.map(|seconds| 1e3 * seconds).filter(|floor| *floor > 0.0);
            share.share_of_floor = share.floor_ms.map(|floor| floor / share.milliseconds);
        }
        shares.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        shares
    }
}

impl Timed {
    pub(super) fn new(seconds: Vec<f64>, flops: u64, runs: Vec<KernelRun>) -> Timed {
        let (seconds, kernels) = (Spread::of(seconds), KernelShare::of(&runs, None));
        let flops_per_second = flops as f64 / seconds.median;
        Timed { seconds, flops, flops_per_second, floor_ms: None, share_of_floor: None, kernels, runs }
    }

    /// Fills in each kernel's floor, and its own: `floor` seconds, or the sum of its kernels'.
    pub(super) fn hold_against(&mut self, rates: &Rates, floor: Option<f64>) {
        self.kernels = KernelShare::of(&self.runs, Some(rates));
        let sum = || self.kernels.iter().filter_map(|kernel| kernel.floor_ms).sum();
        let floor_ms = floor.map_or_else(sum, |seconds| 1e3 * seconds);
        self.floor_ms = Some(floor_ms);
        self.share_of_floor = Some(floor_ms / (1e3 * self.seconds.median));
    }
}

impl Timing {
    /// Fills in the floors, its own and each kernel's.
    pub(crate) fn hold_against(&mut self, rates: &Rates) {
        let of_flops = || rates.floor(Cost { flops: self.timed.flops, bytes: 0 });
        let floor = self.timed.kernels.is_empty().then(of_flops);
        self.timed.hold_against(rates, floor);
    }
}

/// What one repeat did.
#[derive(Default)]
pub(super) struct Done {
    pub(crate) tokens: u64,
    pub(crate) flops: u64,
    /// Of the part that counts, where not all of it does.
    pub(crate) seconds: Option<f64>,
}

/// Warm-up, repeats, and one more under the profiler. `work` gets the number of the repeat, so that inputs can rotate; it ends by
/// reading a result, so its end is the device's.
pub(super) fn time<B: Measured>(
    ops: &B,
    task: &'static str,
    load: &Workload,
    mut work: impl FnMut(usize) -> Result<Done>,
) -> Result<Timing> {
    let (mut tokens, mut flops) = (0, 0);
    let seconds = repeated(load, |i| {
        let begin = Instant::now();
        let done = work(i)?;
        (tokens, flops) = (done.tokens, done.flops);
        Ok(done.seconds.unwrap_or_else(|| begin.elapsed().as_secs_f64()))
    })?;
    let runs = profiled(ops, || work(load.warmup + load.repeats).map(drop))?;
    let timed = Timed::new(seconds, flops, runs);
    let tokens_per_second = tokens as f64 / timed.seconds.median;
    Ok(Timing { task, timed, tokens, tokens_per_second })
}

/// Warm-up, then the repeats that count: what `work` returned of each of these.
pub(super) fn repeated<T>(load: &Workload, mut work: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
    (0..load.warmup).try_for_each(|i| work(i).map(drop))?;
    (load.warmup..load.warmup + load.repeats).map(work).collect()
}

/// Every kernel's run of `work`.
pub(super) fn profiled<B: Measured>(ops: &B, work: impl FnOnce() -> Result<()>) -> Result<Vec<KernelRun>> {
    ops.profile_begin()?;
    let done = work();
    let runs = ops.profile_end()?;
    done.map(|()| runs)
}

/// Milliseconds of one read from the device, whose latency every measured repeat contains.
pub(crate) fn read_latency<B: Ops>(ops: &B) -> Result<f64> {
    let tensor: Tensor<B, f32> = Tensor::zeros(ops, 1, 1)?;
    let mut seconds = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        tensor.read(ops)?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    Ok(1e3 * Spread::of(seconds).median)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { matrix_flops_per_s: 1e6, copy_bytes_per_s: 1e3 };

    fn run(kernel: &'static str, milliseconds: f32, flops: u64, bytes: u64) -> KernelRun {
        KernelRun { kernel, begin: 0.0, milliseconds, cost: Cost { flops, bytes } }
    }

    #[test]
    fn each_run_is_bound_by_its_flops_or_by_its_bytes() {
        // 1 ms of FLOPs, then 3 ms of bytes: the sums alone would say 3 ms.
        let runs = vec![run("a", 4.0, 1000, 0), run("a", 4.0, 0, 3), run("b", 2.0, 0, 0), run("c", 4.0, 1000, 2)];
        let mut timed = Timed::new(vec![0.02, 0.01, 0.03], 5000, runs);
        timed.hold_against(&RATES, None);
        let found: Vec<_> = timed.kernels.iter().map(|k| (k.kernel, k.floor_ms, k.share_of_floor)).collect();
        assert_eq!(found, [("a", Some(4.0), Some(0.5)), ("c", Some(2.0), Some(0.5)), ("b", None, None)]);
        assert_eq!((timed.floor_ms, timed.share_of_floor), (Some(6.0), Some(0.3)));
    }
}
