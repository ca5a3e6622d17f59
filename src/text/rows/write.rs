//! Rows out: JSONL or CSV. A file grows beside its name, as `FILE.part`, and takes the name when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::read::RowReader;
use crate::error::{Error, Result};
use crate::text::output::{AtomicFile, folder, sweep, sync, target, whole_lines};

/// Writes rows in the order in which they come.
pub(crate) struct RowWriter {
    /// For messages, and what the part is called in the end.
    path: PathBuf,
    out: BufWriter<Box<dyn Write>>,
    /// `None` for what is no regular file: standard output, a pipe, `/dev/null`. Such a thing is written directly.
    part: Option<File>,
}

impl RowWriter {
    /// Standard output when `None`. A file ending in `.csv` becomes CSV, everything else JSONL. Fails, before any work, where it cannot
    /// be written, and where an earlier part lies.
    pub(crate) fn create(output: Option<&Path>) -> Result<RowWriter> {
        let Some(path) = output else {
            let (path, out) = ("standard output".into(), BufWriter::new(Box::new(io::stdout()) as Box<dyn Write>));
            return Ok(RowWriter { path, out, part: None });
        };
        if path.file_name().is_none() || path.is_dir() {
            return Err(Error::Usage(format!("{}: expected the path of a file, found a folder", path.display())));
        }
        let path = target(path)?;
        sweep(folder(&path));
        let earlier = fs::metadata(&path).ok();
        if earlier.as_ref().is_some_and(|found| !found.is_file()) {
            let out = BufWriter::new(Box::new(File::create(&path).map_err(Error::write(&path))?) as Box<dyn Write>);
            return Ok(RowWriter { path, out, part: None });
        }
        let part = part_of(&path);
        let file =
            OpenOptions::new().append(true).create_new(true).open(&part).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    let why = "found what an earlier run has done; go on with --resume, or delete it";
                    Error::Usage(format!("{}: {why}", part.display()))
                }
                _ => Error::write(&path)(error),
            })?;
        if let Some(earlier) = earlier {
            file.set_permissions(earlier.permissions()).map_err(Error::write(&part))?;
        }
        RowWriter::append(path, file)
    }

    /// Goes on with the part of `output`, whose rows come with it; `None` where there is none. A torn last line is cut off. Fails where
    /// another process writes it.
    pub(crate) fn resume(output: &Path) -> Result<Option<(RowWriter, RowReader)>> {
        let path = target(output)?;
        let part = part_of(&path);
        if !part.is_file() {
            return Ok(None);
        }
        let file = OpenOptions::new().read(true).append(true).open(&part).map_err(Error::write(&part))?;
        let writer = RowWriter::append(path, file)?;
        let file = writer.part.as_ref().map(File::try_clone).transpose().map_err(Error::read(&part))?;
        let whole = file.map_or(Ok(()), |file| whole_lines(&file).and_then(|(_, whole)| file.set_len(whole)));
        whole.map_err(Error::write(&part))?;
        let rows = RowReader::open_as(&part, "part.jsonl")?;
        Ok(Some((writer, rows)))
    }

    fn append(path: PathBuf, file: File) -> Result<RowWriter> {
        let place = part_of(&path);
        if file.try_lock().is_err() {
            return Err(Error::Busy { path: place, holder: "an unknown process".into() });
        }
        let out = file.try_clone().map_err(Error::write(&place))?;
        Ok(RowWriter { path, out: BufWriter::new(Box::new(out)), part: Some(file) })
    }

    pub(crate) fn write(&mut self, object: &Map<String, Value>) -> Result<()> {
        let place = self.place();
        let line = serde_json::to_vec(object).map_err(|error| Error::write(&place)(error.into()))?;
        self.out.write_all(&line).and_then(|()| self.out.write_all(b"\n")).map_err(Error::write(&place))
    }

    /// What was written is where a reader finds it, and survives this process.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(Error::write(&self.place()))
    }

    /// Whether the rows lie in a part until the end.
    pub(crate) fn is_part(&self) -> bool {
        self.part.is_some()
    }

    /// Where the rows are until the end: the part, or what is written directly.
    pub(crate) fn place(&self) -> PathBuf {
        if self.part.is_some() { part_of(&self.path) } else { self.path.clone() }
    }

    /// Gives the part its name, as CSV where that ends in `.csv`. Fails, and leaves the part, where it cannot.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.flush()?;
        let Some(file) = &self.part else { return Ok(()) };
        let (part, path) = (part_of(&self.path), &self.path);
        let kept = |error| Error::write(path)(error);
        file.sync_all().map_err(kept)?;
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
            table(&part, path)?;
            return fs::remove_file(&part).map_err(Error::write(&part));
        }
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::rename(&part, path).and_then(|()| sync(folder)).map_err(kept)
    }

    /// Removes a part in which nothing was written. Best effort.
    pub(crate) fn discard(self) {
        if self.part.is_some() {
            let _ = fs::remove_file(part_of(&self.path));
        }
    }
}

/// `out.jsonl` → `out.jsonl.part`.
fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Rows of JSON as CSV, read twice: a column for every key, in the order of first appearance. Texts stand as they are, other values as
/// JSON.
fn table(part: &Path, path: &Path) -> Result<()> {
    let mut columns = Map::new();
    for row in RowReader::open_as(part, "part.jsonl")? {
        for key in row?.object.keys() {
            columns.entry(key.clone()).or_insert(Value::Null);
        }
    }
    let mut file = AtomicFile::create(path)?;
    let failed = |error: csv::Error| Error::write(path)(io::Error::other(error.to_string()));
    let mut writer = csv::Writer::from_writer(&mut file);
    writer.write_record(columns.keys()).map_err(failed)?;
    for row in RowReader::open_as(part, "part.jsonl")? {
        let row = row?.object;
        let fields = columns.keys().map(|key| match row.get(key) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        });
        writer.write_record(fields).map_err(failed)?;
    }
    writer.flush().map_err(Error::write(path))?;
    drop(writer);
    file.commit()
}
