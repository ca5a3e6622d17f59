//! `summary.json`, the result of a run. Its parts are measured in `detect::measure`.

use std::path::Path;

use crate::error::{Error, Result};
use crate::text::output::write_atomic;

pub(crate) use crate::detect::measure::Summary;

/// The file's name in a run directory.
pub(crate) const NAME: &str = "summary.json";
/// What this program writes, and the only schema it reads.
pub(crate) const SCHEMA: u32 = 1;

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
        return Err(Error::File {
            file: path.to_path_buf(),
            expected: format!("schema {SCHEMA}"),
            found: format!("schema {schema}"),
            remedy: "use the version of ares that wrote it".into(),
        });
    }
    serde_json::from_value(value).map_err(Error::file(path, "the result of a run", remedy))
}
