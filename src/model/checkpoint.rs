//! Weights on disk: one safetensors file, or several under an index, mapped into memory. Opening reads headers only and
//! compares every name, dtype and shape with what the config promises; numbers are read, and looked at, on demand.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use half::{f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};
use sha2::{Digest, Sha256};

use super::config::{Head, ModelConfig};
use super::projection::Projection;
use super::readout::{Layout, NORMALIZER};
use crate::error::{Error, Result};
use crate::text::fields::Fields;

#[cfg(test)]
mod tests;

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Bytes of a tensor whose pages are worth giving back.
const LARGE: usize = 1 << 20;
const DTYPES: &str = "F32, F16 or BF16";
pub(super) const NO_TENSOR: &str = "no such tensor";

/// Where a model's numbers come from.
pub trait WeightSource {
    fn shape(&self, name: &str) -> Result<&[usize]>;

    /// Appends the tensor's numbers to `out`, row by row.
    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()>;
}

/// Opened weights. Names are those of transformers' models with a head (`model.layers.0.…`, `lm_head.weight`, `score.weight`),
/// also where the file holds a bare transformer, whose names lack `model.`, or one under another name (`transformer.layers.0.…`).
pub struct Checkpoint {
    shards: Vec<Arc<Shard>>,
    /// Under each name the shard that holds it, and where in that shard.
    tensors: BTreeMap<String, (Arc<Shard>, TensorInfo)>,
    /// What the files put before the transformer's names.
    prefix: String,
}

impl Checkpoint {
    /// Opens the weights in `dir`. Every tensor that `config` promises is there, with its shape, as F32, F16 or BF16; tensors
    /// beyond these are left alone, but for those of a layer that it does not have.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Checkpoint> {
        let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
        let mut found = Checkpoint { shards: Vec::new(), tensors: BTreeMap::new(), prefix: "model.".into() };
        if index.exists() && !single.exists() {
            found.open_shards(dir, &Fields::open(&index)?)?;
        } else {
            // `symlink_metadata` also sees a link into nothing or in a circle: opening it then says what is wrong.
            if single.symlink_metadata().is_err() {
                return Err(no_weights(dir));
            }
            let shard = Arc::new(Shard::open(&single)?);
            found.tensors = shard.tensors().map(|(name, info)| (name, (shard.clone(), info))).collect();
            found.shards.push(shard);
        }
        let mut checkpoint = found.with_canonical_names();
        if config.traits.fused {
            checkpoint.split(config)?;
        }
        let mut settled = config.clone();
        settled.settle_head(&checkpoint)?;
        for (name, shape) in promised(&settled) {
            checkpoint.check(dir, &name, &shape)?;
        }
        // A model cut short by its config would answer, and nobody would know.
        match checkpoint.tensors.keys().find(|name| layer_of(name).is_some_and(|layer| layer >= config.layers)) {
            None => Ok(checkpoint),
            Some(name) => {
                let expected = format!("no layer beyond num_hidden_layers ({})", config.layers);
                Err(wrong(&checkpoint.tensors[name].0.path, name, &expected, "one"))
            }
        }
    }

    fn open_shards(&mut self, dir: &Path, index: &Fields) -> Result<()> {
        let map = index.object("weight_map")?.ok_or_else(|| index.wrong("weight_map", "an object", "no such field"))?;
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in map.iter() {
            let inside = |file: &&str| Path::new(*file).components().all(|part| matches!(part, Component::Normal(_)));
            let file = file.as_str().filter(|file| !file.is_empty()).filter(inside).ok_or_else(|| {
                let remedy = "shards lie in the checkpoint's own folder: correct the index";
                map.refuse(name, "the name of a file inside the folder", &file.to_string(), remedy)
            })?;
            files.entry(file).or_default().push(name);
        }
        if files.is_empty() {
            return Err(index.wrong("weight_map", "at least one tensor and its file", "none"));
        }
        for (file, names) in files {
            let shard = Arc::new(Shard::open(&dir.join(file))?);
            for name in names {
                let lacks = || wrong(&shard.path, name, "a tensor, as the index says", NO_TENSOR);
                let info = shard.header.info(name).ok_or_else(lacks)?.clone();
                self.tensors.insert(name.into(), (shard.clone(), info));
            }
            self.shards.push(shard);
        }
        Ok(())
    }

    /// Puts the parts of each fused matrix, which lie one below the other in the file, into its place.
    fn split(&mut self, config: &ModelConfig) -> Result<()> {
        for layer in 0..config.layers {
            for (path, parts) in Projection::IN_ONE {
                let name = |path: &str| format!("model.layers.{layer}.{path}.weight");
                // What is missing is said of its parts.
                let Some((shard, info)) = self.tensors.remove(&name(path)) else { continue };
                let (rows, cols) = (parts.iter().map(|part| part.shape(config).0).sum::<usize>(), config.hidden_size);
                if info.shape != [rows, cols] {
                    let found = format!("{:?} {}", info.shape, info.dtype);
                    return Err(wrong(&shard.path, &name(path), &format!("{:?}", [rows, cols]), &found));
                }
                let (mut from, to) = info.data_offsets;
                let row = (to - from) / rows;
                for part in parts {
                    let rows = part.shape(config).0;
                    let place = TensorInfo {
                        dtype: info.dtype,
                        shape: vec![rows, cols],
                        data_offsets: (from, from + rows * row),
                    };
                    from += rows * row;
                    self.tensors.insert(name(part.path()), (shard.clone(), place));
                }
            }
        }
        Ok(())
    }

    /// Puts `model.` before the names of the transformer, instead of what the only embedding has there.
    fn with_canonical_names(mut self) -> Checkpoint {
        let mut prefixes = self.tensors.keys().filter_map(|name| name.strip_suffix("embed_tokens.weight"));
        if let (Some(prefix), None) = (prefixes.next(), prefixes.next()) {
            self.prefix = prefix.to_string();
        }
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors.into_iter().map(|(name, place)| (self.canonical(&name), place)).collect();
        self
    }

    /// The name that a tensor called `name` in the files has here.
    pub(super) fn canonical(&self, name: &str) -> String {
        let of_model = |rest: &&str| ["embed_tokens.", "layers.", "norm."].iter().any(|part| rest.starts_with(part));
        match name.strip_prefix(&self.prefix).filter(of_model) {
            Some(rest) => format!("model.{rest}"),
            None => name.to_string(),
        }
    }

    pub(crate) fn shards(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter().map(Arc::as_ref)
    }

    fn check(&self, dir: &Path, name: &str, expected: &[usize]) -> Result<()> {
        let Some((shard, info)) = self.tensors.get(name) else {
            let file = if self.shards.len() == 1 { self.shards[0].path.clone() } else { dir.join(INDEX) };
            return Err(wrong(&file, name, &format!("{expected:?}"), NO_TENSOR));
        };
        let known = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if known && info.shape == expected {
            return Ok(());
        }
        let dtype = if known { info.dtype.to_string() } else { DTYPES.to_string() };
        let found = format!("{:?} {}", info.shape, info.dtype);
        Err(wrong(&shard.path, name, &format!("{expected:?} {dtype}"), &found))
    }

    fn require(&self, name: &str) -> Result<&(Arc<Shard>, TensorInfo)> {
        self.tensors.get(name).ok_or_else(|| wrong(&self.shards[0].path, name, "a tensor", NO_TENSOR))
    }

    pub(crate) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.require(name)?.1.dtype)
    }

    /// All names, sorted; also those that the config does not promise.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Size of all files together.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.map.len() as u64).sum()
    }

    /// The weight files' paths, sorted.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// SHA-256, in hex, over the weight files in the order of their names: the hash of the file itself when there is one.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        self.shards.iter().for_each(|shard| hash.update(&shard.map));
        format!("{:x}", hash.finalize())
    }
}

