//! `summary.json`, the result of a run. Its parts are measured in `detect::measure`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::detect::measure::{Measure, MethodResult};
use crate::error::{Error, Result};
use crate::judge::Thresholds;
use crate::model::Decoding;
use crate::probe::ProbeResult;
use crate::text::output::write_atomic;

/// The file's name in a run directory.
pub(crate) const NAME: &str = "summary.json";
/// What this program writes, and the only schema it reads.
pub(crate) const SCHEMA: u32 = 1;

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
