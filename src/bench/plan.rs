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
    /// Launches, FLOPs and bytes by kernel, and how long these take at least; what only the device knows is counted as
    /// the host last wrote it.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::backend::cuda::driver::{Arch, Define, DeviceInfo};
    use crate::model::{BlankWeights, ModelConfig, RandomWeights};
    use crate::ops::builds;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        load: Workload,
    }

    /// (C, query heads, key/value heads, head size, F, V), and whether the first layer sees a window alone.
    type Shape = ([usize; 6], bool);

    /// Two layers of a public model's shape.
    fn shape(reward: bool, ([hidden, heads, kv_heads, head_dim, feed_forward, vocab], window): Shape) -> ModelConfig {
        let folder = if reward { "models/framing/reward" } else { "models/framing/policy" };
        let mut config = ModelConfig::open(Path::new(folder)).unwrap();
        config.windows[0] = window.then_some(512);
        (config.hidden_size, config.heads, config.kv_heads, config.head_dim) = (hidden, heads, kv_heads, head_dim);
        (config.intermediate_size, config.vocab_size, config.layers) = (feed_forward, vocab, 2);
        config.max_position_embeddings = 2048;
        config
    }

    /// Keys and values of a prompt are read once for all of its answers, and again by each of those that have other prompts.
    #[test]
    fn answers_to_one_prompt_read_it_once() {
        let read = |answers: usize| {
            let counter = Counter::new(DeviceInfo::h200());
            let ops = &Cuda::new(counter.clone());
            let line = format!("x --length 601 --sequences 4 --answers {answers} --new-tokens 8");
            let load = &Typed::parse_from(line.split(' ')).load;
            let config = shape(false, ([128, 4, 2, 32, 352, 1024], false));
            let policy = Transformer::load(ops, config.clone(), &BlankWeights(RandomWeights::new(&config, 0))).unwrap();
            let plan = Planner { counter: &counter, ops, load, rates: None }.generate(&policy).unwrap();
            let attention = plan.kernels.iter().find(|kernel| kernel.kernel == "decode_attention").unwrap();
            attention.bytes / attention.launches as u64
        };
        // Two bytes of two key/value heads of 32, keys and values both; the first decoded token stands at 600.
        let [alone, two, four] = [1, 2, 4].map(read);
        assert_eq!((alone - two, two - four), (2 * 600 * 256, 600 * 256));
    }

    fn launched(arch: Arch, shape_of: Shape, rank: usize) -> BTreeSet<(&'static str, Vec<Define>)> {
        let counter = Counter::new(DeviceInfo::h200());
        let ops = &Cuda::with_tier(counter.clone(), Some(arch.name())).unwrap();
        let line = format!("x --tokens 1024 --length 256 --batch-tokens 1024 --sequences 4 --rank {rank}");
        let load = &Typed::parse_from(line.split(' ')).load;
        let planner = Planner { counter: &counter, ops, load, rates: None };
        let blank = |reward: bool| {
            let config = shape(reward, shape_of);
            Transformer::load(ops, config.clone(), &BlankWeights(RandomWeights::new(&config, 0))).unwrap()
        };
        let (policy, reward) = (blank(false), blank(true));
        for plan in [planner.step(&policy, &reward), planner.score(&reward), planner.generate(&policy)] {
            plan.unwrap();
        }
        counter.counts().builds
    }

    /// A server without a compiler runs what a pack of `builds()` holds, and nothing else.
    #[test]
    fn whatever_is_launched_is_in_a_pack() {
        let packed: BTreeSet<_> = builds().iter().map(|build| (build.source.file, build.defines.clone())).collect();
        for arch in [Arch::Sm80, Arch::Sm90a] {
            for (shape, rank) in [
                (([128, 4, 2, 32, 352, 1024], false), 8), // the suite's
                // But for a smaller V and F those of Qwen2.5-0.5B, Qwen2.5-1.5B, Llama 3.2 1B,
                (([896, 14, 2, 64, 4864, 8192], false), 16),
                (([1536, 12, 2, 128, 4480, 8192], false), 4),
                (([2048, 32, 8, 64, 4096, 8192], false), 100),
                // Mistral 7B with an added token, Phi-3 mini, Gemma 3 1B.
                (([4096, 32, 8, 128, 4096, 8001], true), 16),
                (([3072, 32, 32, 96, 4096, 8016], true), 32),
                (([1152, 4, 1, 256, 6912, 8192], true), 16),
            ] {
                let found = launched(arch, shape, rank);
                assert!(found.len() > 10, "{found:?}");
                let lacking: Vec<_> = found.difference(&packed).collect();
                assert!(lacking.is_empty(), "{arch}, {shape:?}, rank {rank}: {lacking:?}");
            }
        }
    }
}
