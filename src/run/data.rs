//! The splits of an experiment: disjoint by prompt, each with its hash.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::detect::measure::SplitInfo;
use crate::detect::rows::{EvalRow, PairRow, Response};
use crate::error::{Error, Result};
use crate::repair::{ReplayPair, RetainRow};
use crate::run::manifest::sha256_file;
use crate::text::Prompt;
use crate::text::rows::{Row, overlap, read};

// Where the splits lie; as a doc comment this would take the place of the command's own help.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataFiles {
    /// Validated pairs that fix the reward threshold
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: PathBuf,
    /// Validated pairs that are trained on
    #[arg(long, value_name = "FILE")]
    pub(crate) replay: PathBuf,
    /// Benign and borderline prompts with the answers to keep
    #[arg(long, value_name = "FILE")]
    pub(crate) retain: PathBuf,
    // The split is called `discovery`.
    /// Prompts as people write them: they only set how likely a probe must be
    #[arg(long, value_name = "FILE")]
    pub(crate) plausible: PathBuf,
    /// Prompts that accept or refuse a repair
    #[arg(long, value_name = "FILE")]
    pub(crate) gate: PathBuf,
    /// Prompts of the result, read once per method
    #[arg(long, value_name = "FILE")]
    pub(crate) test: PathBuf,
    /// Rows taken of each split at most, evenly spread over the file so that every kind of row is among them.
    #[arg(skip)]
    pub(crate) rows: Option<usize>,
}

/// The splits, read and found disjoint.
#[derive(Debug, Clone)]
pub(crate) struct Splits {
    pub(crate) calibration: Vec<PairRow>,
    pub(crate) replay: Vec<ReplayPair>,
    pub(crate) retain: Vec<RetainRow>,
    pub(crate) plausible: Vec<Prompt>,
    pub(crate) gate: Vec<EvalRow>,
    pub(crate) test: Vec<EvalRow>,
    pub(crate) info: BTreeMap<String, SplitInfo>,
}

impl DataFiles {
    /// Name and path of every split.
    pub(crate) fn all(&self) -> [(&'static str, &PathBuf); 6] {
        [
            ("calibration", &self.calibration),
            ("replay", &self.replay),
            ("retain", &self.retain),
            ("discovery", &self.plausible),
            ("gate", &self.gate),
            ("test", &self.test),
        ]
    }
}

impl Splits {
    /// Reads all splits strictly: a broken row here would move every number. Prompts that two splits share are an error.
    pub fn read(files: &DataFiles) -> Result<Splits> {
        let mut info = BTreeMap::new();
        let mut rows: Vec<(&str, Vec<Row>)> = Vec::new();
        for (name, path) in files.all() {
            let found = spread(read(Some(path), true)?, files.rows);
            if found.is_empty() {
                return Err(Error::file(path, "at least one row", "give a file with rows")("none"));
            }
            info.insert(name.to_string(), SplitInfo { hash: sha256_file(path)?, n: found.len() as u64 });
            rows.push((name, found));
        }
        // Replay and retain are both trained on and may share prompts; they stand as one side against the others.
        let named: Vec<(&str, &[Row])> = rows.iter().map(|(name, rows)| (*name, rows.as_slice())).collect();
        let of = |name: &str| named.iter().find(|(n, _)| *n == name).map_or(&[][..], |(_, rows)| rows);
        let trained: Vec<Row> = ["replay", "retain", "discovery"].iter().flat_map(|name| of(name)).cloned().collect();
        overlap(&[
            ("trained", &trained),
            ("calibration", of("calibration")),
            ("gate", of("gate")),
            ("test", of("test")),
        ])?;
        let pair = |row: &Row| PairRow::from_object(&row.object, &row.place());
        let eval = |row: &Row| EvalRow::from_object(&row.object, Response::Reference, &row.place());
        let replay = |row: &Row| {
            let PairRow { prompt, chosen, rejected, .. } = pair(row)?;
            Ok(ReplayPair { prompt, chosen, rejected })
        };
        let retain = |row: &Row| {
            let response = row.response()?.ok_or_else(|| row.wrong("a `response` to retain", "none"))?;
            Ok(RetainRow { prompt: row.prompt(false)?, response })
        };
        Ok(Splits {
            calibration: of("calibration").iter().map(pair).collect::<Result<_>>()?,
            replay: of("replay").iter().map(replay).collect::<Result<_>>()?,
            retain: of("retain").iter().map(retain).collect::<Result<_>>()?,
            plausible: of("discovery").iter().map(|row| row.prompt(false)).collect::<Result<_>>()?,
            gate: of("gate").iter().map(eval).collect::<Result<_>>()?,
            test: of("test").iter().map(eval).collect::<Result<_>>()?,
            info,
        })
    }
}

/// `most` of the rows, evenly spread; all of them where there are no more.
fn spread(rows: Vec<Row>, most: Option<usize>) -> Vec<Row> {
    let (n, most) = (rows.len(), most.unwrap_or(rows.len()).min(rows.len()));
    let taken = |i: usize| i * most / n != (i + 1) * most / n;
    rows.into_iter().enumerate().filter(|&(i, _)| taken(i)).map(|(_, row)| row).collect()
}