impl WeightSource for Checkpoint {
    fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.require(name)?.1.shape)
    }

    /// Exact for all three dtypes. NaN or infinity is an error that names the tensor, and leaves `out` as it was.
    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        let (shard, info) = self.require(name)?;
        shard.read(name, info, out)
    }
}

/// One safetensors file: its header is read, its numbers are not, until they are asked for.
pub(crate) struct Shard {
    path: PathBuf,
    /// The whole file.
    map: Mmap,
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

    /// Gives the pages of numbers that have been read back to the system: it has the file, and this process the numbers.
    fn forget(&self, from: usize, to: usize) {
        #[cfg(unix)]
        if to - from >= LARGE {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is of a file and only read: what is asked for again is read again. Best effort.
            let _ = unsafe { self.map.unchecked_advise_range(advice, self.start + from, to - from) };
        }
    }

    /// Its name in the folder.
    pub(super) fn file_name(&self) -> String {
        self.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// A tensor's bytes as they are.
    pub(super) fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (from, to) = info.data_offsets;
        self.map.get(self.start + from..self.start + to).unwrap_or_default()
    }

    pub(super) fn info(&self, name: &str) -> Option<TensorInfo> {
        self.header.info(name).cloned()
    }

    /// The whole file.
    pub(super) fn whole(&self) -> &[u8] {
        &self.map
    }

    /// What the header says under `name` beside the tensors.
    pub(crate) fn note(&self, name: &str) -> Option<String> {
        self.header.metadata().as_ref()?.get(name).cloned()
    }

