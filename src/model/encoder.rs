//! Encoders with a classifier's head, forward only: they read a text both ways, and a judge asks them about answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use self::bert::Bert;
use self::modern::Modern;
use super::batch::{AnswerTokens, Batch, DeviceBatch, Heads};
use super::checkpoint::{Shard, wrong};
use super::config::label_names;
use super::pretrained::fill;
use crate::backend::Tensor;
use crate::error::{Error, Result};
use crate::ops::gate_up::naive;
use crate::ops::{Activation, AttentionSpec, LayerNormForward, LinearWeights, Ops};
use crate::text::fields::Fields;
use crate::text::rendering::Rendered;
use crate::text::{IdLimits, Rendering};

mod bert;
mod modern;

const NOT_COMPUTED: &str = "ares does not compute this: use a checkpoint without it";

/// The classes that are read.
pub(crate) fn classes() -> impl Iterator<Item = &'static str> {
    bert::FAMILIES.iter().map(|family| family.class).chain([modern::CLASS])
}

/// Width, features of the feed-forward, heads and layers, as the config calls them.
fn sizes(fields: &Fields, keys: [&str; 4]) -> Result<[usize; 4]> {
    let [width, features, heads, layers] = keys.map(|key| fields.required_size(key));
    let (width, features, heads, layers) = (width?, features?, heads?, layers?);
    if !width.is_multiple_of(heads) || !(width / heads).is_multiple_of(2) || layers > 1000 {
        let expected = format!("{heads} even heads ({}) wide, and at most 1000 layers", keys[2]);
        return Err(fields.wrong(keys[0], &expected, &format!("{width}, and {layers} layers")));
    }
    Ok([width, features, heads, layers])
}

/// Attention of all to all.
fn attention(width: usize, heads: usize) -> AttentionSpec {
    let head_dim = width / heads;
    let scale = (head_dim as f32).powf(-0.5);
    AttentionSpec { heads, kv_heads: heads, head_dim, scale, window: None, softcap: None, causal: false }
}

/// A frozen product.
struct Dense<B: Ops> {
    w: B::Weight,            // (N, K)
    bias: Option<Tensor<B>>, // (1, N)
    features: usize,
}

impl<B: Ops> Dense<B> {
    fn weights(&self) -> LinearWeights<'_, B> {
        LinearWeights { w: &self.w, bias: self.bias.as_ref(), lora: None }
    }

    /// N
    fn features(&self) -> usize {
        self.features
    }
}

struct Norm<B: Ops> {
    w: Tensor<B>,            // (1, C)
    bias: Option<Tensor<B>>, // (1, C)
}

/// The weights of a folder, by name.
struct Weights<'a, B: Ops> {
    ops: &'a B,
    shard: Shard,
    path: PathBuf,
}

impl<B: Ops> Weights<'_, B> {
    /// The numbers of a tensor, which has this shape.
    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        // Checkpoints of the first years call them so.
        let old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        let (name, info) = match (self.shard.info(name), self.shard.info(&old)) {
            (Some(info), _) => (name, info),
            (None, Some(info)) => (old.as_str(), info),
            (None, None) => return Err(wrong(&self.path, name, &format!("{shape:?}"), "no such tensor")),
        };
        if info.shape != shape {
            return Err(wrong(&self.path, name, &format!("{shape:?}"), &format!("{:?}", info.shape)));
        }
        let mut values = Vec::with_capacity(shape.iter().product());
        self.shard.read(name, &info, &mut values)?;
        Ok(values)
    }

    fn row(&self, values: &[f32]) -> Result<Tensor<B>> {
        Tensor::from_host(self.ops, 1, values.len(), &self.ops.activations(values))
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Weight> {
        self.ops.weight(rows, cols, self.read(name, &[rows, cols])?)
    }

    fn norm(&self, name: &str, cols: usize, biased: bool) -> Result<Norm<B>> {
        let part = |part: &str| self.row(&self.read(&format!("{name}.{part}"), &[cols])?);
        Ok(Norm { w: part("weight")?, bias: biased.then(|| part("bias")).transpose()? })
    }

    /// One product of several, one below the other.
    fn dense(&self, names: &[String], rows: usize, cols: usize, biased: bool) -> Result<Dense<B>> {
        let (mut w, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            w.extend(self.read(&format!("{name}.weight"), &[rows, cols])?);
            if biased {
                bias.extend(self.read(&format!("{name}.bias"), &[rows])?);
            }
        }
        let features = names.len() * rows;
        let bias = biased.then(|| self.row(&bias)).transpose()?;
        Ok(Dense { w: self.ops.weight(features, cols, w)?, bias, features })
    }
}

/// What a forward needs beside the stream.
struct Space<B: Ops> {
    width: usize,
    qkv: Tensor<B>,
    o: Tensor<B>,
    up: Tensor<B>,
    fed: Tensor<B>,
    /// No columns: there is neither an adapter nor a q/k norm.
    none: Tensor<B>,
    raw: Tensor<B>,
    lse: Tensor<B, f32>,
    mean: Tensor<B, f32>,
    rstd: Tensor<B, f32>,
}

