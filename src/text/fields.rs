//! A JSON object that came from outside, read field by field; every error names the file, the field, what was expected
//! and what was found.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::input::read_text;
use crate::error::{Error, Result};

/// What to do about a wrong field, when nothing better can be said.
const REMEDY: &str = "correct the file, or take it anew from where the model came from";

/// An object of a JSON file. A field that is `null` counts as absent: that is how transformers and PEFT write "not set".
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    pub(crate) file: PathBuf,
    /// Where in the file the object lies, as a prefix of its fields' names: `` or `rope_scaling.`.
    place: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads `file`. Fails unless it holds one JSON object.
    pub(crate) fn open(file: &Path) -> Result<Fields> {
        Fields::parse(file, &read_text(file)?)
    }

    /// Reads `text`, which is what `file` holds; `file` is named in errors only. Fails unless it is one JSON object.
    pub fn parse(file: &Path, text: &str) -> Result<Fields> {
        let value: Value = serde_json::from_str(text).map_err(Error::file(file, "a JSON object", REMEDY))?;
        match value {
            Value::Object(map) => Ok(Fields { file: file.to_path_buf(), place: String::new(), map }),
            other => Err(Error::file(file, "a JSON object", REMEDY)(brief(&other))),
        }
    }

    /// Says whether the field is there, be it null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Gets the field, unless it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter()
    }

    /// Reads a field by `read`. Fails if that refuses the value, which is then not what was `expected`; absent stays absent.
    fn read<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, expected, &brief(value)))
    }

    /// Reads a whole number of at least 1 and at most 2³¹ − 1: sizes multiply without overflow.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        let size = |value: &Value| value.as_u64().filter(|n| (1..=0x7fff_ffff).contains(n));
        self.read(key, "a whole number from 1 to 2147483647", |value| size(value).map(|n| n as usize))
    }

    /// Reads a whole number from 0 on.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number from 0 on", |value| usize::try_from(value.as_u64()?).ok())
    }

    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "a whole number", "no such field"))
    }

    /// Reads a whole number from 0 on, or -1, which some configs write for "none".
    pub(crate) fn token(&self, key: &str) -> Result<Option<u32>> {
        self.read(key, "a token id", token).map(Option::flatten)
    }

    /// Reads a token id or a list of them; empty when absent.
    pub(crate) fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let one = self.get(key).map_or(&[][..], std::slice::from_ref);
        let list = self.get(key).and_then(Value::as_array).map_or(one, Vec::as_slice);
        let id = |value| token(value).ok_or_else(|| self.wrong(key, "a token id", &brief(value)));
        list.iter().map(id).filter_map(Result::transpose).collect()
    }

    /// Reads a finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", |value| value.as_f64().filter(|n| n.is_finite()))
    }

    /// Reads a number above zero, in single precision too.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let holds = |n: &f64| (*n as f32).is_finite() && *n as f32 > 0.0;
        self.read(key, "a number above 0 that f32 holds", |value| value.as_f64().filter(holds))
    }

    /// Reads a flag, false when absent.
    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a text", Value::as_str)
    }

    /// Reads a list of texts; `None` when absent.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.read(key, "a list of texts", |value| {
            value.as_array()?.iter().map(|item| Some(item.as_str()?.to_string())).collect()
        })
    }

    /// Reads an object inside this one; its fields are named `key.field` in errors.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields>> {
        let map = self.read(key, "an object", |value| value.as_object().cloned())?;
        Ok(map.map(|map| Fields { file: self.file.clone(), place: format!("{}{key}.", self.place), map }))
    }

    /// Reports that the field is not what it must be.
    pub(crate) fn wrong(&self, key: &str, expected: &str, found: &str) -> Error {
        self.refuse(key, expected, found, REMEDY)
    }

    /// Reports that the field is not what it must be, with its own remedy.
    pub(crate) fn refuse(&self, key: &str, expected: &str, found: &str, remedy: &str) -> Error {
        Error::File {
            file: self.file.clone(),
            expected: format!("{}{key} to be {expected}", self.place),
            found: found.to_string(),
            remedy: remedy.to_string(),
        }
    }
}

/// Reads a token id, `Some(None)` for -1.
fn token(value: &Value) -> Option<Option<u32>> {
    if value.as_i64() == Some(-1) { Some(None) } else { u32::try_from(value.as_u64()?).ok().map(Some) }
}

/// Shows a value as an error message does: short, on one line.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(60) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}
