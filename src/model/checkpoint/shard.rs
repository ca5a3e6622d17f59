//! One safetensors file, mapped into memory: its header is read, its numbers are not, until they are asked for.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};

use crate::error::{Error, Result};

const EXPECTED: &str = "a whole safetensors file";
const REMEDY: &str = "copy or download the file again";

pub(crate) struct Shard {
    pub(super) path: PathBuf,
    /// The whole file.
    pub(super) map: Mmap,
    header: Metadata,
    /// Where in the file the numbers begin.
    start: usize,
}

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Shard> {
        let found = std::fs::metadata(path).map_err(Error::read(path))?;
        // Asked before opening: opening a named pipe would wait forever.
        if !found.is_file() {
            return Err(refuse(path, "no regular file"));
        }
        if found.len() == 0 {
            return Err(refuse(path, "an empty file"));
        }
        let file = File::open(path).map_err(Error::read(path))?;
        // SAFETY: the map is only read. A file that another process shortens meanwhile ends this process by a signal, as with
        // every mmap; checkpoints are written whole and renamed, never shortened in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read(path))?;
        let (length, header) =
            SafeTensors::read_metadata(&map).map_err(|error| refuse(path, &explain(&error, &map)))?;
        let start = size_of::<u64>() + length;
        // The crate sums up sizes without looking for overflow; this keeps every later slice inside the file.
        if header.data_len().checked_add(start) != Some(map.len()) {
            return Err(refuse(path, &format!("{} bytes, which its header does not describe", map.len())));
        }
        Ok(Shard { path: path.to_path_buf(), map, header, start })
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// All tensors with their names, in the order of the file.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (String, TensorInfo)> {
        self.header.offset_keys().into_iter().filter_map(|name| Some((name.clone(), self.info(&name)?.clone())))
    }

    /// The tensor's bytes, little-endian, row by row.
    pub(crate) fn data(&self, info: &TensorInfo) -> Result<&[u8]> {
        let (from, to) = info.data_offsets;
        let numbers = self.map.get(self.start..).unwrap_or_default();
        numbers.get(from..to).ok_or_else(|| refuse(&self.path, "offsets outside the file"))
    }
}

fn refuse(path: &Path, found: &str) -> Error {
    Error::File { file: path.to_path_buf(), expected: EXPECTED.into(), found: found.to_string(), remedy: REMEDY.into() }
}

/// The crate's message, with the two lengths that distinguish a truncated file from a foreign one.
fn explain(error: &safetensors::SafeTensorError, bytes: &[u8]) -> String {
    match bytes.first_chunk() {
        Some(head) => format!("{} bytes whose header claims {}: {error}", bytes.len(), u64::from_le_bytes(*head)),
        None => format!("{} bytes: {error}", bytes.len()),
    }
}
