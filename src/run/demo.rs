//! `ares demo`: the whole method on the built-in suite.

use std::path::PathBuf;

use clap::ValueEnum;

use super::attack::AttackOptions;
use super::data::DataFiles;
use super::dir::RunDir;
use super::experiment::{self, Experiment, Under};
use super::suite::{Suite, SuitePair};
use super::summary::Summary;
use super::watch::Watch;
use crate::error::{Error, Result};
use crate::judge::{JudgeSpec, Sense};
use crate::ops::Ops;
use crate::probe::SamplerKind;
use crate::repair::Method;

/// How much of the suite to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// A few probes, a few steps, the same path: does everything work here?
    Quick,
    /// The first pair, one seed, `rlhf`, `policy` and `joint`.
    Plain,
    /// All pairs, all methods, three seeds.
    Full,
}

/// Rows of each split and queries of each search in a quick look: few enough for the simulator, where a token takes about a
/// hundred times as long as on the processor itself.
const QUICK_ROWS: usize = 64;
/// Prompts with samples, and steps of further training, in a quick look.
const QUICK_SAMPLES: usize = 8;
const QUICK_FURTHER: usize = 2;

/// One pair's finished run.
pub(crate) struct DemoRun {
    pub(crate) pair: SuitePair,
    pub(crate) dir: PathBuf,
    pub(crate) summary: Summary,
}

/// Runs the demo, all but the reports; a `judge` takes the place of the suite's own, which then judges second, and with `attacker` the
/// suite's writes some of the probes. Each pair of `--full` gets a directory of its own below `outer`.
pub(crate) fn demo<B: Ops>(
    ops: &B,
    suite: &Suite,
    outer: &RunDir,
    (extent, judge, attacker): (Extent, Option<&JudgeSpec>, bool),
    seed: u64,
    watch: &mut dyn Watch,
) -> Result<Vec<DemoRun>> {
    if let Some(kept) = &outer.kept {
        watch.note(&format!("the earlier run is kept as {}", kept.display()));
    }
    let chosen = if extent == Extent::Full { suite.pairs() } else { &suite.pairs()[..1] };
    let mut runs = Vec::new();
    for pair in chosen {
        let mut experiment = suite_experiment(suite, pair, extent, attacker, seed)?;
        if let Some(judge) = judge {
            let own = std::mem::replace(&mut experiment.models.judge, judge.clone());
            experiment.models.second_judge = Some(own);
        }
        let inner = (chosen.len() > 1).then(|| outer.inner(&pair.name)).transpose()?;
        let dir = inner.as_ref().unwrap_or(outer);
        let summary = experiment::run(ops, &experiment, dir, watch)?;
        runs.push(DemoRun { dir: dir.path().to_path_buf(), pair: pair.clone(), summary });
    }
    Ok(runs)
}

/// The experiment of one pair of the suite.
fn suite_experiment(
    suite: &Suite,
    pair: &SuitePair,
    extent: Extent,
    with_attacker: bool,
    seed: u64,
) -> Result<Experiment> {
    let mut repair = suite.repair_config();
    repair.seed = seed;
    let (methods, seeds, probes) = match extent {
        Extent::Full => (Method::value_variants().to_vec(), (seed..seed + 3).collect(), 1000),
        Extent::Plain => (vec![Method::Rlhf, Method::Policy, Method::Joint], vec![seed], 1000),
        Extent::Quick => (vec![Method::Policy, Method::Joint], vec![seed], QUICK_ROWS),
    };
    if extent == Extent::Quick {
        (repair.steps, repair.resample) = (4, 2);
    }
    let split = |name: &str| pair.split(name);
    Ok(Experiment {
        command: "demo",
        models: suite.models(pair),
        data: DataFiles {
            calibration: split("calibration"),
            replay: split("replay"),
            retain: split("retain"),
            plausible: split("discovery"),
            gate: split("gate"),
            // A look at whether everything works is no reason to look at the test.
            test: split(if extent == Extent::Quick { "check" } else { "test" }),
            kind: None,
            told: None,
            rows: (extent == Extent::Quick).then_some(QUICK_ROWS),
        },
        grammar: pair.grammar(),
        attack: AttackOptions { attacker: with_attacker.then(|| suite.attacker()).transpose()?, on_topic: None },
        suite: Some(format!("{}, pair {}", suite.label(), pair.name)),
        methods,
        seeds,
        repair: repair.try_into().map_err(Error::Usage)?,
        sampler: SamplerKind::default(),
        probes,
        failures: 240,
        sense: Sense::Threshold,
        prefill: vec![5],
        grid: Vec::new(),
        sweep: None,
        samples: [QUICK_SAMPLES, 108, 324][extent as usize],
        further: [QUICK_FURTHER, 20, 80][extent as usize],
        further_under: Under::Own,
    })
}