impl<B: Ops> Space<B> {
    /// For `rows` packed ones, a product of `up` features and what the activation leaves of them.
    fn new(ops: &B, rows: usize, spec: &AttentionSpec, up: usize, fed: usize) -> Result<Self> {
        let width = spec.heads * spec.head_dim;
        let act = |cols: usize| Tensor::zeros(ops, rows, cols);
        let column = |cols: usize| Tensor::zeros(ops, rows, cols);
        Ok(Space {
            width,
            qkv: act(3 * width)?,
            o: act(width)?,
            up: act(up)?,
            fed: act(fed)?,
            none: act(0)?,
            raw: act(0)?,
            lse: column(spec.heads)?,
            mean: column(1)?,
            rstd: column(1)?,
        })
    }

    fn stream(&self, ops: &B) -> Result<Tensor<B>> {
        Tensor::zeros(ops, self.o.rows(), self.width)
    }

    fn norm(&mut self, ops: &B, y: &mut Tensor<B>, x: &Tensor<B>, norm: &Norm<B>, eps: f32) -> Result<()> {
        let (mean, rstd, bias) = (&mut self.mean, &mut self.rstd, norm.bias.as_ref());
        ops.layer_norm_forward(LayerNormForward { y, mean, rstd, x, w: &norm.w, bias, eps })
    }
}

enum Trunk<B: Ops> {
    Bert(Bert<B>),
    Modern(Box<Modern<B>>),
}

/// A dense layer and the classifier: s = W₂·n(f(W₁h + b₁)) + b₂.
struct ClassifierHead<B: Ops> {
    dense: Tensor<B, f32>, // (C, C)
    dense_bias: Vec<f32>,  // (C)
    bend: fn(f32) -> f32,
    /// Gains, biases and ε of a LayerNorm.
    norm: Option<(Vec<f32>, Vec<f32>, f32)>,
    classifier: Vec<f32>, // (labels, C)
    bias: Vec<f32>,       // (labels)
    /// Reads the mean of all tokens, not the first.
    mean: bool,
}

impl<B: Ops> ClassifierHead<B> {
    /// Scores by the device's W₁h of one text, or of each of its tokens.
    fn scores(&self, rows: &[f32]) -> Vec<f32> {
        let c = self.dense_bias.len();
        let count = (rows.len() / c) as f32;
        // The mean before a linear layer is the mean after it.
        let mean = |at: usize| rows[at..].iter().step_by(c).sum::<f32>() / count;
        let mut h: Vec<f32> = (0..c).map(|at| (self.bend)(mean(at) + self.dense_bias[at])).collect();
        if let Some((gains, biases, eps)) = &self.norm {
            let mean = h.iter().sum::<f32>() / c as f32;
            let variance = h.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / c as f32;
            let scale = 1.0 / (variance + eps).sqrt();
            h.iter_mut().zip(gains).zip(biases).for_each(|((x, gain), bias)| *x = (*x - mean) * scale * gain + bias);
        }
        let score = |(w, bias): (&[f32], &f32)| bias + h.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
        self.classifier.chunks_exact(c).zip(&self.bias).map(score).collect()
    }
}

/// A classifier of texts on its device.
pub(crate) struct Encoder<B: Ops> {
    ops: B,
    pub(crate) rendering: Rendering,
    pub(crate) file: PathBuf,
    pub(crate) label_names: Vec<String>,
    pub(crate) multi_label: bool,
    /// Folder and hash of the weights: as [`super::Pretrained::identity`] has them.
    pub(crate) identity: String,
    trunk: Trunk<B>,
    head: ClassifierHead<B>,
    batch_tokens: usize,
    interrupt: Arc<AtomicBool>,
}

impl<B: Ops> Encoder<B> {
    /// Opens the folder; `None` where its config names no encoder. Fails on sizes and weights that do not fit each other, and on what
    /// is not computed here.
    pub(crate) fn open(ops: &B, dir: &Path, batch_tokens: usize, interrupt: Arc<AtomicBool>) -> Result<Option<Self>> {
        let file = dir.join("config.json");
        if !file.exists() {
            return Ok(None);
        }
        let fields = Fields::open(&file)?;
        let names = fields.texts("architectures")?.unwrap_or_default();
        let Some(class) = classes().find(|class| names == [*class]) else { return Ok(None) };
        let family = bert::FAMILIES.into_iter().find(|family| family.class == class);
        let path = dir.join("model.safetensors");
        let weights = Weights { ops, shard: Shard::open(&path)?, path };
        let (trunk, context) = match family {
            Some(family) => {
                let bert = Bert::load(&fields, family, &weights)?;
                let context = bert.context;
                (Trunk::Bert(bert), context)
            }
            None => {
                let modern = Modern::load(&fields, &weights)?;
                let context = modern.context;
                (Trunk::Modern(Box::new(modern)), context)
            }
        };
        let head = match family {
            Some(family) => head(&fields, &weights, family.head, true, family.bend)?,
            None => modern_head(&fields, &weights)?,
        };
        let vocab_size = fields.required_size("vocab_size")?;
        let limits = IdLimits { vocab_size, context, eos_token_ids: &[], tokenizer_sha256: None, pad: None };
        let name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let hash = format!("{:x}", Sha256::digest(weights.shard.whole()));
        Ok(Some(Encoder {
            rendering: Rendering::open(dir, &limits)?,
            label_names: label_names(&fields)?,
            multi_label: fields.text("problem_type")? == Some("multi_label_classification"),
            identity: format!("{name}@{}", &hash[..12]),
            ops: ops.clone(),
            trunk,
            head,
            file,
            batch_tokens,
            interrupt,
        }))
    }

