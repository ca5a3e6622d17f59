//! Weights on disk: one safetensors file, or several under an index, mapped into memory. Opening reads headers only and
//! compares every name, dtype and shape with what the config promises; numbers are read, and looked at, on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use sha2::{Digest, Sha256};

use super::config::{Head, ModelConfig};
use crate::error::{Error, Result};
use crate::text::fields::Fields;

mod shard;
#[cfg(test)]
mod tests;

pub(crate) use shard::Shard;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where a model's numbers come from.
pub trait Weights {
    fn shape(&self, name: &str) -> Result<&[usize]>;

    /// Appends the tensor's numbers to `out`, row by row.
    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()>;
}

/// Opened weights. Names are those of transformers' models with a head (`model.layers.0.…`, `lm_head.weight`, `score.weight`),
/// also where the file holds a bare transformer, whose names lack `model.`.
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Name → (shard, name in that shard).
    tensors: BTreeMap<String, (usize, String)>,
}

impl Checkpoint {
    /// Opens the weights in `dir`. Every tensor that `config` promises is there, with its shape, as F32, F16 or BF16; tensors
    /// beyond these are left alone.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Checkpoint> {
        let (index, single) = (dir.join(INDEX), dir.join(SINGLE));
        let found = if index.exists() && !single.exists() {
            Checkpoint::open_sharded(dir, &index)?
        } else {
            // `symlink_metadata` also sees a link into nothing or in a circle: opening it then says what is wrong.
            if single.symlink_metadata().is_err() {
                return Err(no_weights(dir));
            }
            let shard = Shard::open(&single)?;
            let tensors = shard.names().into_iter().map(|name| (name.clone(), (0, name))).collect();
            Checkpoint { shards: vec![shard], tensors }
        };
        let checkpoint = found.with_canonical_names();
        for (name, shape) in promised(config) {
            checkpoint.check(dir, &name, &shape)?;
        }
        Ok(checkpoint)
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Checkpoint> {
        let fields = Fields::open(index)?;
        let map =
            fields.object("weight_map")?.ok_or_else(|| fields.wrong("weight_map", "an object", "no such field"))?;
        let mut home = BTreeMap::new();
        for (name, file) in map.iter() {
            let inside = |file: &&str| Path::new(*file).components().all(|part| matches!(part, Component::Normal(_)));
            let file = file.as_str().filter(|file| !file.is_empty()).filter(inside).ok_or_else(|| {
                let remedy = "shards lie in the checkpoint's own folder: correct the index";
                map.refuse(name, "the name of a file inside the folder", &file.to_string(), remedy)
            })?;
            home.insert(name.clone(), file.to_string());
        }
        let files: BTreeSet<String> = home.values().cloned().collect();
        let files: Vec<String> = files.into_iter().collect();
        let shards = files.iter().map(|file| Shard::open(&dir.join(file))).collect::<Result<Vec<_>>>()?;
        let mut tensors = BTreeMap::new();
        for (name, file) in home {
            let at = files.partition_point(|other| *other < file);
            if shards[at].info(&name).is_none() {
                return Err(missing(shards[at].path(), &name, "a tensor, as the index says"));
            }
            tensors.insert(name.clone(), (at, name));
        }
        Ok(Checkpoint { shards, tensors })
    }

    /// Puts `model.` before the names of a bare transformer.
    fn with_canonical_names(mut self) -> Checkpoint {
        if !self.tensors.contains_key(EMBEDDING) && self.tensors.contains_key("embed_tokens.weight") {
            let bare = ["embed_tokens.", "layers.", "norm."];
            let rename =
                |name: String| if bare.iter().any(|b| name.starts_with(b)) { format!("model.{name}") } else { name };
            self.tensors = self.tensors.into_iter().map(|(name, place)| (rename(name), place)).collect();
        }
        self
    }

    fn check(&self, dir: &Path, name: &str, expected: &[usize]) -> Result<()> {
        let Some((shard, info)) = self.find(name) else {
            let file = if self.shards.len() == 1 { self.shards[0].path().to_path_buf() } else { dir.join(INDEX) };
            return Err(missing(&file, name, &shape_text(expected)));
        };
        let known = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if known && info.shape == expected {
            return Ok(());
        }
        let dtype = if known { info.dtype.to_string() } else { "F32, F16 or BF16".to_string() };
        Err(Error::Weights {
            file: shard.path().to_path_buf(),
            tensor: name.to_string(),
            expected: format!("{} {dtype}", shape_text(expected)),
            found: format!("{} {}", shape_text(&info.shape), info.dtype),
        })
    }

    fn find(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let (shard, inner) = self.tensors.get(name)?;
        let shard = self.shards.get(*shard)?;
        Some((shard, shard.info(inner)?))
    }

    fn require(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        self.find(name).ok_or_else(|| missing(self.shards[0].path(), name, "a tensor"))
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
        self.shards.iter().map(|shard| shard.bytes().len() as u64).sum()
    }

