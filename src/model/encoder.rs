//! Encoders (BERT, RoBERTa, DistilBERT) with a classifier's head, forward only: x = LN(word + position + type), then in each layer
//! x = LN(x + o(attention(x))) and x = LN(x + down(gelu(up(x)))), both ways, with biases; a dense layer and the classifier read the
//! first token. (arXiv:1810.04805, 1907.11692, 1910.01108)

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::tensor::TensorInfo;
use sha2::{Digest, Sha256};

use super::batch::{AnswerTokens, Batch, DeviceBatch, Heads};
use super::checkpoint::Shard;
use super::config::label_names;
use super::pretrained::fill;
use crate::backend::Tensor;
use crate::error::{Error, Result};
use crate::ops::{
    Activation, AttentionForward, AttentionSpec, GateUpSpec, LayerNormForward, LinearForward, LinearWeights, Ops,
};
use crate::text::fields::Fields;
use crate::text::rendering::Rendered;
use crate::text::{IdLimits, Rendering};

/// A family: how its class and its config's keys are called, and where its tensors lie.
#[derive(Debug)]
struct Family {
    class: &'static str,
    /// Width, feed-forward, heads, layers.
    sizes: [&'static str; 4],
    activation: &'static str,
    /// Before the names of the transformer, and of its layers.
    prefix: &'static str,
    layers: &'static str,
    /// q, k, v, o, up, down, and the norms after attention and feed-forward.
    parts: [&'static str; 8],
    /// The dense layer before the classifier, and that.
    head: [&'static str; 2],
    /// The first position's number: RoBERTa counts on from its padding.
    first: fn(u32) -> usize,
    /// What follows the dense layer.
    bend: fn(f32) -> f32,
}

const BERT_PARTS: [&str; 8] = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "attention.output.LayerNorm",
    "output.LayerNorm",
];
const BERT: Family = Family {
    class: "BertForSequenceClassification",
    sizes: ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"],
    activation: "hidden_act",
    prefix: "bert.",
    layers: "encoder.layer",
    parts: BERT_PARTS,
    head: ["bert.pooler.dense", "classifier"],
    first: |_| 0,
    bend: f32::tanh,
};
const ROBERTA: Family = Family {
    class: "RobertaForSequenceClassification",
    prefix: "roberta.",
    head: ["classifier.dense", "classifier.out_proj"],
    first: |pad| pad as usize + 1,
    ..BERT
};
const XLM_ROBERTA: Family = Family { class: "XLMRobertaForSequenceClassification", ..ROBERTA };
const DISTILBERT: Family = Family {
    class: "DistilBertForSequenceClassification",
    sizes: ["dim", "hidden_dim", "n_heads", "n_layers"],
    activation: "activation",
    prefix: "distilbert.",
    layers: "transformer.layer",
    parts: [
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "sa_layer_norm",
        "output_layer_norm",
    ],
    head: ["pre_classifier", "classifier"],
    bend: |x| x.max(0.0),
    ..BERT
};
const FAMILIES: [&Family; 4] = [&BERT, &ROBERTA, &XLM_ROBERTA, &DISTILBERT];

/// The classes that are read.
pub(crate) fn classes() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.class)
}

/// A frozen product with its bias.
struct Dense<B: Ops> {
    w: B::Weight,    // (N, K)
    bias: Tensor<B>, // (1, N)
}

impl<B: Ops> Dense<B> {
    fn weights(&self) -> LinearWeights<'_, B> {
        LinearWeights { w: &self.w, bias: Some(&self.bias), lora: None }
    }
}

struct Norm<B: Ops> {
    w: Tensor<B>,    // (1, C)
    bias: Tensor<B>, // (1, C)
}

