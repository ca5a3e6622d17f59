//! Files that are read whole: a model's configuration, tokenizer and template, and what decides how a run judges.

use std::path::Path;

use crate::error::{Error, Result};

/// Bytes; the largest tokenizers have some twenty million.
const LARGEST: u64 = 256 << 20;

/// Fails unless `path` is a regular file of at most [`LARGEST`] bytes. Asked before it is opened: opening a named pipe would wait
/// for whoever writes to it, and a device never ends.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let found = std::fs::metadata(path).map_err(Error::read(path))?;
    let refuse = |expected: &str, found: String| {
        Err(Error::file(path, expected, "copy it, or download it again, as a plain file")(found))
    };
    if !found.is_file() {
        return refuse("a regular file", if found.is_dir() { "a folder" } else { "a pipe or device" }.to_string());
    }
    if found.len() > LARGEST {
        return refuse(&format!("a file of at most {LARGEST} bytes"), found.len().to_string());
    }
    std::fs::read(path).map_err(Error::read(path))
}

/// Fails as [`read`] does, and on other than UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read(path)?);
    text.map_err(Error::file(path, "UTF-8 text", "save it as UTF-8"))
}
