//! BERT and those that changed it little: x = LN(word + position + type), then in each layer x = LN(x + o(attention(x))) and
//! x = LN(x + down(gelu(up(x)))), with biases; a dense layer and the classifier read the first token. (arXiv:1810.04805, 1907.11692,
//! 1910.01108)

use super::{Dense, NOT_COMPUTED, Norm, Space, Weights, sizes};
use crate::backend::Tensor;
use crate::error::Result;
use crate::model::batch::DeviceBatch;
use crate::ops::{Activation, AttentionForward, AttentionSpec, GateUpSpec, LinearForward, Ops};
use crate::text::fields::Fields;

/// A family: how its class and its config's keys are called, and where its tensors lie.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) class: &'static str,
    /// Width, feed-forward, heads, layers.
    sizes: [&'static str; 4],
    activation: &'static str,
    /// Before the names of the transformer, and of its layers.
    prefix: &'static str,
    layers: &'static str,
    /// q, k, v, o, up, down, and the norms after attention and feed-forward.
    parts: [&'static str; 8],
    /// The dense layer before the classifier, and that.
    pub(super) head: [&'static str; 2],
    /// The first position's number: RoBERTa counts on from its padding.
    first: fn(u32) -> usize,
    /// What follows the dense layer.
    pub(super) bend: fn(f32) -> f32,
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
pub(super) const FAMILIES: [&Family; 4] = [&BERT, &ROBERTA, &XLM_ROBERTA, &DISTILBERT];

struct Layer<B: Ops> {
    qkv: Dense<B>, // (3C, C)
    o: Dense<B>,   // (C, C)
    up: Dense<B>,  // (F, C)
    down: Dense<B>,
    norms: [Norm<B>; 2],
}

/// Everything below the classifier's head.
pub(super) struct Bert<B: Ops> {
    words: B::Weight,     // (V, C)
    positions: B::Weight, // (positions, C): with the type of a first text added
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
    attention: AttentionSpec,
    gate: GateUpSpec,
    eps: f32,
    /// Of the longest text, in tokens.
    pub(super) context: usize,
}

impl<B: Ops> Bert<B> {
    /// Fails on sizes and weights that do not fit each other, and on what is not computed here.
    pub(super) fn load(fields: &Fields, family: &Family, weights: &Weights<B>) -> Result<Self> {
        let [c, f, heads, layers] = sizes(fields, family.sizes)?;
        let activation = match fields.text(family.activation)?.unwrap_or("gelu") {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => return Err(fields.refuse(family.activation, "`gelu`", &format!("`{other}`"), NOT_COMPUTED)),
        };
        const POSITIONS: &str = "position_embedding_type";
        if let Some(other) = fields.text(POSITIONS)?.filter(|kind| *kind != "absolute") {
            return Err(fields.refuse(POSITIONS, "`absolute`", &format!("`{other}`"), NOT_COMPUTED));
        }
        let (vocab, positions) =
            (fields.required_size("vocab_size")?, fields.required_size("max_position_embeddings")?);
        let first = (family.first)(fields.token("pad_token_id")?.unwrap_or(1));
        let context = positions.checked_sub(first).filter(|context| *context > 2).ok_or_else(|| {
            fields.wrong("max_position_embeddings", &format!("more than {}", first + 2), &positions.to_string())
        })?;
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
                qkv: weights.dense(&[q, k, v], c, c, true)?,
                o: weights.dense(&[o], c, c, true)?,
                up: weights.dense(&[up], f, c, true)?,
                down: weights.dense(&[down], c, f, true)?,
                norms: [weights.norm(&attended, c, true)?, weights.norm(&fed, c, true)?],
            })
        };
        Ok(Bert {
            words: weights.matrix(&embedding("word_embeddings.weight"), vocab, c)?,
            positions: weights.ops.weight(context, c, table)?,
            norm: weights.norm(&embedding("LayerNorm"), c, true)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            attention: super::attention(c, heads),
            gate: GateUpSpec { activation, gated: false },
            eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-12) as f32,
            context,
        })
    }

    /// What becomes of a batch's tokens, (T, C).
    pub(super) fn forward(&self, ops: &B, tables: &DeviceBatch<B>) -> Result<Tensor<B>> {
        let f = self.layers.first().map_or(0, |layer| layer.up.features());
        let mut s = Space::new(ops, tables.tokens.rows(), &self.attention, f, f)?;
        let (mut x, mut y) = (s.stream(ops)?, s.stream(ops)?);
        ops.embed(&mut y, &tables.tokens, &self.words, 1.0)?;
        ops.embed_add(&mut y, &tables.packing.positions, &self.positions)?;
        s.norm(ops, &mut x, &y, &self.norm, self.eps)?;
        for layer in &self.layers {
            let Space { qkv, o, lse, none, .. } = &mut s;
            ops.linear_forward(LinearForward { y: qkv, xa: none, x: &x, weights: layer.qkv.weights() }, None)?;
            let (packing, spec) = (&tables.packing, self.attention);
            ops.attention_forward(AttentionForward { o, lse, qkv, packing, spec })?;
            ops.linear_forward(LinearForward { y: &mut y, xa: none, x: o, weights: layer.o.weights() }, Some(&x))?;
            s.norm(ops, &mut x, &y, &layer.norms[0], self.eps)?;
            let Space { up, fed, none, .. } = &mut s;
            ops.gate_up_forward(fed, LinearForward { y: up, xa: none, x: &x, weights: layer.up.weights() }, self.gate)?;
            ops.linear_forward(LinearForward { y: &mut y, xa: none, x: fed, weights: layer.down.weights() }, Some(&x))?;
            s.norm(ops, &mut x, &y, &layer.norms[1], self.eps)?;
        }
        Ok(x)
    }
}
