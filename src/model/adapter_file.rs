//! LoRA adapters on disk in PEFT's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`, f32 in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::checkpoint::{NO_TENSOR, Shard, wrong};
use super::config::ModelConfig;
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::text::fields::{Fields, brief};
use crate::text::output::write_folder;

mod fused;
mod targets;
#[cfg(test)]
mod tests;

use targets::Targets;

const CONFIG: &str = "adapter_config.json";
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
const SCORE: &str = "base_model.model.score.weight";

/// A tensor in host memory, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Tensors under their names.
pub(crate) type HostTensors = BTreeMap<String, HostTensor>;

/// Writes `tensors` as a safetensors file in f32, with `notes` in its header; `path` names it where a number is not finite, which
/// is an error.
pub(crate) fn safetensors_bytes(tensors: &HostTensors, notes: &[(&str, String)], path: &Path) -> Result<Vec<u8>> {
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
    let notes = notes.iter().map(|(name, note)| (name.to_string(), note.clone()));
    safetensors::serialize(views, Some(notes.chain([("format".to_string(), "pt".to_string())]).collect()))
        .map_err(broken)
}

/// Reads a safetensors file and the note of this name in its header. Fails where one of them is missing or a number is not finite.
pub(crate) fn read_safetensors(path: &Path, note: &str) -> Result<(HostTensors, String)> {
    let (shard, mut tensors) = (Shard::open(path)?, HostTensors::new());
    for (name, info) in shard.tensors() {
        let mut data = Vec::new();
        shard.read(&name, &info, &mut data)?;
        tensors.insert(name, HostTensor { shape: info.shape, data });
    }
    let remedy = "restore the file, or delete it: what it holds is computed again";
    let lacks = || Error::file(path, &format!("a header with `{note}`"), remedy)("none");
    Ok((tensors, shard.note(note).ok_or_else(lacks)?))
}

/// The name of matrix `A` or `B` of a projection's adapter in PEFT's file.
fn matrix_name(layer: usize, projection: Projection, of: char) -> String {
    matrix(layer, projection.path(), of)
}

fn matrix(layer: usize, path: &str, of: char) -> String {
    format!("base_model.model.model.layers.{layer}.{path}.lora_{of}.weight")
}

