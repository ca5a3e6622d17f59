//! LoRA adapters on disk in PEFT's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`, f32 in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::checkpoint::{NO_TENSOR, Shard, append, wrong};
use super::config::{Head, ModelConfig};
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::text::fields::Fields;
use crate::text::output::write_folder;

mod config;
#[cfg(test)]
mod tests;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const SCORE: &str = "base_model.model.score.weight";

/// A tensor in host memory, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// `tensors` as a safetensors file in f32; `path` names it where a number is not finite, which is an error.
pub(crate) fn safetensors_bytes(tensors: &BTreeMap<String, HostTensor>, path: &Path) -> Result<Vec<u8>> {
    let broken = |error: safetensors::SafeTensorError| Error::Shape {
        op: "adapter file",
        expected: "data of the tensor's shape".into(),
        found: error.to_string(),
    };
    let mut views = Vec::new();
    for (name, HostTensor { shape, data }) in tensors {
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                what: format!("{}: tensor {name}", path.display()),
                found: format!("{} at element {at}", data[at]),
                remedy: "training diverged: lower the learning rate".into(),
            });
        }
        views.push((name, TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data)).map_err(broken)?));
    }
    safetensors::serialize(views, Some([("format".to_string(), "pt".to_string())].into())).map_err(broken)
}

/// The name of matrix `A` or `B` of a projection's adapter in PEFT's file.
fn matrix_name(layer: usize, projection: Projection, matrix: char) -> String {
    format!("base_model.model.model.layers.{layer}.{}.lora_{matrix}.weight", projection.path())
}

