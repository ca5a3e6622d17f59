//! Rows out: JSONL or CSV, to standard output or to a file that appears whole or not at all.

use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::output::AtomicFile;

/// Writes rows in the order in which they come.
pub(crate) struct RowWriter {
    out: AtomicFile,
    /// CSV needs all rows before it knows its columns.
    csv: Option<Vec<Map<String, Value>>>,
}

impl RowWriter {
    /// Standard output when `None`. A file ending in `.csv` is written as CSV, everything else as JSONL; an output that cannot be
    /// written is an error here, before any work.
    pub(crate) fn create(output: Option<&Path>) -> Result<RowWriter> {
        let extension = output.and_then(Path::extension);
        let is_csv = extension.is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
        let out = output.map_or_else(|| Ok(AtomicFile::stdout()), AtomicFile::create)?;
        Ok(RowWriter { out, csv: is_csv.then(Vec::new) })
    }

    pub(crate) fn write(&mut self, object: &Map<String, Value>) -> Result<()> {
        if let Some(rows) = &mut self.csv {
            rows.push(object.clone());
            return Ok(());
        }
        let mut line = serde_json::to_vec(object).map_err(|error| Error::write(&self.out.path)(error.into()))?;
        line.push(b'\n');
        self.out.write(&line)
    }

    /// Nothing is in the file before this.
    pub(crate) fn finish(mut self) -> Result<()> {
        if let Some(rows) = self.csv {
            let table = table(&rows).map_err(Error::write(&self.out.path))?;
            self.out.write(&table)?;
        }
        self.out.commit()
    }
}

/// A column for every key, in the order of first appearance. Texts stand as they are, other values as JSON.
fn table(rows: &[Map<String, Value>]) -> io::Result<Vec<u8>> {
    let mut columns = Map::new();
    for key in rows.iter().flat_map(Map::keys) {
        columns.entry(key.clone()).or_insert(Value::Null);
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(columns.keys())?;
    for row in rows {
        writer.write_record(columns.keys().map(|key| match row.get(key) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }))?;
    }
    writer.into_inner().map_err(|error| io::Error::other(error.to_string()))
}
