//! Rows from files and from standard input. A line that is no row becomes an error row, or ends the reading with `strict`.

use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::{Format, PROMPT, Row};
use crate::error::{Error, Result};
use crate::text::fields::brief;

/// Bytes of a row. What never ends must not fill the memory.
const LONGEST: u64 = 64 << 20;
/// Bytes of a list of JSON, which is in memory as a whole.
const LONGEST_LIST: u64 = 2 << 30;

/// Rows of a file or of standard input, one after another: no more of it is in memory than what is being read. A list of JSON is
/// the exception.
pub(crate) struct RowReader {
    rows: Box<dyn Iterator<Item = Result<Row>> + Send>,
    /// Bytes read so far, and of how many where that is known.
    read: Arc<AtomicU64>,
    pub(crate) length: Option<u64>,
    /// What every row is taken for, whatever its columns say.
    pub(crate) told: Option<Format>,
}

impl RowReader {
    /// Opens `input`, or standard input. Fails if it cannot be read, and on a list or a header that is none.
    pub(crate) fn open(input: Option<&Path>) -> Result<RowReader> {
        let (name, source, length): (_, Box<dyn Read + Send>, _) = match input {
            Some(path) => {
                let file = File::open(path).map_err(Error::read(path))?;
                let length = file.metadata().ok().filter(Metadata::is_file).map(|found| found.len());
                (path.display().to_string(), Box::new(file), length)
            }
            None => ("standard input".to_string(), Box::new(std::io::stdin()), None),
        };
        RowReader::of(&name, source, length)
    }

    /// Opens a file that holds what one of the name `like` would.
    pub(crate) fn open_as(path: &Path, like: &str) -> Result<RowReader> {
        let file = File::open(path).map_err(Error::read(path))?;
        RowReader::of(like, Box::new(file), None)
    }

    /// The rows of `source`, which is what `name` holds: by its extension, else by what they look like, one JSON object a line, a list
    /// of them, CSV with a header, or one prompt a line.
    fn of(name: &str, source: Box<dyn Read + Send>, length: Option<u64>) -> Result<RowReader> {
        let (file, read) = (Arc::<str>::from(name), Arc::new(AtomicU64::new(0)));
        let failed = |error| Error::read(Path::new(name))(error);
        let mut source = BufReader::new(Counted { source, read: read.clone() });
        let extension = Path::new(name).extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        // The first line that is not blank says what the others are.
        let mut begin = Vec::new();
        while begin.trim_ascii().is_empty() && read_line(&mut source, &mut begin).map_err(failed)? > 0 {
            if begin.starts_with(b"\xef\xbb\xbf") {
                begin.drain(..3);
            }
        }
        let kind = (extension.as_deref(), begin.trim_ascii_start().first().copied());
        let is_csv = looks_like_csv(&begin);
        let source = Cursor::new(begin).chain(source);
        let rows: Box<dyn Iterator<Item = Result<Row>> + Send> = match kind {
            (Some("csv"), _) => Box::new(csv_rows(file, source, b',')?),
            (Some("tsv"), _) => Box::new(csv_rows(file, source, b'\t')?),
            (Some("txt"), _) => Box::new(lines(file, source, plain_line)),
            (Some("jsonl" | "ndjson"), _) | (_, Some(b'{')) => Box::new(lines(file, source, json_line)),
            (_, Some(b'[')) => Box::new(json_list(&file, source)?.into_iter().map(Ok)),
            _ if is_csv => Box::new(csv_rows(file, source, b',')?),
            _ => Box::new(lines(file, source, plain_line)),
        };
        Ok(RowReader { rows, read, length, told: None })
    }

    /// Bytes read so far, shared with whoever shows it.
    pub(crate) fn bytes(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }
}

impl Iterator for RowReader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        Some(self.rows.next()?.map(|row| row.told(self.told)))
    }
}