/// An adapter as PEFT saves it. Read ones fit the model they were opened for.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    pub rank: usize,
    pub(crate) lora_alpha: f64,
    /// scale = lora_alpha / √rank instead of lora_alpha / rank.
    pub(crate) use_rslora: bool,
    /// `CAUSAL_LM` or `SEQ_CLS`.
    pub(crate) task_type: String,
    pub(crate) base_model_name: Option<String>,
    /// Under PEFT's names; f32 whatever the file held.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl AdapterFile {
    /// An adapter without matrices yet, for the model of `config`.
    pub(crate) fn new(config: &ModelConfig, rank: usize, lora_alpha: f64) -> AdapterFile {
        let task_type = if config.is_causal() { "CAUSAL_LM" } else { "SEQ_CLS" }.to_string();
        let tensors = BTreeMap::new();
        AdapterFile { rank, lora_alpha, use_rslora: false, task_type, base_model_name: None, tensors }
    }

    /// What the low-rank product is multiplied with.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    /// A (rank, inputs) and B (outputs, rank) of one projection, if the adapter changes it.
    pub fn lora(&self, layer: usize, projection: Projection) -> Option<[&HostTensor; 2]> {
        let find = |matrix| self.tensors.get(&matrix_name(layer, projection, matrix));
        Some([find('A')?, find('B')?])
    }

    /// A (rank, inputs) and B (outputs, rank), row by row, replace those of this projection.
    pub(crate) fn set_lora(&mut self, layer: usize, projection: Projection, a: Vec<f32>, b: Vec<f32>) {
        let rank = self.rank.max(1);
        let shapes = [vec![rank, a.len() / rank], vec![b.len() / rank, rank]];
        for ((matrix, data), shape) in [('A', a), ('B', b)].into_iter().zip(shapes) {
            self.tensors.insert(matrix_name(layer, projection, matrix), HostTensor { shape, data });
        }
    }

    /// The trained score head (labels, C), if the adapter carries one.
    pub fn score(&self) -> Option<&HostTensor> {
        self.tensors.get(SCORE)
    }

    pub(crate) fn set_score(&mut self, labels: usize, data: Vec<f32>) {
        let shape = vec![labels, data.len() / labels.max(1)];
        self.tensors.insert(SCORE.to_string(), HostTensor { shape, data });
    }

    /// The names of the projections that have matrices in some layer, sorted as PEFT sorts them.
    pub(crate) fn target_modules(&self) -> Vec<String> {
        let names = self.tensors.keys().filter_map(|key| key.split(".lora_").next()?.rsplit('.').next());
        let names: BTreeSet<&str> = names.filter(|name| name.ends_with("_proj")).collect();
        names.into_iter().map(str::to_string).collect()
    }

    /// Reads an adapter for the model of `config`: every tensor belongs to a projection (or is the score head) of that model and
    /// has its shape, no projection has A without B, and every number is finite.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<AdapterFile> {
        let mut adapter = config::read(&Fields::open(&dir.join(CONFIG))?)?;
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let remedy = "save the adapter again with a PEFT of version 0.5 or later";
            return Err(Error::file(dir, WEIGHTS, remedy)("adapter_model.bin"));
        }
        let shard = Shard::open(&path)?;
        let mut promised = adapter.promised(config);
        for (name, info) in shard.tensors() {
            let found = format!("{:?} {}", info.shape, info.dtype);
            let Some(shape) = promised.remove(&name) else {
                let expected = "LoRA matrices of this model's layers, and its score head, only";
                return Err(wrong(&path, &name, expected, &found));
            };
            if info.shape != shape {
                return Err(wrong(&path, &name, &format!("{shape:?} (rank {})", adapter.rank), &found));
            }
            let mut data = Vec::with_capacity(shape.iter().product());
            append(&shard, &name, &info, &mut data)?;
            adapter.tensors.insert(name, HostTensor { shape, data });
        }
        adapter.check_pairs(&path)?;
        Ok(adapter)
    }

    /// Every tensor that an adapter of this rank may hold, with its shape.
    fn promised(&self, config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::new();
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let (outputs, inputs) = projection.shape(config);
                all.insert(matrix_name(layer, projection, 'A'), vec![self.rank, inputs]);
                all.insert(matrix_name(layer, projection, 'B'), vec![outputs, self.rank]);
            }
        }
        if let Head::Classification { labels } = config.head {
            all.insert(SCORE.to_string(), vec![labels, config.hidden_size]);
        }
        all
    }

    fn check_pairs(&self, path: &Path) -> Result<()> {
        let twins = |name: &String| [name.replace(".lora_A.", ".lora_B."), name.replace(".lora_B.", ".lora_A.")];
        let missing = self.tensors.keys().flat_map(twins).find(|twin| !self.tensors.contains_key(twin));
        let first = || self.tensors.is_empty().then(|| matrix_name(0, Projection::Q, 'A'));
        let Some(tensor) = missing.or_else(first) else { return Ok(()) };
        Err(wrong(path, &tensor, "both matrices of a pair", NO_TENSOR))
    }

    /// Writes the adapter as PEFT does, in f32, into the folder `dir`, which appears whole or not at all; the files of an
    /// earlier adapter there are replaced one by one.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let weights = safetensors_bytes(&self.tensors, &dir.join(WEIGHTS))?;
        write_folder(dir, &[(WEIGHTS, &weights), (CONFIG, self.config_json().as_bytes())])
    }

    fn config_json(&self) -> String {
        let score = self.score().map(|_| ["classifier", "score"]);
        let alpha = match self.lora_alpha {
            whole if whole.fract() == 0.0 && whole.abs() < 1e15 => json!(whole as i64),
            other => json!(other),
        };
        let config = json!({
            "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": self.base_model_name, "bias": "none",
            "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layer_replication": null,
            "layers_pattern": null, "layers_to_transform": null, "lora_alpha": alpha, "lora_dropout": 0.0,
            "modules_to_save": score, "peft_type": "LORA", "r": self.rank, "rank_pattern": {}, "revision": null,
            "target_modules": self.target_modules(), "task_type": self.task_type, "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        format!("{config:#}\n")
    }
}
