//! Tables, charts, one self-contained HTML file. Reads what a run has written; a run knows nothing of its report.

mod chart;
pub(crate) mod data;
mod figures;
pub(crate) mod numbers;
mod page;
pub(crate) mod table;
pub(crate) mod tables;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::text::output::write_atomic;

pub(crate) use data::RunData;
pub(crate) use table::{Align, Cell, Column, Mark, Style, Table};

/// The file's name in a run directory.
pub(crate) const NAME: &str = "report.html";

/// Writes `report.html` of a run again and returns its path. `others` are laid beside it.
/// Fails if one of the runs is missing or damaged, or has another benchmark.
pub fn write(directory: &Path, others: &[PathBuf]) -> Result<PathBuf> {
    let mut data = RunData::read(directory)?;
    for other in others {
        let beside = RunData::read(other)?.summary;
        if beside.benchmark_id != data.summary.benchmark_id {
            return Err(Error::Data {
                what: "runs laid side by side".into(),
                expected: format!("one benchmark, {}, as {} has", data.summary.benchmark_id, directory.display()),
                found: format!("{} in {}", beside.benchmark_id, other.display()),
                remedy: "measure both with the same test prompts, judge, thresholds and decoding".into(),
            });
        }
        let place = other.file_name().unwrap_or(other.as_os_str()).to_string_lossy();
        data.summary.methods.extend(beside.methods.into_iter().map(|mut method| {
            method.name = format!("{} ({place})", method.name);
            method
        }));
    }
    let path = directory.join(NAME);
    write_atomic(&path, page::render(&data)?.as_bytes())?;
    Ok(path)
}