struct Layer<B: Ops> {
    qkv: Dense<B>, // (3C, C)
    o: Dense<B>,   // (C, C)
    up: Dense<B>,  // (F, C)
    down: Dense<B>,
    norms: [Norm<B>; 2],
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
    words: B::Weight,     // (V, C)
    positions: B::Weight, // (positions, C): with the type of a first text added
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
    dense: Tensor<B, f32>, // (C, C), before the classifier
    dense_bias: Vec<f32>,
    bend: fn(f32) -> f32,
    classifier: Vec<f32>, // (labels, C)
    bias: Vec<f32>,       // (labels)
    attention: AttentionSpec,
    gate: GateUpSpec,
    eps: f32,
    batch_tokens: usize,
    interrupt: Arc<AtomicBool>,
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
        let found = |name: &str| -> Option<TensorInfo> { self.shard.info(name) };
        let (name, info) = match (found(name), found(&old)) {
            (Some(info), _) => (name, info),
            (None, Some(info)) => (old.as_str(), info),
            (None, None) => {
                return Err(super::checkpoint::wrong(&self.path, name, &format!("{shape:?}"), "no such tensor"));
            }
        };
        if info.shape != shape {
            let (expected, found) = (format!("{shape:?}"), format!("{:?}", info.shape));
            return Err(super::checkpoint::wrong(&self.path, name, &expected, &found));
        }
        let mut values = Vec::with_capacity(shape.iter().product());
        self.shard.read(name, &info, &mut values)?;
        Ok(values)
    }

    fn row(&self, values: &[f32]) -> Result<Tensor<B>> {
        Tensor::from_host(self.ops, 1, values.len(), &self.ops.activations(values))
    }

    fn norm(&self, name: &str, cols: usize) -> Result<Norm<B>> {
        let part = |part: &str| self.row(&self.read(&format!("{name}.{part}"), &[cols])?);
        Ok(Norm { w: part("weight")?, bias: part("bias")? })
    }

    /// One product of several, one below the other.
    fn dense(&self, names: &[String], rows: usize, cols: usize) -> Result<Dense<B>> {
        let (mut w, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            w.extend(self.read(&format!("{name}.weight"), &[rows, cols])?);
            bias.extend(self.read(&format!("{name}.bias"), &[rows])?);
        }
        Ok(Dense { w: self.ops.weight(bias.len(), cols, w)?, bias: self.row(&bias)? })
    }
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
        let Some(family) = FAMILIES.into_iter().find(|family| names == [family.class]) else { return Ok(None) };
        const REMEDY: &str = "ares does not compute this: use a checkpoint without it";
        let [width, features, heads, layers] = family.sizes.map(|key| fields.required_size(key));
        let (c, f, heads, layers) = (width?, features?, heads?, layers?);
        if !c.is_multiple_of(heads) || layers > 1000 {
            let expected = format!("a multiple of {} ({heads}), and at most 1000 layers", family.sizes[2]);
            return Err(fields.wrong(family.sizes[0], &expected, &format!("{c}, and {layers} layers")));
        }
        let activation = match fields.text(family.activation)?.unwrap_or("gelu") {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => return Err(fields.refuse(family.activation, "`gelu`", &format!("`{other}`"), REMEDY)),
        };
        match fields.text("position_embedding_type")? {
            None | Some("absolute") => {}
            Some(other) => {
                return Err(fields.refuse("position_embedding_type", "`absolute`", &format!("`{other}`"), REMEDY));
            }
        }
        let (vocab, positions) =
            (fields.required_size("vocab_size")?, fields.required_size("max_position_embeddings")?);
        let first = (family.first)(fields.token("pad_token_id")?.unwrap_or(1));
        let context = positions.checked_sub(first).filter(|context| *context > 2).ok_or_else(|| {
            fields.wrong("max_position_embeddings", &format!("more than {}", first + 2), &positions.to_string())
        })?;
        let path = dir.join("model.safetensors");
        let weights = Weights { ops, shard: Shard::open(&path)?, path };
        let (prefix, embedding) = (family.prefix, |name: &str| format!("{}embeddings.{name}", family.prefix));
        let mut table = weights.read(&embedding("position_embeddings.weight"), &[positions, c])?.split_off(first * c);
        if let Some(types) = fields.size("type_vocab_size")? {
            let kind = weights.read(&embedding("token_type_embeddings.weight"), &[types, c])?;
            table.chunks_exact_mut(c).for_each(|row| row.iter_mut().zip(&kind).for_each(|(x, kind)| *x += kind));
        }
        let layer = |at: usize| -> Result<Layer<B>> {
            let [q, k, v, o, up, down, attended, fed] =
                family.parts.map(|part| format!("{prefix}{}.{at}.{part}", family.layers));
            Ok(Layer {
                qkv: weights.dense(&[q, k, v], c, c)?,
                o: weights.dense(&[o], c, c)?,
                up: weights.dense(&[up], f, c)?,
                down: weights.dense(&[down], c, f)?,
                norms: [weights.norm(&attended, c)?, weights.norm(&fed, c)?],
            })
        };
        let [dense, classifier] = family.head.map(str::to_string);
        let labels = weights.shard.info(&format!("{classifier}.weight")).map_or(0, |info| info.shape[0]);
        let head_dim = c / heads;
        let limits = IdLimits { vocab_size: vocab, context, eos_token_ids: &[], tokenizer_sha256: None, pad: None };
        let name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let hash = format!("{:x}", Sha256::digest(weights.shard.whole()));
        Ok(Some(Encoder {
            rendering: Rendering::open(dir, &limits)?,
            label_names: label_names(&fields)?,
            multi_label: fields.text("problem_type")? == Some("multi_label_classification"),
            identity: format!("{name}@{}", &hash[..12]),
            words: ops.weight(vocab, c, weights.read(&embedding("word_embeddings.weight"), &[vocab, c])?)?,
            positions: ops.weight(context, c, table)?,
            norm: weights.norm(&embedding("LayerNorm"), c)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            dense: Tensor::from_host(ops, c, c, &weights.read(&format!("{dense}.weight"), &[c, c])?)?,
            dense_bias: weights.read(&format!("{dense}.bias"), &[c])?,
            bend: family.bend,
            bias: weights.read(&format!("{classifier}.bias"), &[labels])?,
            classifier: weights.read(&format!("{classifier}.weight"), &[labels, c])?,
            attention: AttentionSpec {
                heads,
                kv_heads: heads,
                head_dim,
                scale: (head_dim as f32).powf(-0.5),
                window: None,
                softcap: None,
                causal: false,
            },
            gate: GateUpSpec { activation, gated: false },
            eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-12) as f32,
            ops: ops.clone(),
            file,
            batch_tokens,
            interrupt,
        }))
    }

    /// How many scores a text has.
    pub(crate) fn labels(&self) -> usize {
        self.bias.len()
    }

    /// Scores of each row (one per label); an inner error is that row's own.
    pub(crate) fn scores(&self, rows: Vec<Result<Rendered>>) -> Result<Vec<Result<Vec<f32>>>> {
        let good: Vec<&Rendered> = rows.iter().flatten().collect();
        let packed =
            Batch::pack(&good, Heads::Ends, self.batch_tokens, |row| (&[], vec![AnswerTokens::new(&row.tokens)]));
        let mut scores = Vec::with_capacity(good.len());
        for (_, mut batch) in packed {
            if self.interrupt.load(Ordering::SeqCst) {
                return Err(Error::Interrupted(String::new()));
            }
            batch.read_first();
            scores.extend(self.forward(&batch)?);
        }
        Ok(fill(rows, scores, Ok))
    }

    fn forward(&self, batch: &Batch) -> Result<Vec<Vec<f32>>> {
        let (ops, t, c) = (&self.ops, batch.len(), self.attention.heads * self.attention.head_dim);
        let f = self.layers.first().map_or(0, |layer| layer.up.bias.cols());
        let mut tables = DeviceBatch::with_capacity(ops, t)?;
        tables.set(ops, batch)?;
        let act = |cols: usize| Tensor::<B>::zeros(ops, t, cols);
        let (mut x, mut y, mut qkv, mut o, mut up, mut fed) =
            (act(c)?, act(c)?, act(3 * c)?, act(c)?, act(f)?, act(f)?);
        let mut none = act(0)?; // no adapter: nothing is written there
        let column = || Tensor::<B, f32>::zeros(ops, t, 1);
        let (mut mean, mut rstd, mut lse) =
            (column()?, column()?, Tensor::<B, f32>::zeros(ops, t, self.attention.heads)?);
        let mut normed = |y: &mut Tensor<B>, x: &Tensor<B>, norm: &Norm<B>| {
            let (mean, rstd, bias) = (&mut mean, &mut rstd, Some(&norm.bias));
            ops.layer_norm_forward(LayerNormForward { y, mean, rstd, x, w: &norm.w, bias, eps: self.eps })
        };
        ops.embed(&mut y, &tables.tokens, &self.words, 1.0)?;
        ops.embed_add(&mut y, &tables.packing.positions, &self.positions)?;
        normed(&mut x, &y, &self.norm)?;
        for layer in &self.layers {
            let product = LinearForward { y: &mut qkv, xa: &mut none, x: &x, weights: layer.qkv.weights() };
            ops.linear_forward(product, None)?;
            let (packing, spec) = (&tables.packing, self.attention);
            ops.attention_forward(AttentionForward { o: &mut o, lse: &mut lse, qkv: &qkv, packing, spec })?;
            let product = LinearForward { y: &mut y, xa: &mut none, x: &o, weights: layer.o.weights() };
            ops.linear_forward(product, Some(&x))?;
            normed(&mut x, &y, &layer.norms[0])?;
            let product = LinearForward { y: &mut up, xa: &mut none, x: &x, weights: layer.up.weights() };
            ops.gate_up_forward(&mut fed, product, self.gate)?;
            let product = LinearForward { y: &mut y, xa: &mut none, x: &fed, weights: layer.down.weights() };
            ops.linear_forward(product, Some(&x))?;
            normed(&mut x, &y, &layer.norms[1])?;
        }
        let few = batch.rows.len();
        let (mut first, mut dense) = (Tensor::<B>::zeros(ops, few, c)?, Tensor::<B, f32>::zeros(ops, few, c)?);
        ops.gather(&mut first, &x, &tables.rows)?;
        ops.score_forward(&mut dense, &first, &self.dense)?;
        // A few products a text are not worth a kernel.
        let bent = |(x, bias): (f32, &f32)| (self.bend)(x + bias);
        let dense: Vec<f32> = dense.read(ops)?.into_iter().zip(self.dense_bias.iter().cycle()).map(bent).collect();
        let score = |row: &[f32], w: &[f32], bias: &f32| bias + row.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
        let scores = |row: &[f32]| {
            let each = self.classifier.chunks_exact(c).zip(&self.bias);
            each.map(|(w, bias)| score(row, w, bias)).collect()
        };
        Ok(dense.chunks_exact(c).map(scores).collect())
    }
}