    /// The weight files' paths, sorted.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(Shard::path)
    }

    /// SHA-256, in hex, over the weight files in the order of their names: the hash of the file itself when there is one.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        self.shards.iter().for_each(|shard| hash.update(shard.bytes()));
        crate::text::output::hex(&hash.finalize())
    }
}

impl Weights for Checkpoint {
    fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.require(name)?.1.shape)
    }

    /// Exact for all three dtypes. NaN or infinity is an error that names the tensor, and leaves `out` as it was.
    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        let (shard, info) = self.require(name)?;
        append(shard, name, info, out)
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Every tensor that the config promises, with its shape.
pub(crate) fn promised(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let ModelConfig { vocab_size: v, hidden_size: c, intermediate_size: f, head_dim: d, .. } = *config;
    let (q, kv) = (config.heads * d, config.kv_heads * d);
    let mut layer = vec![
        ("input_layernorm.weight", vec![c]),
        ("self_attn.q_proj.weight", vec![q, c]),
        ("self_attn.k_proj.weight", vec![kv, c]),
        ("self_attn.v_proj.weight", vec![kv, c]),
        ("self_attn.o_proj.weight", vec![c, q]),
        ("post_attention_layernorm.weight", vec![c]),
        ("mlp.gate_proj.weight", vec![f, c]),
        ("mlp.up_proj.weight", vec![f, c]),
        ("mlp.down_proj.weight", vec![c, f]),
    ];
    if config.qkv_bias {
        layer.push(("self_attn.q_proj.bias", vec![q]));
        layer.push(("self_attn.k_proj.bias", vec![kv]));
        layer.push(("self_attn.v_proj.bias", vec![kv]));
    }
    if config.qk_norm {
        layer.extend([("self_attn.q_norm.weight", vec![d]), ("self_attn.k_norm.weight", vec![d])]);
    }
    let mut all = vec![(EMBEDDING.to_string(), vec![v, c])];
    for at in 0..config.layers {
        all.extend(layer.iter().map(|(name, shape)| (format!("model.layers.{at}.{name}"), shape.clone())));
    }
    all.push(("model.norm.weight".into(), vec![c]));
    match config.head {
        Head::Causal if config.tie_word_embeddings => {}
        Head::Causal => all.push(("lm_head.weight".into(), vec![v, c])),
        Head::Classification { labels } => all.push(("score.weight".into(), vec![labels, c])),
    }
    all
}

/// Converts `info`'s numbers to f32 behind `out`, and fails on the first that is not finite.
pub(crate) fn append(shard: &Shard, name: &str, info: &TensorInfo, out: &mut Vec<f32>) -> Result<()> {
    let bytes = shard.data(info)?;
    let before = out.len();
    match info.dtype {
        Dtype::F32 => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Dtype::BF16 => {
            out.extend(
                bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)),
            );
        }
        Dtype::F16 => append_f16(bytes, out),
        other => {
            return Err(Error::Weights {
                file: shard.path().to_path_buf(),
                tensor: name.to_string(),
                expected: "F32, F16 or BF16".into(),
                found: other.to_string(),
            });
        }
    }
    let Some(at) = first_not_finite(&out[before..]) else { return Ok(()) };
    let value = out[before + at];
    out.truncate(before);
    Err(Error::NotFinite {
        what: format!("{}: tensor {name}", shard.path().display()),
        found: format!("{value} at element {at} of {}", shape_text(&info.shape)),
        remedy: "the checkpoint is damaged or its training diverged: take an earlier one".into(),
    })
}

/// In pieces that fit the cache: `half` converts slices with the CPU's own instruction, single values without.
fn append_f16(bytes: &[u8], out: &mut Vec<f32>) {
    const PIECE: usize = 4096;
    let mut halves = Vec::with_capacity(PIECE);
    for piece in bytes.chunks(2 * PIECE) {
        halves.clear();
        halves.extend(piece.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]])));
        let from = out.len();
        out.resize(from + halves.len(), 0.0);
        halves.convert_to_f32_slice(&mut out[from..]);
    }
}

fn first_not_finite(values: &[f32]) -> Option<usize> {
    // Whole pieces first, without a branch per value: this loop becomes vector instructions.
    const PIECE: usize = 1024;
    let bad = values.chunks(PIECE).position(|piece| piece.iter().fold(false, |bad, x| bad | !x.is_finite()))?;
    let from = bad * PIECE;
    values[from..].iter().position(|x| !x.is_finite()).map(|at| from + at)
}

fn shape_text(shape: &[usize]) -> String {
    format!("{shape:?}")
}

fn missing(file: &Path, tensor: &str, expected: &str) -> Error {
    Error::Weights {
        file: file.to_path_buf(),
        tensor: tensor.to_string(),
        expected: expected.to_string(),
        found: "no such tensor".into(),
    }
}

fn no_weights(dir: &Path) -> Error {
    let others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"];
    let found = others.into_iter().find(|name| dir.join(name).exists()).unwrap_or("neither");
    Error::File {
        file: PathBuf::from(dir),
        expected: format!("{SINGLE}, or {INDEX} with its shards"),
        found: found.into(),
        remedy: "save the model as safetensors (`save_pretrained` of transformers does)".into(),
    }
}
