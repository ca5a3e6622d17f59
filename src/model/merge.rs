//! An adapter put into its base: W' = W + (lora_alpha / rank)·B·A, written as the folder that transformers opens.

use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{TensorInfo, View};
use safetensors::{Dtype, SafeTensorError};
use serde_json::{Map, Value, json};

use super::adapter_file::AdapterFile;
use super::checkpoint::{Checkpoint, INDEX, Shard};
use super::config::ModelConfig;
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::text::output::{folder_of, write_atomic};

/// In what the merged numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Precision {
    /// Each tensor as the base has it.
    Base,
    F32,
    Bf16,
}

impl Precision {
    fn of(self, base: Dtype) -> Dtype {
        match self {
            Precision::Base => base,
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
        }
    }

    /// As transformers' configs call it; the base's own stays.
    fn name(self) -> Option<&'static str> {
        match self {
            Precision::Base => None,
            Precision::F32 => Some("float32"),
            Precision::Bf16 => Some("bfloat16"),
        }
    }
}

/// What was merged.
pub(crate) struct Done {
    pub(crate) tensors: usize,
    pub(crate) changed: usize,
    /// What was changed is written in less than f32.
    pub(crate) rounded: bool,
}

/// What a merged folder holds beside its weights: what these files say of the base holds of it too.
const BESIDE: [&str; 4] = ["json", "jinja", "txt", "model"];

/// Writes the merged checkpoint into `dir`, which must not be there and appears whole: the base's shards under their names, its config
/// and its tokenizer. Tensor after tensor: no more than one of them is in memory. Fails on files that do not fit each other, and
/// where a number leaves the range of its type.
pub(crate) fn merge(base: &Path, adapter: &Path, precision: Precision, dir: &Path) -> Result<Done> {
    let mut config = ModelConfig::open(base)?;
    let checkpoint = Checkpoint::open(base, &config)?;
    config.settle_head(&checkpoint)?;
    let adapter = AdapterFile::open(adapter, &config)?;
    let changes = |name: &str| change(&adapter, &config, &checkpoint.canonical(name));
    let all = || checkpoint.shards().flat_map(Shard::tensors);
    let done = Done {
        tensors: all().count(),
        changed: all().filter(|(name, _)| changes(name).is_some()).count(),
        rounded: all().any(|(name, info)| changes(&name).is_some() && precision.of(info.dtype) != Dtype::F32),
    };
    folder_of(dir, |staging| {
        let mut map = Map::new();
        let mut total = 0;
        for shard in checkpoint.shards() {
            let file = shard.file_name();
            let fault = Mutex::new(None);
            let tensors: Vec<(String, Merged)> = shard
                .tensors()
                .map(|(name, info)| {
                    let dtype = precision.of(info.dtype);
                    map.insert(name.clone(), file.clone().into());
                    (name.clone(), Merged { shard, change: changes(&name), name, info, dtype, fault: &fault })
                })
                .collect();
            total += tensors.iter().map(|(_, tensor)| tensor.data_len()).sum::<usize>();
            let notes = [("format".to_string(), "pt".to_string())].into();
            let path = staging.join(&file);
            safetensors::serialize_to_file(tensors, Some(notes), &path).map_err(|error| unwritten(&path, error))?;
            if let Some(error) = fault.into_inner().ok().flatten() {
                return Err(error);
            }
        }
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        if checkpoint.shards().count() > 1 {
            write_atomic(&staging.join(INDEX), format!("{index:#}\n").as_bytes())?;
        }
        copy_beside(base, staging, precision)
    })?;
    Ok(done)
}

/// Copies what describes the base; its config says the new type.
fn copy_beside(base: &Path, dir: &Path, precision: Precision) -> Result<()> {
    for entry in fs::read_dir(base).map_err(Error::read(base))? {
        let path = entry.map_err(Error::read(base))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let Some(name) = path.file_name().filter(|_| path.is_file() && BESIDE.contains(&extension)) else { continue };
        if name == INDEX {
            continue;
        }
        let mut bytes = fs::read(&path).map_err(Error::read(&path))?;
        if let Some(dtype) = precision.name().filter(|_| name == "config.json") {
            let mut config: Map<String, Value> =
                serde_json::from_slice(&bytes).map_err(Error::file(&path, "a JSON object", "correct the file"))?;
            let known: Vec<&str> =
                ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
            for key in if known.is_empty() { vec!["dtype"] } else { known } {
                config.insert(key.to_string(), dtype.into());
            }
            bytes = format!("{:#}\n", Value::Object(config)).into_bytes();
        }
        write_atomic(&dir.join(name), &bytes)?;
    }
    Ok(())
}

