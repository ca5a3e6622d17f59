//! `ares merge`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Session;
use super::device::on_device;
use crate::error::{Error, Result};
use crate::model::merge::{Precision, merge};
use crate::model::{ModelConfig, ModelSpec};
use crate::report::numbers::{percent, percent_ci};
use crate::report::{Align, Table};
use crate::run::args;
use crate::run::detect::{DetectOptions, Detector};
use crate::text::output::{folder, held_folder};
use crate::text::rows::read;

/// Put an adapter into its base: a checkpoint that transformers opens
#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// The base, and the adapter that was trained on it
    #[arg(value_name = "DIR+ADAPTER", value_parser = args::model)]
    model: ModelSpec,
    /// Folder of the merged checkpoint; it must not be there yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How numbers are written: as the base has them, f32 or bf16
    #[arg(long, value_name = "TYPE", value_enum, default_value = "base")]
    dtype: Precision,
    /// Detect failures on these rows with the adapter, merged, and merged and rounded: rounding has undone repairs
    ///
    /// The merged model stands in its place, as policy or as reward model; the other one, the judge and the reward threshold are
    /// given as to `ares detect`.
    #[arg(long, value_name = "FILE")]
    measure: Option<PathBuf>,
    #[command(flatten)]
    detect: DetectOptions,
}

/// Rows that are looked at together.
const WINDOW: usize = 512;

impl Merge {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let ModelSpec { dir, adapter: Some(adapter) } = &self.model else {
            let place = self.model.dir.display();
            return Err(Error::Usage(format!(
                "{place}: expected DIR+ADAPTER, found a folder without an adapter: nothing to merge"
            )));
        };
        let is_policy = ModelConfig::open(dir)?.is_causal();
        if self.measure.is_some() {
            self.check_measure(is_policy)?;
        }
        let merged = merge(dir, adapter, self.dtype, &self.out)?;
        let (place, changed) = (self.out.display(), merged.changed);
        session.say(&format!("{changed} tensors of {} are changed in {place}", merged.tensors));
        let mut result = json!({ "out": self.out, "changed": changed, "tensors": merged.tensors });
        if let Some(rows) = &self.measure {
            let rows = read(Some(rows), true)?;
            let parent = folder(&self.out);
            let (staging, _held) = held_folder(parent).map_err(Error::write(parent))?;
            let mut states = vec![("with the adapter", self.model.clone())];
            let folder = |dir: PathBuf| ModelSpec { dir, adapter: None };
            if merged.rounded {
                let whole = staging.path().join("f32");
                merge(dir, adapter, Precision::F32, &whole)?;
                states.push(("merged", folder(whole)));
            }
            states.push((if merged.rounded { "merged and rounded" } else { "merged" }, folder(self.out.clone())));
            let device = session.device()?;
            let columns = [
                ("state", Align::Left),
                ("n", Align::Right),
                ("CFR % [95 %]", Align::Right),
                ("harmful %", Align::Right),
            ];
            let (mut table, mut measures) = (Table::new(&columns), Vec::new());
            on_device!(device, |ops| {
                for (state, spec) in states {
                    let mut options = DetectOptions { seed: session.seed(), ..self.detect.clone() };
                    *(if is_policy { &mut options.policy } else { &mut options.reward }) = Some(spec);
                    let mut detector = Detector::open(ops, &options)?;
                    rows.chunks(WINDOW).try_for_each(|rows| detector.look(rows).map(drop))?;
                    let measure = detector.measure();
                    let rates = [percent_ci(measure.cfr, measure.ci95), percent(measure.harmful_rate)];
                    let cells = [state.to_string(), measure.n.to_string()].into_iter().chain(rates);
                    table.row(cells.map(Into::into).collect());
                    measures.push(json!({ "state": state, "measure": measure }));
                }
                Ok(())
            })?;
            session.table(&table);
            result["measures"] = Value::Array(measures);
        }
        session.result(&result)
    }

    /// What takes the merged model's place cannot be given as well; what is missing should not be missed after the merge.
    fn check_measure(&self, is_policy: bool) -> Result<()> {
        let (own, other) = if is_policy { ("--policy", "--reward") } else { ("--reward", "--policy") };
        let (given, lacking) = match is_policy {
            true => (&self.detect.policy, &self.detect.reward),
            false => (&self.detect.reward, &self.detect.policy),
        };
        if given.is_some() {
            return Err(Error::Usage(format!("{own}: expected none, as the merged model stands there; leave it out")));
        }
        if lacking.is_none() || self.detect.judge.is_none() {
            return Err(Error::Usage(format!("--measure: expected {other} and --judge beside it")));
        }
        self.detect.scale().map(drop)
    }
}