/// Counts what is read.
struct Counted<R> {
    source: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.source.read(buffer)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Reads all rows of `input`, or of standard input. Fails if it cannot be read, and with `strict` on any bad row.
pub fn read(input: Option<&Path>, strict: bool) -> Result<Vec<Row>> {
    all(RowReader::open(input)?, strict)
}

/// Reads all rows of a file as rows of the list `told`, where that is given. Fails on any bad row.
pub(crate) fn read_told(path: &Path, told: Option<Format>) -> Result<Vec<Row>> {
    let reader = RowReader { told, ..RowReader::open(Some(path))? };
    all(reader, true)
}

/// The rows of `bytes`, which is what `name` holds. Fails as [`read`] does.
#[cfg(test)]
pub(crate) fn parse(name: &str, bytes: &[u8], strict: bool) -> Result<Vec<Row>> {
    all(RowReader::of(name, Box::new(Cursor::new(bytes.to_vec())), None)?, strict)
}

fn all(reader: RowReader, strict: bool) -> Result<Vec<Row>> {
    reader.map(|row| row?.checked(strict)).collect()
}

/// A first line with commas, one of whose columns is called as a prompt is called.
fn looks_like_csv(bytes: &[u8]) -> bool {
    let line = bytes.trim_ascii_start().split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut columns = line.split(',').map(|column| column.trim().trim_matches('"'));
    line.contains(',') && columns.any(|column| PROMPT.contains(&column))
}

/// Every line that is not blank, counted from 1.
fn lines(
    file: Arc<str>,
    mut source: impl BufRead,
    row: fn(&Arc<str>, usize, &[u8]) -> Row,
) -> impl Iterator<Item = Result<Row>> {
    let (mut line, mut at) = (Vec::new(), 0);
    std::iter::from_fn(move || {
        loop {
            line.clear();
            at += 1;
            match read_line(&mut source, &mut line) {
                Ok(0) => return None,
                Ok(_) if line.trim_ascii().is_empty() => {}
                Ok(_) => {
                    let text = line.strip_suffix(b"\n").unwrap_or(&line);
                    return Some(Ok(row(&file, at, text.strip_suffix(b"\r").unwrap_or(text))));
                }
                Err(error) => return Some(Err(Error::read(Path::new(&*file))(error))),
            }
        }
    })
}

/// As `read_until` a line feed, but no further than [`LONGEST`].
fn read_line(source: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<usize> {
    let n = source.take(LONGEST + 1).read_until(b'\n', line)?;
    if n as u64 > LONGEST { Err(too_long("line")) } else { Ok(n) }
}

fn too_long(what: &str) -> std::io::Error {
    std::io::Error::other(format!("a {what} of more than {LONGEST} bytes: this is no file of rows"))
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
fn json_list(file: &Arc<str>, mut source: impl Read) -> Result<Vec<Row>> {
    const REMEDY: &str = "write one JSON object a line (.jsonl), or a list of objects";
    let (path, mut bytes) = (Path::new(&**file), Vec::new());
    source.by_ref().take(LONGEST_LIST + 1).read_to_end(&mut bytes).map_err(Error::read(path))?;
    if bytes.len() as u64 > LONGEST_LIST {
        return Err(Error::file(path, &format!("a list of at most {LONGEST_LIST} bytes"), REMEDY)("a longer one"));
    }
    let list: Vec<Value> =
        serde_json::from_slice(&bytes).map_err(Error::file(path, "a list of JSON objects", REMEDY))?;
    let row = |(at, value)| match value {
        Value::Object(object) => Row::new(file, at + 1, object),
        other => Row::broken(file, at + 1, "a JSON object", brief(&other)),
    };
    Ok(list.into_iter().enumerate().map(row).collect())
}

fn csv_rows(
    file: Arc<str>,
    source: impl Read + Send,
    delimiter: u8,
) -> Result<impl Iterator<Item = Result<Row>> + Send> {
    const REMEDY: &str = "give the columns names: one of them `prompt`";
    let path = Path::new(&*file);
    let recent = Arc::<Mutex<Recent>>::default();
    let source = Remembered { source, recent: recent.clone() };
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(source);
    let header = reader.headers().map_err(Error::file(path, "a CSV file with a header", REMEDY))?.clone();
    let mut names: Vec<&str> = header.iter().collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let found = format!("two columns `{}`", pair[0]);
        return Err(Error::file(path, "columns of different names", REMEDY)(found));
    }
    let mut record = csv::StringRecord::new();
    let line_of = move |position: Option<&csv::Position>| {
        let recent = recent.lock();
        position.zip(recent.ok()).map_or(0, |(position, mut recent)| recent.line_of(position))
    };
    Ok(std::iter::from_fn(move || match reader.read_record(&mut record) {
        Ok(false) => None,
        Ok(true) => Some(Ok(csv_row(&file, line_of(record.position()), &header, &record))),
        Err(error) if error.is_io_error() => Some(Err(Error::read(Path::new(&*file))(error.into()))),
        Err(error) => {
            let line = line_of(error.position());
            Some(Ok(Row::broken(&file, line, "a CSV record", error.to_string())))
        }
    }))
}

/// The bytes that the CSV reader was given and may still be asked about.
#[derive(Default)]
struct Recent {
    begin: u64,
    bytes: Vec<u8>,
}

impl Recent {
    /// The line on which a record begins. Its position lies before the line ends that the reader passes over: the second half of a
    /// CRLF, and blank lines. What lies before it is forgotten.
    fn line_of(&mut self, position: &csv::Position) -> usize {
        let at = position.byte().saturating_sub(self.begin) as usize;
        self.bytes.drain(..at.min(self.bytes.len()));
        self.begin = position.byte();
        let ends = self.bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
        position.line() as usize + ends.filter(|byte| **byte == b'\n').count()
    }
}

struct Remembered<R> {
    source: R,
    recent: Arc<Mutex<Recent>>,
}

impl<R: Read> Read for Remembered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.source.read(buffer)?;
        if let Ok(mut recent) = self.recent.lock() {
            recent.bytes.extend_from_slice(&buffer[..n]);
            if recent.bytes.len() as u64 > LONGEST {
                return Err(too_long("CSV record"));
            }
        }
        Ok(n)
    }
}

fn csv_row(file: &Arc<str>, line: usize, header: &csv::StringRecord, record: &csv::StringRecord) -> Row {
    if record.len() != header.len() {
        let expected = format!("{} columns, as in the header", header.len());
        return Row::broken(file, line, &expected, record.len().to_string());
    }
    let field = |(name, value): (&str, &str)| (name.to_string(), Value::from(value));
    Row::new(file, line, header.iter().zip(record).map(field).collect())
}
