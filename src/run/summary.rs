//! `summary.json`, the result of a run. Its parts are measured in `detect::measure`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::detect::measure::{Measure, MethodResult, ratio};
use crate::error::{Error, Result};
use crate::judge::Thresholds;
use crate::model::Decoding;
use crate::probe::{ProbeResult, SearchSummary};
use crate::text::output::write_atomic;

/// The file's name in a run directory.
pub(crate) const NAME: &str = "summary.json";
/// What this program writes, and the only schema it reads.
pub(crate) const SCHEMA: u32 = 1;

/// What further training after a method is called in metrics.jsonl: the method, and this.
pub(crate) const FURTHER: &str = ", then rlhf";

/// A split as it was used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SplitInfo {
    /// SHA-256 of the file, hex.
    pub(crate) hash: String,
    pub(crate) n: u64,
}

/// `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// 1.
    pub(crate) schema: u32,
    /// Of the program that wrote it.
    pub(crate) version: String,
    /// Hash of test prompts, judge, τ_h, the τ_r rule and decoding; different ids are never laid side by side.
    pub(crate) benchmark_id: String,
    pub(crate) device: String,
    pub(crate) seeds: Vec<u64>,
    pub(crate) suite: Option<String>,
    pub(crate) thresholds: Thresholds,
    pub(crate) decoding: Decoding,
    #[serde(default)]
    pub(crate) splits: BTreeMap<String, SplitInfo>,
    pub before: Measure,
    #[serde(default)]
    pub methods: Vec<MethodResult>,
    pub(crate) probe: Option<ProbeResult>,
    /// Of a loop, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rounds: Vec<Round>,
    /// What an unfinished run still lacks; absent once it is finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unfinished: Option<String>,
}

/// One round of the loop: what was found, what was trained on it, and what the gates said. Measured on the `gate` split.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Round {
    /// From 1.
    pub(crate) round: u64,
    /// What the search found on the models as the round began with them; and over tactics that no repair sees.
    pub(crate) search: Hits,
    pub(crate) search_held_out: Option<Hits>,
    /// Failures trained on: those of this round first, then those of earlier ones.
    pub(crate) failures: u64,
    /// Failures that the judge did not admit.
    pub(crate) left_out: u64,
    /// The models as the round began with them.
    pub(crate) before: Measure,
    /// The repair: its settings, cost, gates and verdict, and the models after it; null where nothing was found to repair.
    pub(crate) repair: Option<MethodResult>,
    /// Why the round was refused: its models were rolled back and the next round learns half as fast.
    pub(crate) why_not: Option<String>,
    /// The next search, with a fresh seed and what the earlier ones learned, on the models as the round left them.
    pub(crate) reprobe: Hits,
    pub(crate) reprobe_held_out: Option<Hits>,
    /// SHA-256 of the adapters as the round left them, by role.
    pub(crate) adapters: BTreeMap<String, String>,
}

/// What a search found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hits {
    pub(crate) queries: u64,
    /// Coupled failures, and those of them that are no near-duplicates of others.
    pub(crate) coupled: u64,
    pub(crate) distinct: u64,
    /// Coupled failures per 1000 queries; unknown without queries.
    pub(crate) per_1000: Option<f64>,
}

impl Hits {
    pub(crate) fn of(found: &SearchSummary) -> Hits {
        let (queries, coupled, distinct) = (found.queries as u64, found.coupled_found as u64, found.distinct as u64);
        Hits { queries, coupled, distinct, per_1000: ratio(1000 * coupled, queries) }
    }
}

/// Writes the result; the same result gives the same bytes.
pub(crate) fn write(path: &Path, summary: &Summary) -> Result<()> {
    let remedy = "please report it: a fault in ares";
    let mut text =
        serde_json::to_string_pretty(summary).map_err(Error::file(path, "a result that JSON can hold", remedy))?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// Reads a result. The schema is looked at first, so that a file of another one is not called damaged.
pub fn read(path: &Path) -> Result<Summary> {
    let remedy = "give a directory that `ares demo` or `ares compare` has written";
    let text = std::fs::read_to_string(path).map_err(Error::read(path))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(Error::file(path, "the result of a run", remedy))?;
    let schema = value.get("schema").cloned().unwrap_or_default();
    if schema != SCHEMA {
        let expected = format!("schema {SCHEMA}");
        return Err(Error::file(path, &expected, "use the version of ares that wrote it")(format!("schema {schema}")));
    }
    serde_json::from_value(value).map_err(Error::file(path, "the result of a run", remedy))
}
