//! What the tests of operations share: operands, devices, comparisons that fail closed, and what the four kinds of test assert.

#![allow(dead_code)] // each test target uses its own part of this

#[path = "toolkit/operands.rs"]
mod operands;

use std::collections::BTreeMap;
use std::sync::Arc;

use ares::backend::cuda::compiler::KernelOptions;
use ares::backend::cuda::device::GpuDriver;
use ares::backend::cuda::driver::{Arch, Driver};
use ares::backend::cuda::sim::SimDriver;
use ares::backend::{Backend, Cpu, Cuda, Tensor};
use ares::ops::Ops;
pub use operands::*;

/// An operation's operands. Both ways of computing give the same names; where backward reads what forward saved, a backend's
/// reads what the plain loops saved, so that its own error is seen.
pub trait Case: Clone {
    /// By the plain loops.
    fn naive(&self) -> Plain;

    fn run<B: Ops>(&self, ops: &B) -> Outputs;
}

pub type Plain = BTreeMap<&'static str, Vec<f32>>;

/// What an operation left on a backend.
#[derive(Default)]
pub struct Outputs(Vec<Output>);

pub struct Output {
    name: &'static str,
    /// 0 for a sum over rows.
    rows: usize,
    values: Vec<f32>,
    /// What the device may differ by from the CPU that rounds as it does: units in the last place of a bf16, a share of the
    /// value, and a number for all elements or for each.
    ulps: f32,
    relative: f32,
    absolute: Vec<f32>,
}

impl Outputs {
    /// Activations, which both sides round: within `ulps`, and `absolute` for what a reordered sum may differ by.
    pub fn act<B: Backend>(&mut self, ops: &B, name: &'static str, tensor: Tensor<B>, ulps: f32, absolute: f32) {
        self.each(ops, name, tensor, ulps, vec![absolute]);
    }

    /// Activations with a number for each element.
    pub fn each<B: Backend>(&mut self, ops: &B, name: &'static str, tensor: Tensor<B>, ulps: f32, absolute: Vec<f32>) {
        let (rows, values) = (tensor.rows(), read(ops, tensor));
        self.0.push(Output { name, rows, values, ulps, relative: 0.0, absolute });
    }

    /// f32 results.
    pub fn f32<B: Backend>(
        &mut self,
        ops: &B,
        name: &'static str,
        tensor: Tensor<B, f32>,
        relative: f32,
        absolute: f32,
    ) -> &mut Output {
        let (rows, values) = (tensor.rows(), read(ops, tensor));
        self.0.push(Output { name, rows, values, ulps: 0.0, relative, absolute: vec![absolute] });
        self.0.last_mut().unwrap()
    }

    pub fn named(&self, name: &str) -> &[f32] {
        &self.0.iter().find(|output| output.name == name).unwrap_or_else(|| panic!("no output {name}")).values
    }
}

impl Output {
    /// Says that these are sums over the batch: each depends on all rows.
    pub fn sum(&mut self) {
        self.rows = 0;
    }
}

/// The fast CPU kernels give what the plain loops give, up to `limit` of the value and of its output's root mean square, and `absolute`.
#[track_caller]
pub fn assert_naive(what: &str, case: &impl Case, limit: f64, absolute: f64) {
    let (found, expected) = (case.run(&Cpu::new()), case.naive());
    assert_eq!(found.0.len(), expected.len(), "{what}: outputs");
    for Output { name, values, .. } in &found.0 {
        let expected: Vec<f64> = expected[name].iter().map(|v| f64::from(*v)).collect();
        let scale = root_mean_square(&expected);
        assert_within(&format!("{what}: {name}"), values, &expected, |x| limit * (scale + x.abs()) + absolute);
    }
}

/// The device's kernels give what the CPU gives that rounds as they do.
#[track_caller]
pub fn assert_parity(what: &str, device: &Cuda, case: &impl Case) {
    let (found, expected) = (case.run(device), case.run(&Cpu::rounded()));
    for (found, expected) in found.0.iter().zip(&expected.0) {
        let Output { name, ulps, relative, absolute, .. } = found;
        assert_eq!(found.values.len(), expected.values.len(), "{what}: {name}");
        for (i, (&found, &expected)) in found.values.iter().zip(&expected.values).enumerate() {
            let limit = ulps * ulp(expected.abs().max(found.abs())) + relative * expected.abs();
            let limit = limit + absolute[i % absolute.len()];
            let apart = (found - expected).abs();
            assert!(apart <= limit, "{what}: {name}[{i}]: expected {expected}, found {found}, limit {limit}");
        }
    }
}