    /// All tensors with their names, in the order of the file.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (String, TensorInfo)> {
        self.header.offset_keys().into_iter().filter_map(|name| Some((name.clone(), self.header.info(&name)?.clone())))
    }

    /// Appends `info`'s numbers to `out` as f32; fails on the first that is not finite.
    pub(crate) fn read(&self, name: &str, info: &TensorInfo, out: &mut Vec<f32>) -> Result<()> {
        let (from, to) = info.data_offsets;
        let numbers = self.map.get(self.start..).unwrap_or_default();
        let bytes = numbers.get(from..to).ok_or_else(|| refuse(&self.path, "offsets outside the file"))?;
        let before = out.len();
        match info.dtype {
            Dtype::F32 => {
                out.par_extend(bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            }
            Dtype::BF16 => out
                .par_extend(bytes.par_chunks_exact(2).map(|b| f32::from_bits(u32::from_le_bytes([0, 0, b[0], b[1]])))),
            // In pieces that fit the cache: `half` converts slices with the CPU's own instruction, single values without.
            Dtype::F16 => bytes.chunks(8192).for_each(|piece| {
                let halves: Vec<f16> = piece.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
                let from = out.len();
                out.resize(from + halves.len(), 0.0);
                halves.convert_to_f32_slice(&mut out[from..]);
            }),
            other => return Err(wrong(&self.path, name, DTYPES, &other.to_string())),
        }
        self.forget(from, to);
        // All of them first, without a branch per value: that loop becomes vector instructions.
        if out[before..].par_chunks(1 << 16).all(|part| part.iter().fold(true, |finite, x| finite & x.is_finite())) {
            return Ok(());
        }
        let at = out[before..].iter().position(|x| !x.is_finite()).unwrap_or_default();
        let value = out[before + at];
        out.truncate(before);
        Err(Error::NotFinite {
            what: format!("{}: tensor {name}", self.path.display()),
            found: format!("{value} at element {at} of {:?}", info.shape),
            remedy: "the checkpoint is damaged or its training diverged: take an earlier one".into(),
        })
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Every tensor that the config promises, with its shape.
pub(crate) fn promised(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let ModelConfig { vocab_size: v, hidden_size: c, head_dim: d, .. } = *config;
    let mut layer: Vec<(String, Vec<usize>)> = Vec::new();
    for norm in config.norm_names().into_iter().flatten().flatten() {
        layer.push((format!("{norm}.weight"), vec![c]));
    }
    for projection in Projection::ALL {
        let (outputs, inputs) = projection.shape(config);
        layer.push((format!("{}.weight", projection.path()), vec![outputs, inputs]));
        if config.traits.qkv_bias && Projection::FUSED[0].contains(&projection) {
            layer.push((format!("{}.bias", projection.path()), vec![outputs]));
        }
    }
    if config.traits.qk_norm {
        let wide = [Projection::Q, Projection::K].map(|projection| projection.shape(config).0);
        let columns = if config.traits.wide_qk_norm { wide } else { [d; 2] };
        layer.extend(["q", "k"].into_iter().zip(columns).map(|(x, n)| (format!("self_attn.{x}_norm.weight"), vec![n])));
    }
    let mut all = vec![(EMBEDDING.to_string(), vec![v, c])];
    for at in 0..config.layers {
        all.extend(layer.iter().map(|(name, shape)| (format!("model.layers.{at}.{name}"), shape.clone())));
    }
    all.push(("model.norm.weight".into(), vec![c]));
    match config.head {
        Head::Causal if config.tie_word_embeddings => {}
        Head::Causal => all.push(("lm_head.weight".into(), vec![v, c])),
        Head::Classification { labels } => {
            let layout = config.score.layout.as_ref();
            all.extend(layout.map_or_else(|| Layout::plain().promised(labels, c), |layout| layout.promised(labels, c)));
            if config.score.normalizer {
                all.extend(NORMALIZER.map(|name| (name.to_string(), vec![labels])));
            }
        }
    }
    all
}

/// `model.layers.7.…` is of layer 7.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

pub(super) fn wrong(file: &Path, tensor: &str, expected: &str, found: &str) -> Error {
    let [tensor, expected, found] = [tensor, expected, found].map(str::to_string);
    Error::Weights { file: file.to_path_buf(), tensor, expected, found }
}

fn no_weights(dir: &Path) -> Error {
    let others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"];
    let found = others.into_iter().find(|name| dir.join(name).exists()).unwrap_or("neither");
    let expected = format!("{SINGLE}, or {INDEX} with its shards");
    Error::file(dir, &expected, "save the model as safetensors (`save_pretrained` of transformers does)")(found)
}

fn refuse(path: &Path, found: &str) -> Error {
    Error::file(path, "a whole safetensors file", "copy or download the file again")(found)
}

/// The crate's message, with the two lengths that distinguish a truncated file from a foreign one.
fn explain(error: &safetensors::SafeTensorError, bytes: &[u8]) -> String {
    match bytes.first_chunk() {
        Some(head) => format!("{} bytes whose header claims {}: {error}", bytes.len(), u64::from_le_bytes(*head)),
        None => format!("{} bytes: {error}", bytes.len()),
    }
}