/// What becomes of one tensor of the base.
enum Change<'a> {
    /// scale·B·A is added to each part, which lie one below the other.
    Lora { parts: Vec<[&'a [f32]; 2]>, rank: usize, scale: f32 },
    /// The adapter has its own.
    Replaced(&'a [f32]),
}

/// What `adapter` does to the tensor of this name, if anything.
fn change<'a>(adapter: &'a AdapterFile, config: &ModelConfig, name: &str) -> Option<Change<'a>> {
    if name == "score.weight" {
        return adapter.score().map(|score| Change::Replaced(&score.data));
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok().filter(|layer| *layer < config.layers)?;
    let path = rest.strip_suffix(".weight")?;
    let one = Projection::IN_ONE.into_iter().find(|(name, _)| config.traits.fused && *name == path);
    let parts = match one {
        Some((_, parts)) => parts.to_vec(),
        None => vec![Projection::ALL.into_iter().find(|projection| projection.path() == path)?],
    };
    let of = |part: Projection| Some(adapter.lora(layer, part)?.map(|matrix| matrix.data.as_slice()));
    let parts = parts.into_iter().map(of).collect::<Option<Vec<_>>>()?;
    Some(Change::Lora { parts, rank: adapter.rank, scale: adapter.scale() })
}

/// A tensor of the merged checkpoint, computed when it is written.
struct Merged<'a> {
    shard: &'a Shard,
    name: String,
    info: TensorInfo,
    change: Option<Change<'a>>,
    dtype: Dtype,
    /// The first that went wrong: writing takes no errors from tensors.
    fault: &'a Mutex<Option<Error>>,
}

impl<'a> Merged<'a> {
    fn bytes(&self) -> Result<Vec<u8>> {
        let mut values = Vec::new();
        self.shard.read(&self.name, &self.info, &mut values)?;
        match &self.change {
            None => {}
            Some(Change::Replaced(own)) => values = own.to_vec(),
            Some(Change::Lora { parts, rank, scale }) => {
                let cols = self.info.shape[1];
                let of = |[a, b]: &[&'a [f32]; 2]| b.chunks_exact(*rank).map(|b| (*a, b)).collect::<Vec<_>>();
                let rows: Vec<_> = parts.iter().flat_map(of).collect();
                values.par_chunks_exact_mut(cols).zip(rows).for_each(|(row, (a, b))| {
                    for (col, value) in row.iter_mut().enumerate() {
                        let terms = b.iter().zip(a.iter().skip(col).step_by(cols));
                        let sum: f64 = terms.map(|(b, a)| f64::from(*b) * f64::from(*a)).sum();
                        *value = (f64::from(*value) + f64::from(*scale) * sum) as f32;
                    }
                });
            }
        }
        let bytes = match self.dtype {
            Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>(),
        };
        let infinite = |x: &f32| match self.dtype {
            Dtype::BF16 => !bf16::from_f32(*x).is_finite(),
            Dtype::F16 => !f16::from_f32(*x).is_finite(),
            _ => !x.is_finite(),
        };
        match values.iter().find(|x| infinite(x)) {
            None => Ok(bytes),
            Some(value) => Err(Error::NotFinite {
                what: format!("{}, merged", self.name),
                found: format!("{value}, which {} does not hold", self.dtype),
                remedy: "write another type: --dtype f32 or bf16".into(),
            }),
        }
    }
}

impl View for Merged<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // What the adapter does not touch keeps its bytes, whatever they are.
        if self.change.is_none() && self.dtype == self.info.dtype {
            return Cow::Borrowed(self.shard.bytes(&self.info));
        }
        Cow::Owned(self.bytes().unwrap_or_else(|error| {
            if let Ok(mut fault) = self.fault.lock() {
                fault.get_or_insert(error);
            }
            vec![0; self.data_len()]
        }))
    }

    fn data_len(&self) -> usize {
        self.info.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

fn unwritten(path: &Path, error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::IoError(error) => Error::write(path)(error),
        other => Error::file(path, "tensors that a safetensors file holds", "please report it: a fault in ares")(other),
    }
}
