//! Rows from files and from standard input. A line that is no row becomes an error row, or ends the reading with `strict`.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{PROMPT, Row};
use crate::error::{Error, Result};
use crate::text::fields::brief;

/// A first line with commas, one of whose columns is called as a prompt is called.
fn looks_like_csv(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut columns = line.split(',').map(|column| column.trim().trim_matches('"'));
    line.contains(',') && columns.any(|column| PROMPT.contains(&column))
}

/// Reads `input`, or standard input. Fails if it cannot be read, and as [`parse`] does.
pub fn read(input: Option<&Path>, strict: bool) -> Result<Vec<Row>> {
    let mut bytes = Vec::new();
    let name = match input {
        Some(path) => {
            let mut file = std::fs::File::open(path).map_err(Error::read(path))?;
            file.read_to_end(&mut bytes).map_err(Error::read(path))?;
            path.display().to_string()
        }
        None => {
            let name = "standard input";
            std::io::stdin().lock().read_to_end(&mut bytes).map_err(Error::read(Path::new(name)))?;
            name.to_string()
        }
    };
    parse(&name, &bytes, strict)
}

/// The rows of `bytes`, which is what `name` holds: by its extension, else by what they look like, one JSON object a line, a list
/// of them, CSV with a header, or one prompt a line. Fails on a list or a header that is none, and with `strict` on any bad row.
pub fn parse(name: &str, bytes: &[u8], strict: bool) -> Result<Vec<Row>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let file: Arc<str> = name.into();
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    let rows = match (extension.as_deref(), bytes.trim_ascii_start().first()) {
        (Some("csv"), _) => csv_rows(&file, bytes, b',')?,
        (Some("tsv"), _) => csv_rows(&file, bytes, b'\t')?,
        (Some("txt"), _) => lines(&file, bytes, plain_line),
        (Some("jsonl" | "ndjson"), _) | (_, Some(b'{')) => lines(&file, bytes, json_line),
        (_, Some(b'[')) => json_list(&file, bytes)?,
        _ if looks_like_csv(bytes) => csv_rows(&file, bytes, b',')?,
        _ => lines(&file, bytes, plain_line),
    };
    match rows.iter().find_map(Row::fault) {
        Some(error) if strict => Err(error),
        _ => Ok(rows),
    }
}

/// Every line that is not blank, counted from 1.
fn lines(file: &Arc<str>, bytes: &[u8], row: fn(&Arc<str>, usize, &[u8]) -> Row) -> Vec<Row> {
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    let full = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    full.map(|(at, line)| row(file, at + 1, line.strip_suffix(b"\r").unwrap_or(line))).collect()
}

fn json_line(file: &Arc<str>, line: usize, text: &[u8]) -> Row {
    match serde_json::from_slice::<Value>(text) {
        Ok(Value::Object(object)) => Row::new(file, line, object),
        Ok(other) => Row::broken(file, line, "a JSON object", brief(&other)),
        Err(error) => {
            // A parser that sees one line at a time calls every line the first.
            let column = error.column();
            let what = error.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            Row::broken(file, line, "a JSON object", format!("{what} at column {column}"))
        }
    }
}

fn plain_line(file: &Arc<str>, line: usize, text: &[u8]) -> Row {
    match std::str::from_utf8(text) {
        Ok(text) => Row::new(file, line, Map::from_iter([("prompt".to_string(), Value::from(text.trim()))])),
        Err(_) => Row::broken(file, line, "UTF-8 text", "other bytes".into()),
    }
}

/// A list of objects; lines are unknown, so elements are counted instead.
fn json_list(file: &Arc<str>, bytes: &[u8]) -> Result<Vec<Row>> {
    const REMEDY: &str = "write one JSON object a line (.jsonl), or a list of objects";
    let path = Path::new(&**file);
    let list: Vec<Value> =
        serde_json::from_slice(bytes).map_err(Error::file(path, "a list of JSON objects", REMEDY))?;
    let row = |(at, value)| match value {
        Value::Object(object) => Row::new(file, at + 1, object),
        other => Row::broken(file, at + 1, "a JSON object", brief(&other)),
    };
    Ok(list.into_iter().enumerate().map(row).collect())
}

fn csv_rows(file: &Arc<str>, bytes: &[u8], delimiter: u8) -> Result<Vec<Row>> {
    const REMEDY: &str = "give the columns names: one of them `prompt`";
    let path = Path::new(&**file);
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(bytes);
    let header = reader.headers().map_err(Error::file(path, "a CSV file with a header", REMEDY))?.clone();
    let mut names: Vec<&str> = header.iter().collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let found = format!("two columns `{}`", pair[0]);
        return Err(Error::file(path, "columns of different names", REMEDY)(found));
    }
    let mut rows = Vec::new();
    let mut record = csv::StringRecord::new();
    loop {
        match reader.read_record(&mut record) {
            Ok(false) => return Ok(rows),
            Ok(true) => rows.push(csv_row(file, line_of(bytes, record.position()), &header, &record)),
            Err(error) => {
                let line = line_of(bytes, error.position());
                rows.push(Row::broken(file, line, "a CSV record", error.to_string()));
            }
        }
    }
}

/// The line on which a record begins. Its position lies before the line ends that the reader passes over: the second half of a
/// CRLF, and blank lines.
fn line_of(bytes: &[u8], position: Option<&csv::Position>) -> usize {
    let Some(position) = position else { return 0 };
    let rest = bytes.get(position.byte() as usize..).unwrap_or_default();
    let ends = rest.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
    position.line() as usize + ends.filter(|byte| **byte == b'\n').count()
}

fn csv_row(file: &Arc<str>, line: usize, header: &csv::StringRecord, record: &csv::StringRecord) -> Row {
    if record.len() != header.len() {
        let expected = format!("{} columns, as in the header", header.len());
        return Row::broken(file, line, &expected, record.len().to_string());
    }
    let field = |(name, value): (&str, &str)| (name.to_string(), Value::from(value));
    Row::new(file, line, header.iter().zip(record).map(field).collect())
}
