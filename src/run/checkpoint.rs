//! A repair in pieces: every few seconds the journal gets the steps since the last time, and a file what the next step depends on. A
//! resumed repair goes on from the last piece whose file is there.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::dir::RunDir;
use super::manifest::sha256_file;
use super::records::Lines;
use super::watch::Watch;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::model::AdapterInit;
use crate::model::adapter_file::{read_safetensors, safetensors_bytes};
use crate::ops::Ops;
use crate::repair::{Method, Prepared, Recipe, RepairOutcome, Setting, StepMetrics, Trainer};
use crate::text::write_atomic;

/// Below the run directory; gone once the run is finished.
pub(super) const FOLDER: &str = "checkpoints";
/// The note in the file's header.
const STATE: &str = "state";
/// Work between two pieces.
const WAIT: Duration = Duration::from_secs(4);
/// Writing a piece takes at most this share of the time.
const SHARE: f64 = 0.01;

/// A piece of a repair.
#[derive(Serialize, Deserialize)]
struct Piece {
    /// Steps before this piece.
    before: usize,
    steps: Vec<StepMetrics>,
    /// SHA-256 of the file.
    file: String,
}

/// What a repair begins with.
pub(super) struct Repair<'a> {
    /// Names its units, its lines and its files; once in a run.
    pub(super) name: String,
    pub(super) method: Method,
    pub(super) recipe: &'a Recipe,
    /// How adapters begin; `None` also where the pair has some.
    pub(super) init: Option<AdapterInit>,
    /// The file of an earlier repair whose adapters and moments are trained on.
    pub(super) earlier: Option<PathBuf>,
    /// The loop's round.
    pub(super) round: Option<u64>,
    /// What it and its steps in metrics.jsonl are called, if not by their method.
    pub(super) label: Option<String>,
}

/// Trains, watched; returns also the file from which a later repair may go on. Ctrl-C ends it after a step, with an error, and what
/// was done until then is kept.
pub(super) fn train<B: Ops>(
    setting: Setting<B>,
    journal: &mut Journal,
    prepared: &Prepared,
    repair: &Repair,
    dir: &RunDir,
    lines: &mut Lines,
    watch: &mut dyn Watch,
) -> Result<(RepairOutcome, PathBuf)> {
    let name = repair.label.as_deref().unwrap_or(repair.method.name());
    watch.begin(&format!("repair by {name}"), repair.recipe.steps);
    let mut trainer = Trainer::new(setting, prepared, repair.method, repair.recipe, repair.init)?;
    if let Some(earlier) = &repair.earlier {
        let (tensors, state) = read_safetensors(earlier, STATE)?;
        trainer.continue_from(&state, &tensors)?;
    }
    let folder = dir.file(FOLDER);
    fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
    let mut pieces = Pieces { name: &repair.name, folder, journal, count: 0, saved: 0 };
    pieces.restore(&mut trainer, watch)?;
    lines.metrics(trainer.history(), repair.label.as_deref(), repair.round)?;
    let (mut written, mut wait) = (Instant::now(), WAIT);
    while let Some(step) = trainer.advance()? {
        watch.at(step.step as usize, &format!("loss {:.3}", step.loss()));
        lines.metrics(std::slice::from_ref(step), repair.label.as_deref(), repair.round)?;
        let go_on = pieces.journal.go_on();
        if go_on.is_err() || written.elapsed() >= wait {
            let begin = Instant::now();
            pieces.save(&trainer)?;
            written = Instant::now();
            wait = WAIT.max((written - begin).div_f64(SHARE));
        }
        go_on?;
    }
    pieces.save(&trainer)?;
    let file = pieces.file(pieces.saved);
    let outcome = trainer.finish();
    let tokens = outcome.tokens_policy + outcome.tokens_reward;
    watch.end(&format!("{} steps in {:.1} s, {} k tokens", outcome.steps, outcome.seconds, tokens / 1000));
    Ok((outcome, file))
}

/// The pieces of one repair.
struct Pieces<'a> {
    name: &'a str,
    folder: PathBuf,
    journal: &'a mut Journal,
    /// Pieces in the journal.
    count: usize,
    /// Steps in them.
    saved: usize,
}

impl Pieces<'_> {
    fn unit(&self, index: usize) -> String {
        format!("repair {}/{index}", self.name)
    }

    fn file(&self, steps: usize) -> PathBuf {
        self.folder.join(format!("{}-{steps}.safetensors", self.name))
    }

    /// Brings a new trainer to where the last piece with a whole file left it; elsewhere it begins at the first step, which gives
    /// the same, later.
    fn restore<B: Ops>(&mut self, trainer: &mut Trainer<B>, watch: &mut dyn Watch) -> Result<()> {
        let (mut steps, mut last) = (Vec::new(), None);
        while let Some(piece) = self.journal.get::<Piece>(&self.unit(self.count))?.filter(|p| p.before == steps.len()) {
            steps.extend(piece.steps);
            self.count += 1;
            let file = self.file(steps.len());
            if file.is_file() && sha256_file(&file)? == piece.file {
                last = Some((self.count, steps.len(), file));
            }
        }
        if last.is_none() && !steps.is_empty() {
            watch.note(&format!("repair {}: its file in {} is not there: it begins again", self.name, FOLDER));
        }
        self.count = 0;
        if let Some((count, saved, file)) = last {
            steps.truncate(saved);
            let (tensors, state) = read_safetensors(&file, STATE)?;
            trainer.restore(&state, &tensors, steps)?;
            (self.count, self.saved) = (count, saved);
        }
        Ok(())
    }

    /// Writes what the trainer did since the last piece: the file first, then the journal's line; then the earlier file goes.
    fn save<B: Ops>(&mut self, trainer: &Trainer<B>) -> Result<()> {
        let (before, steps) = (self.saved, trainer.history().len());
        let file = self.file(steps);
        if steps == before && file.is_file() {
            return Ok(());
        }
        let (state, tensors) = trainer.save()?;
        write_atomic(&file, &safetensors_bytes(&tensors, &[(STATE, state)], &file)?)?;
        let piece = Piece { before, steps: trainer.history()[before..].to_vec(), file: sha256_file(&file)? };
        self.journal.put(&self.unit(self.count), &piece)?;
        (self.count, self.saved) = (self.count + 1, steps);
        if steps > before {
            // Best effort: a file too many harms nobody.
            let _ = fs::remove_file(self.file(before));
        }
        Ok(())
    }
}