/// Rows of the batch from which companies are taken.
pub const ROWS: usize = 200;

/// A row's outputs have the same bits alone, in companies of every remainder of eight and around one block of the products, and in
/// another order; on the CPU and on the device. `take(rows)` is the case of the named rows of one fixed batch of [`ROWS`].
#[track_caller]
pub fn assert_alone<C: Case>(what: &str, take: &impl Fn(&[usize]) -> C) {
    assert_alone_on_cpu(what, take);
    if let Some(device) = device() {
        let companies = [vec![0], vec![63], vec![64], (30..95).rev().collect(), vec![129]];
        alone_on(&device, what, 130, companies.into_iter(), take);
    }
}

#[track_caller]
pub fn assert_alone_on_cpu<C: Case>(what: &str, take: &impl Fn(&[usize]) -> C) {
    const RUNS: &[(usize, usize)] =
        &[(0, 1), (199, 1), (5, 2), (7, 3), (60, 9), (33, 14), (64, 63), (100, 64), (30, 65), (0, 128), (1, 199)];
    // A permutation, since 77 and 200 share no factor.
    let shuffled = (0..ROWS).map(|i| (i * 77 + 13) % ROWS).collect();
    let companies = RUNS.iter().map(|(first, count)| (*first..first + count).collect()).chain([shuffled]);
    alone_on(&Cpu::new(), what, ROWS, companies, take);
}

fn alone_on<B: Ops, C: Case>(
    ops: &B,
    what: &str,
    count: usize,
    companies: impl Iterator<Item = Vec<usize>>,
    take: &impl Fn(&[usize]) -> C,
) {
    let all = take(&(0..count).collect::<Vec<_>>()).run(ops);
    for rows in companies {
        let some = take(&rows).run(ops);
        for (some, all) in some.0.iter().zip(&all.0).filter(|(some, _)| some.rows > 0) {
            let cols = some.values.len() / rows.len();
            assert!(some.values.iter().all(|v| v.is_finite()), "{what}: {}: finite", some.name);
            for (found, row) in some.values.chunks(cols.max(1)).zip(&rows) {
                let expected = &all.values[row * cols..][..cols];
                assert_eq!(bits(found), bits(expected), "{what}: {}: row {row} among {}", some.name, rows.len());
            }
        }
    }
}

/// In the plain loops, `d` (less what it held before) is the gradient of Σ dy·y with respect to the operand that `at` gives.
#[track_caller]
pub fn assert_slope<C: Case>(
    case: &C,
    (y, dy): (&str, &[f32]),
    (d, before): (&str, &[f32]),
    at: impl Fn(&mut C) -> &mut Vec<f32>,
) {
    let (mut found, mut case) = (case.naive()[d].clone(), case.clone());
    if !before.is_empty() {
        found = less(&found, before);
    }
    let x = at(&mut case).clone();
    assert_gradient(d, &found, &x, |x| {
        at(&mut case).copy_from_slice(x);
        functional(dy, &case.naive()[y])
    });
}

/// In the plain loops, dx, dA and dB of the product that `at` gives are the gradients of Σ dy·y.
#[track_caller]
pub fn assert_product_slopes<C: Case>(case: &C, dy: (&str, &[f32]), at: fn(&mut C) -> &mut Product) {
    assert_slope(case, dy, ("dx", &[]), |case| &mut at(case).x);
    let Some(Masters { da, db, .. }) = at(&mut case.clone()).masters.take() else { return };
    assert_slope(case, dy, ("dA", &da), |case| &mut at(case).masters.as_mut().unwrap().a);
    assert_slope(case, dy, ("dB", &db), |case| &mut at(case).masters.as_mut().unwrap().b);
}

/// What was added to an accumulator.
pub fn less(found: &[f32], before: &[f32]) -> Vec<f32> {
    found.iter().zip(before).map(|(found, before)| found - before).collect()
}

/// Large enough that f32's rounding does not show, small enough for the error of the fourth order.
const STEP: f32 = 2e-2;