    /// How many scores a text has.
    pub(crate) fn labels(&self) -> usize {
        self.head.bias.len()
    }

    /// Scores of each row (one per label); an inner error is that row's own.
    pub(crate) fn scores(&self, rows: Vec<Result<Rendered>>) -> Result<Vec<Result<Vec<f32>>>> {
        let good: Vec<&Rendered> = rows.iter().flatten().collect();
        let mut scores = Vec::with_capacity(good.len());
        let packed =
            Batch::pack(&good, Heads::Ends, self.batch_tokens, |row| (&[], vec![AnswerTokens::new(&row.tokens)]));
        for (rows, mut batch) in packed {
            if self.interrupt.load(Ordering::SeqCst) {
                return Err(Error::Interrupted(String::new()));
            }
            batch.read_from_start(self.head.mean);
            let read = self.forward(&batch)?;
            let (c, mut at) = (self.head.dense_bias.len(), 0);
            for row in rows {
                let count = if self.head.mean { row.tokens.len() } else { 1 };
                scores.push(self.head.scores(&read[at * c..(at + count) * c]));
                at += count;
            }
        }
        Ok(fill(rows, scores, Ok))
    }

    /// W₁h of every row that the head reads.
    fn forward(&self, batch: &Batch) -> Result<Vec<f32>> {
        let (ops, few, c) = (&self.ops, batch.rows.len(), self.head.dense_bias.len());
        let mut tables = DeviceBatch::with_capacity(ops, batch.len())?;
        tables.set(ops, batch)?;
        let x = match &self.trunk {
            Trunk::Bert(bert) => bert.forward(ops, &tables)?,
            Trunk::Modern(modern) => modern.forward(ops, &tables)?,
        };
        let (mut h, mut dense) = (Tensor::<B>::zeros(ops, few, c)?, Tensor::<B, f32>::zeros(ops, few, c)?);
        ops.gather(&mut h, &x, &tables.rows)?;
        ops.score_forward(&mut dense, &h, &self.head.dense)?;
        dense.read(ops)
    }
}

/// A head of two layers, called `[dense, classifier]`.
fn head<B: Ops>(
    fields: &Fields,
    weights: &Weights<B>,
    [dense, classifier]: [&str; 2],
    biased: bool,
    bend: fn(f32) -> f32,
) -> Result<ClassifierHead<B>> {
    let c = fields.size("dim")?.map_or_else(|| fields.required_size("hidden_size"), Ok)?;
    let labels = weights.shard.info(&format!("{classifier}.weight")).and_then(|info| info.shape.first().copied());
    let labels = labels.unwrap_or(1);
    Ok(ClassifierHead {
        dense: Tensor::from_host(weights.ops, c, c, &weights.read(&format!("{dense}.weight"), &[c, c])?)?,
        dense_bias: if biased { weights.read(&format!("{dense}.bias"), &[c])? } else { vec![0.0; c] },
        bend,
        norm: None,
        classifier: weights.read(&format!("{classifier}.weight"), &[labels, c])?,
        bias: weights.read(&format!("{classifier}.bias"), &[labels])?,
        mean: false,
    })
}

fn gelu(x: f32) -> f32 {
    naive::curve(x, Activation::Gelu).0
}

fn modern_head<B: Ops>(fields: &Fields, weights: &Weights<B>) -> Result<ClassifierHead<B>> {
    if let Some(other) = fields.text("classifier_activation")?.filter(|kind| *kind != "gelu") {
        return Err(fields.refuse("classifier_activation", "`gelu`", &format!("`{other}`"), NOT_COMPUTED));
    }
    let mean = match fields.text("classifier_pooling")? {
        None | Some("cls") => false,
        Some("mean") => true,
        Some(other) => {
            return Err(fields.refuse("classifier_pooling", "`cls` or `mean`", &format!("`{other}`"), NOT_COMPUTED));
        }
    };
    let biased = fields.flag("classifier_bias")?;
    let plain = head(fields, weights, ["head.dense", "classifier"], biased, gelu)?;
    let c = plain.dense_bias.len();
    let gains = weights.read("head.norm.weight", &[c])?;
    let biases = if fields.flag("norm_bias")? { weights.read("head.norm.bias", &[c])? } else { vec![0.0; c] };
    let eps = fields.positive("norm_eps")?.unwrap_or(1e-5) as f32;
    Ok(ClassifierHead { norm: Some((gains, biases, eps)), mean, ..plain })
}
