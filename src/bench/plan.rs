//! What a benchmark's work asks of a device, counted before there is one: bytes by what holds them, launches by kernel.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::timing::{KernelShare, profiled};
use super::{Generation, Scoring, Step, Workload};
use crate::backend::Cuda;
use crate::backend::cuda::counter::Counter;
use crate::error::Result;
use crate::model::Transformer;
use crate::ops::ceilings::Rates;

/// One task's.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    pub(crate) task: &'static str,
    /// Bytes by what holds them while the task runs; `scratch` is what comes on top at the worst moment.
    pub(crate) parts: BTreeMap<&'static str, u64>,
    pub(crate) peak_bytes: u64,
    /// Packed rows (generated tokens when decoding) of one repeat.
    pub(crate) tokens: u64,
    /// Of one repeat.
    pub(crate) launches: u64,
    /// Sequences of launches that were recorded, and how often they were replayed.
    pub(crate) captures: u64,
    pub(crate) replays: u64,
    /// Launches, FLOPs and bytes by kernel, and how long these take at least; what only the device knows is counted at its least.
    pub(crate) kernels: Vec<KernelShare>,
}

/// A counting device with the models on it.
pub(crate) struct Planner<'a> {
    pub(crate) counter: &'a Arc<Counter>,
    pub(crate) ops: &'a Cuda,
    pub(crate) load: &'a Workload,
    /// For the floors.
    pub(crate) rates: Option<Rates>,
}

impl Planner<'_> {
    pub(crate) fn step(&self, policy: &Transformer<Cuda>, reward: &Transformer<Cuda>) -> Result<Plan> {
        let make = |held: &mut Held| {
            let mut step = Step::new(policy, reward, self.load)?;
            held.part("adapters, gradients, moments");
            step.allocate()?;
            held.part("activations of both models in turn");
            Ok(step)
        };
        self.plan("step", make, |step, i| Ok(step.run(i)?.tokens))
    }

    pub(crate) fn score(&self, reward: &Transformer<Cuda>) -> Result<Plan> {
        let make = |held: &mut Held| {
            let scoring = Scoring::new(reward, self.load)?;
            held.part("activations");
            Ok(scoring)
        };
        self.plan("score", make, |scoring, i| Ok(scoring.run(i)?.tokens))
    }

    pub(crate) fn generate(&self, policy: &Transformer<Cuda>) -> Result<Plan> {
        let make = |held: &mut Held| {
            let generation = Generation::new(policy, self.load)?;
            held.part("cache and activations");
            Ok(generation)
        };
        self.plan("generate", make, |generation, i| Ok(generation.run(i, &mut |_| Ok(()))?.tokens))
    }

    /// `make` says what is held, `run` does one repeat and returns its tokens.
    fn plan<T>(
        &self,
        task: &'static str,
        make: impl FnOnce(&mut Held) -> Result<T>,
        mut run: impl FnMut(&mut T, usize) -> Result<u64>,
    ) -> Result<Plan> {
        self.counter.begin();
        let mut held = Held { counter: self.counter, before: 0, parts: BTreeMap::new() };
        held.part("weights");
        let mut work = make(&mut held)?;
        // The first repeat grows what grows; the second is like all that follow.
        run(&mut work, 0)?;
        let peak_bytes = self.counter.counts().peak_bytes;
        held.parts.insert("scratch", peak_bytes - held.before);
        self.counter.begin();
        let tokens = run(&mut work, 1)?;
        let counts = self.counter.counts();
        let kernels = KernelShare::of(&profiled(self.ops, || run(&mut work, 2).map(drop))?, self.rates.as_ref());
        let launches = counts.launches.values().sum();
        let (captures, replays) = (counts.captures, counts.replays);
        Ok(Plan { task, parts: held.parts, peak_bytes, tokens, launches, captures, replays, kernels })
    }
}

/// Bytes held, part by part.
struct Held<'a> {
    counter: &'a Counter,
    before: u64,
    parts: BTreeMap<&'static str, u64>,
}

impl Held<'_> {
    /// What came since the last part.
    fn part(&mut self, name: &'static str) {
        let now = self.counter.counts().bytes;
        self.parts.insert(name, now - self.before);
        self.before = now;
    }
}
