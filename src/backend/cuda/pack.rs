//! Compiled kernels in one file, for machines without libnvrtc.
//!
//! A line that names the format, the length of the index, the index as JSON, the images one after the other, a SHA-256 of all
//! that. An entry's key holds the text, the constants and the architecture: a pack of another version of the program is
//! recognised entry by entry.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::Key;
use super::driver::{Arch, Define};
use super::nvrtc::Cubin;
use crate::error::{Error, Result};

const MAGIC: &[u8] = b"ares kernels 1\n";
const CHECKSUM: usize = 32;

#[derive(Debug, Serialize, Deserialize)]
struct Item {
    key: String,
    log: String,
    bytes: usize,
}

/// A pack in memory.
#[derive(Debug, Default)]
pub(crate) struct Pack {
    pub(super) path: PathBuf,
    pub(super) cubins: HashMap<String, Cubin>,
}

/// What identifies compiled code whatever compiler made it.
pub fn key(file: &str, text: &str, defines: &[Define], arch: Arch) -> Key {
    let defines = defines.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
    let label = format!("{}-{arch}", file.trim_end_matches(".cu"));
    Key::new(&label, &[text.as_bytes(), defines.as_bytes(), arch.name().as_bytes()])
}

impl Pack {
    /// The pack in a file.
    pub fn read(path: &Path) -> Result<Pack> {
        Pack::of(path, &fs::read(path).map_err(Error::read(path))?)
    }

    /// The pack that a release carries, compressed by xz.
    pub(super) fn embedded() -> Result<Option<Pack>> {
        let mut bytes = &include_bytes!(concat!(env!("OUT_DIR"), "/kernels.pack.xz"))[..];
        if bytes.is_empty() {
            return Ok(None);
        }
        let (program, mut pack) = (Path::new("the program"), Vec::new());
        let remedy = "install it anew: the kernels that it carries are damaged";
        lzma_rs::xz_decompress(&mut bytes, &mut pack)
            .map_err(|error| Error::file(program, "a whole pack of kernels", remedy)(error))?;
        Pack::of(program, &pack).map(Some)
    }

    fn of(path: &Path, bytes: &[u8]) -> Result<Pack> {
        let remedy = "make it anew with `ares kernels --arch … --pack FILE`";
        let fault = |found| Error::file(path, "a whole pack of kernels", remedy)(found);
        let cubins = parse(bytes).ok_or_else(|| fault("a damaged or another file"))?;
        Ok(Pack { path: path.to_path_buf(), cubins })
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Cubin> {
        self.cubins.get(key.as_str())
    }
}

/// Files of compiled kernels that the program carries: of a release some, of another build none. Fails where they are damaged.
pub(crate) fn carried() -> Result<usize> {
    Ok(Pack::embedded()?.map_or(0, |pack| pack.cubins.len()))
}

/// The bytes of a pack.
pub fn encode(cubins: &[(Key, Cubin)]) -> Vec<u8> {
    let entry = |(key, cubin): &(Key, Cubin)| Item {
        key: key.as_str().to_string(),
        log: cubin.log.clone(),
        bytes: cubin.image.len(),
    };
    let entries: Vec<Item> = cubins.iter().map(entry).collect();
    let index = serde_json::json!(entries).to_string();
    let mut bytes = [MAGIC, &(index.len() as u64).to_le_bytes(), index.as_bytes()].concat();
    cubins.iter().for_each(|(_, cubin)| bytes.extend_from_slice(&cubin.image));
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum);
    bytes
}

/// `None` for anything but a whole pack.
fn parse(bytes: &[u8]) -> Option<HashMap<String, Cubin>> {
    let (body, checksum) = bytes.split_at(bytes.len().checked_sub(CHECKSUM)?);
    let rest = body.strip_prefix(MAGIC)?;
    if Sha256::digest(body).as_slice() != checksum {
        return None;
    }
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let (index, mut images) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let entries: Vec<Item> = serde_json::from_slice(index).ok()?;
    let mut cubins = HashMap::new();
    for entry in entries {
        let (image, rest) = images.split_at_checked(entry.bytes)?;
        images = rest;
        cubins.insert(entry.key, Cubin { image: image.to_vec(), log: entry.log });
    }
    Some(cubins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_found_and_damage_as_well() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all.kernels");
        let cubin = |image: &[u8]| Cubin { image: image.to_vec(), log: "log".into() };
        let keys = [key("a.cu", "text", &[("N", 1)], Arch::Sm80), key("a.cu", "text", &[("N", 2)], Arch::Sm80)];
        let whole = encode(&[(keys[0].clone(), cubin(b"one")), (keys[1].clone(), cubin(b"three"))]);
        fs::write(&path, &whole).unwrap();
        let pack = Pack::read(&path).unwrap();
        assert_eq!(pack.cubins.len(), 2);
        assert_eq!(pack.get(&keys[0]), Some(&cubin(b"one")));
        assert_eq!(pack.get(&keys[1]), Some(&cubin(b"three")));
        for other in [
            key("a.cu", "text", &[("N", 1)], Arch::Sm90a),
            key("a.cu", "other", &[("N", 1)], Arch::Sm80),
            key("a.cu", "text", &[("N", 3)], Arch::Sm80),
        ] {
            assert_eq!(pack.get(&other), None);
        }
        for damage in [0, MAGIC.len() + 3, whole.len() / 2, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[damage] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert!(Pack::read(&path).is_err(), "byte {damage}");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let error = Pack::read(&path).unwrap_err().to_string();
        assert!(error.contains("--pack FILE"), "{error}");
        assert!(Pack::read(folder.path()).is_err());
    }
}