/// Fails unless `found` is the gradient of `f` at `x`, to a thousandth of its root mean square.
#[track_caller]
pub fn assert_gradient(what: &str, found: &[f32], x: &[f32], f: impl FnMut(&[f32]) -> f64) {
    let expected = differences(x, f);
    let scale = root_mean_square(&expected);
    assert!(scale > 1e-3, "{what}: the functional does not depend on it (root mean square {scale:e})");
    assert_close(what, found, &expected, 1e-3 * scale);
}

/// Central differences of `f` at `x` along every coordinate, extrapolated from two steps (Richardson).
fn differences(x: &[f32], mut f: impl FnMut(&[f32]) -> f64) -> Vec<f64> {
    let (count, mut x) = (x.len(), x.to_vec());
    let mut slope = |i: usize, step: f32| {
        let old = x[i];
        let (above, below) = (old + step, old - step);
        x[i] = above;
        let high = f(&x);
        x[i] = below;
        let low = f(&x);
        x[i] = old;
        (high - low) / (f64::from(above) - f64::from(below))
    };
    (0..count).map(|i| (4.0 * slope(i, STEP / 2.0) - slope(i, STEP)) / 3.0).collect()
}

/// Σ c·y in f64.
pub fn functional(c: &[f32], y: &[f32]) -> f64 {
    assert_eq!(c.len(), y.len());
    c.iter().zip(y).map(|(c, y)| f64::from(*c) * f64::from(*y)).sum()
}

/// Every number within `limit` of what is expected; NaN fails.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], limit: f64) {
    assert_within(what, found, expected, |_| limit);
}

#[track_caller]
fn assert_within(what: &str, found: &[f32], expected: &[f64], limit: impl Fn(f64) -> f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let (apart, limit) = ((f64::from(found) - expected).abs(), limit(expected));
        assert!(apart <= limit, "{what}, element {i}: found {found}, expected {expected} (limit {limit:e})");
    }
}

fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|v| v * v).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

/// One unit in the last place of a bf16 as large as `value`.
fn ulp(value: f32) -> f32 {
    let exponent = (value.abs().to_bits() >> 23).max(1);
    f32::from_bits(exponent << 23) / 128.0
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The device under test, a stream of its own for each test; `None` where it cannot be had, and the reason is printed.
pub fn device() -> Option<Cuda> {
    let tier = std::env::var("ARES_TIER").ok();
    driver_or("sim").map(|driver| Cuda::with_tier(driver, tier.as_deref()).expect("a tier"))
}

/// The same on sm_90a with that architecture's own kernels; `None` on a GPU of another.
#[allow(dead_code)] // not every test that includes this file has such
pub fn hopper() -> Option<Cuda> {
    let driver = driver_or("sim:sm_90a").filter(|driver| driver.info().arch == Arch::Sm90a)?;
    Some(Cuda::with_tier(driver, Some("sm_90a")).expect("a tier"))
}

/// The simulator; with ARES_PARITY_DEVICE=sim:ARCH as that architecture plans its launches, with ARES_PARITY_DEVICE=cuda a GPU; with ARES_TIER=sm_90a by
/// that tier's kernels where there are such.
/// ARES_REQUIRE_GPU=1 and ARES_REQUIRE_SIM=1 turn a skip into a failure.
pub fn driver() -> Option<Arc<dyn Driver>> {
    driver_or("sim")
}

fn driver_or(simulator: &str) -> Option<Arc<dyn Driver>> {
    let default = if std::env::var_os("ARES_REQUIRE_GPU").is_some() { "cuda" } else { simulator };
    let wanted = std::env::var("ARES_PARITY_DEVICE").unwrap_or_else(|_| default.to_string());
    let options = KernelOptions::default().or_environment();
    let driver = match wanted.as_str() {
        "sim" => SimDriver::open(Arch::Sm80, &options, None),
        "cuda" => GpuDriver::open(0, options),
        other => match other.strip_prefix("sim:").map(str::parse) {
            Some(Ok(arch)) => SimDriver::open(arch, &options, None),
            _ => panic!("ARES_PARITY_DEVICE: expected sim, sim:ARCH or cuda, found {other}"),
        },
    };
    match driver {
        Ok(driver) => Some(driver),
        Err(reason) => {
            let required = ["ARES_REQUIRE_GPU", "ARES_REQUIRE_SIM"].iter().any(|name| std::env::var(name).is_ok());
            assert!(!required, "{reason}");
            println!("skipped: {reason}");
            None
        }
    }
}