/// The path, below the model, of the module whose matrix is called `name`.
fn path(name: &str) -> &str {
    let end = name.find(".lora_").unwrap_or(name.len());
    name[..end].strip_prefix("base_model.model.").unwrap_or(&name[..end])
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
    /// Its files hold q∣k∣v as one matrix, and gate∣up.
    pub(crate) fused: bool,
    /// Under PEFT's names; f32 whatever the file held.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl AdapterFile {
    /// An adapter without matrices yet, for the model of `config`.
    pub(crate) fn new(config: &ModelConfig, rank: usize, lora_alpha: f64) -> AdapterFile {
        let task_type = if config.is_causal() { "CAUSAL_LM" } else { "SEQ_CLS" }.to_string();
        let (fused, tensors) = (config.traits.fused, BTreeMap::new());
        AdapterFile { rank, lora_alpha, use_rslora: false, task_type, base_model_name: None, fused, tensors }
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
        Self::modules(&self.tensors)
    }

    fn modules(tensors: &HostTensors) -> Vec<String> {
        let names = tensors.keys().filter_map(|key| key.split(".lora_").next()?.rsplit('.').next());
        let names: BTreeSet<&str> = names.filter(|name| name.ends_with("_proj")).collect();
        names.into_iter().map(str::to_string).collect()
    }

    /// Reads an adapter for the model of `config`: every tensor belongs to a projection (or is the score head) of that model and
    /// has its shape, no projection has A without B, and every number is finite.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<AdapterFile> {
        let fields = Fields::open(&dir.join(CONFIG))?;
        let mut adapter = read(&fields)?;
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let remedy = "save the adapter again with a PEFT of version 0.5 or later";
            return Err(Error::file(dir, WEIGHTS, remedy)("adapter_model.bin"));
        }
        let shard = Shard::open(&path)?;
        let targets = Targets::read(&fields)?;
        let mut promised = adapter.promised(config, &targets);
        promised.keys().filter(|name| *name != SCORE).try_for_each(|name| targets.decide(self::path(name)))?;
        for (name, info) in shard.tensors() {
            let found = format!("{:?} {}", info.shape, info.dtype);
            let Some(shape) = promised.remove(&name) else {
                let expected = "LoRA matrices of this model's layers, and its score head, only";
                return Err(wrong(&path, &name, expected, &found));
            };
            if info.shape != shape {
                return Err(wrong(&path, &name, &format!("{shape:?} (by the adapter's rank)"), &found));
            }
            if name != SCORE {
                targets.check(self::path(&name))?;
            }
            let mut data = Vec::with_capacity(shape.iter().product());
            shard.read(&name, &info, &mut data)?;
            adapter.tensors.insert(name, HostTensor { shape, data });
        }
        adapter.check_pairs(&path)?;
        let rank = adapter.rank;
        adapter.unify(&targets);
        adapter.fused = config.traits.fused;
        if adapter.fused {
            adapter.split(config, rank);
        }
        Ok(adapter)
    }

    /// Every tensor that an adapter of this rank may hold, with its shape.
    fn promised(&self, config: &ModelConfig, targets: &Targets) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::new();
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let (outputs, inputs) = projection.shape(config);
                let [a, b] = ['A', 'B'].map(|matrix| matrix_name(layer, projection, matrix));
                let (rank, _) = self.own(targets, path(&a));
                all.insert(a, vec![rank, inputs]);
                all.insert(b, vec![outputs, rank]);
            }
        }
        if config.traits.fused {
            self.fuse_promises(config, targets, &mut all);
        }
        if config.has_plain_head() {
            all.insert(SCORE.to_string(), vec![config.labels(), config.hidden_size]);
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

    /// Gives all matrices one rank and one scale, where `rank_pattern` or `alpha_pattern` gave some their own: zeros fill up A and B, and
    /// what differs of the scale goes into B. The products stay the same.
    fn unify(&mut self, targets: &Targets) {
        let names: Vec<String> = self.tensors.keys().filter(|name| name.contains(".lora_B.")).cloned().collect();
        let own: Vec<(usize, f64)> = names.iter().map(|name| self.own(targets, path(name))).collect();
        let scale =
            |(rank, alpha): (usize, f64)| alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        if own.iter().all(|own| *own == (self.rank, self.lora_alpha)) {
            return;
        }
        let widest = own.iter().map(|(rank, _)| *rank).max().unwrap_or(self.rank);
        for (name, factor) in names.iter().zip(own.iter().map(|own| scale(*own)).collect::<Vec<_>>()) {
            if let Some(a) = self.tensors.get_mut(&name.replace(".lora_B.", ".lora_A.")) {
                a.data.resize(widest * a.shape[1], 0.0);
                a.shape[0] = widest;
            }
            if let Some(b) = self.tensors.get_mut(name) {
                let wide = |row: &[f32]| {
                    let scaled = row.iter().map(|x| (f64::from(*x) * factor) as f32);
                    scaled.chain(std::iter::repeat(0.0)).take(widest).collect::<Vec<_>>()
                };
                b.data = b.data.chunks_exact(b.shape[1]).flat_map(wide).collect();
                b.shape[1] = widest;
            }
        }
        (self.rank, self.lora_alpha, self.use_rslora) = (widest, widest as f64, false);
    }

    /// Rank and alpha of the module at `path`.
    fn own(&self, targets: &Targets, path: &str) -> (usize, f64) {
        (targets.rank(path).unwrap_or(self.rank), targets.alpha(path).unwrap_or(self.lora_alpha))
    }

    /// Writes the adapter as PEFT does, in f32, into the folder `dir`, which appears whole or not at all; the files of an
    /// earlier adapter there are replaced one by one.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let joined = self.fused.then(|| self.joined());
        let tensors = joined.as_ref().unwrap_or(&self.tensors);
        let weights = safetensors_bytes(tensors, &[], &dir.join(WEIGHTS))?;
        write_folder(dir, &[(WEIGHTS, &weights), (CONFIG, self.config_json(tensors).as_bytes())])
    }

    fn config_json(&self, tensors: &HostTensors) -> String {
        let [rank_pattern, alpha_pattern] = if self.fused { self.patterns() } else { [json!({}), json!({})] };
        let score = self.score().map(|_| ["classifier", "score"]);
        let alpha = match self.lora_alpha {
            whole if whole.fract() == 0.0 && whole.abs() < 1e15 => json!(whole as i64),
            other => json!(other),
        };
        let config = json!({
            "alpha_pattern": alpha_pattern, "auto_mapping": null, "base_model_name_or_path": self.base_model_name, "bias": "none",
            "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layer_replication": null,
            "layers_pattern": null, "layers_to_transform": null, "lora_alpha": alpha, "lora_dropout": 0.0,
            "modules_to_save": score, "peft_type": "LORA", "r": self.rank, "rank_pattern": rank_pattern, "revision": null,
            "target_modules": Self::modules(tensors), "task_type": self.task_type, "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        format!("{config:#}\n")
    }
}

/// What ares applies exactly as PEFT does is read, everything else is refused with its reason.
const REMEDY: &str = "merge this adapter into its base with PEFT (`merge_and_unload`), and open the merged checkpoint";

/// The adapter without its tensors.
fn read(fields: &Fields) -> Result<AdapterFile> {
    refuse_unsupported(fields)?;
    let lora_alpha = fields.positive("lora_alpha")?;
    let task_type = fields.text("task_type")?.unwrap_or("CAUSAL_LM").to_string();
    if !matches!(task_type.as_str(), "CAUSAL_LM" | "SEQ_CLS") {
        return Err(fields.refuse("task_type", "CAUSAL_LM or SEQ_CLS", &task_type, "ares has no other heads"));
    }
    Ok(AdapterFile {
        rank: fields.required_size("r")?,
        lora_alpha: lora_alpha.ok_or_else(|| fields.wrong("lora_alpha", "a number above 0", "no such field"))?,
        use_rslora: fields.flag("use_rslora")?,
        task_type,
        base_model_name: fields.text("base_model_name_or_path")?.map(str::to_string),
        fused: false,
        tensors: BTreeMap::new(),
    })
}

fn refuse_unsupported(fields: &Fields) -> Result<()> {
    let kind = fields.text("peft_type")?.unwrap_or("none");
    if kind != "LORA" {
        return Err(fields.refuse("peft_type", "LORA", kind, REMEDY));
    }
    let bias = fields.text("bias")?.unwrap_or("none");
    if bias != "none" {
        return Err(fields.refuse("bias", "`none` (the base stays frozen)", &format!("`{bias}`"), REMEDY));
    }
    for (flag, meaning) in [
        ("use_dora", "DoRA also trains magnitudes"),
        ("fan_in_fan_out", "the matrices are transposed"),
        ("lora_bias", "biases beside B"),
        ("use_qalora", "pooled inputs"),
        ("use_bdlora", "block-diagonal matrices"),
    ] {
        if fields.flag(flag)? {
            return Err(fields.refuse(flag, "false", &format!("true ({meaning})"), REMEDY));
        }
    }
    let parts = ["layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"];
    for key in parts.into_iter().chain(["arrow_config", "kasa_config", "monteclora_config"]) {
        if let Some(value) = fields.get(key) {
            return Err(fields.refuse(key, "absent", &brief(value), REMEDY));
        }
    }
    // PiSSA and its kin move part of the base's weights into the adapter: without that changed base the adapter is wrong.
    match fields.get("init_lora_weights").and_then(Value::as_str) {
        None | Some("gaussian" | "eva" | "orthogonal") => Ok(()),
        Some(other) => {
            let found = format!("`{other}`, which changes the base's weights too");
            Err(fields.refuse("init_lora_weights", "one that leaves the base as it is", &found, REMEDY))
        }
    }
}
