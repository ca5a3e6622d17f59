//! ModernBERT: x = LN(word), then in each layer x = x + o(attention(LN(x))) and x = x + down(gelu(gate)·up)(LN(x)), the first without its
//! first norm; rotary positions; two of three layers see a window both ways; LN once more at the end. (arXiv:2412.13663)

use super::{Dense, NOT_COMPUTED, Norm, Space, Weights, sizes};
use crate::backend::Tensor;
use crate::error::Result;
use crate::model::batch::DeviceBatch;
use crate::model::config::RopeConfig;
use crate::ops::{
    Activation, AttentionForward, AttentionSpec, GateUpSpec, LinearForward, NormSpec, Ops, QkvSpec, Rope, Rotation,
};
use crate::text::fields::Fields;

pub(super) const CLASS: &str = "ModernBertForSequenceClassification";

struct Layer<B: Ops> {
    attention_norm: Option<Norm<B>>,
    qkv: Dense<B>, // (3C, C)
    o: Dense<B>,   // (C, C)
    norm: Norm<B>,
    gate_up: Dense<B>, // (2F, C)
    down: Dense<B>,    // (C, F)
    /// Sees a window only, and turns on the other base.
    local: bool,
}

/// Everything below the classifier's head.
pub(super) struct Modern<B: Ops> {
    words: B::Weight, // (V, C)
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
    last: Norm<B>,
    /// Of global layers, then of local ones.
    attention: [AttentionSpec; 2],
    ropes: [Rope<B>; 2],
    eps: f32,
    /// Of the longest text, in tokens.
    pub(super) context: usize,
}

impl<B: Ops> Modern<B> {
    /// Fails on sizes and weights that do not fit each other, and on what is not computed here.
    pub(super) fn load(fields: &Fields, weights: &Weights<B>) -> Result<Self> {
        let keys = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"];
        let [c, f, heads, layers] = sizes(fields, keys)?;
        if let Some(other) = fields.text("hidden_activation")?.filter(|kind| *kind != "gelu") {
            return Err(fields.refuse("hidden_activation", "`gelu`", &format!("`{other}`"), NOT_COMPUTED));
        }
        let context = fields.required_size("max_position_embeddings")?.min(1 << 20);
        let (vocab, local) = (fields.required_size("vocab_size")?, fields.size("local_attention")?.unwrap_or(128));
        let every = fields.size("global_attn_every_n_layers")?.unwrap_or(3);
        let kinds = fields.texts("layer_types")?;
        if let Some(kinds) = kinds.as_ref().filter(|kinds| kinds.len() != layers) {
            let [expected, found] = [layers, kinds.len()].map(|n| format!("a list of {n}"));
            return Err(fields.wrong("layer_types", &expected, &found));
        }
        let known = |kind: &&String| ["full_attention", "sliding_attention"].contains(&kind.as_str());
        if let Some(other) = kinds.iter().flatten().find(|kind| !known(kind)) {
            let expected = "`full_attention` or `sliding_attention` each";
            return Err(fields.refuse("layer_types", expected, &format!("`{other}`"), NOT_COMPUTED));
        }
        let is_local = |at: usize| match &kinds {
            Some(kinds) => kinds[at] == "sliding_attention",
            None => !at.is_multiple_of(every),
        };
        let [biased, attention_bias, mlp_bias] =
            [fields.flag("norm_bias")?, fields.flag("attention_bias")?, fields.flag("mlp_bias")?];
        let layer = |at: usize| -> Result<Layer<B>> {
            let name = |part: &str| format!("model.layers.{at}.{part}");
            Ok(Layer {
                attention_norm: (at > 0).then(|| weights.norm(&name("attn_norm"), c, biased)).transpose()?,
                qkv: weights.dense(&[name("attn.Wqkv")], 3 * c, c, attention_bias)?,
                o: weights.dense(&[name("attn.Wo")], c, c, attention_bias)?,
                norm: weights.norm(&name("mlp_norm"), c, biased)?,
                gate_up: weights.dense(&[name("mlp.Wi")], 2 * f, c, mlp_bias)?,
                down: weights.dense(&[name("mlp.Wo")], c, f, mlp_bias)?,
                local: is_local(at),
            })
        };
        let attention = super::attention(c, heads);
        let rope = |kind: &str, key: &str, theta: f64| -> Result<Rope<B>> {
            let both = fields.object("rope_parameters")?;
            let rope = match both.as_ref().map(|both| both.object(kind)).transpose()?.flatten() {
                Some(own) => RopeConfig::of(&own, theta, context)?,
                None => RopeConfig::plain(fields.positive(key)?.unwrap_or(theta)),
            };
            Rope::new(weights.ops, &rope.inv_freq(attention.head_dim), context)
        };
        Ok(Modern {
            words: weights.matrix("model.embeddings.tok_embeddings.weight", vocab, c)?,
            norm: weights.norm("model.embeddings.norm", c, biased)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            last: weights.norm("model.final_norm", c, biased)?,
            // Half of it on either side, and the row itself.
            attention: [attention, AttentionSpec { window: Some(local / 2 + 1), ..attention }],
            ropes: [
                rope("full_attention", "global_rope_theta", 160_000.0)?,
                rope("sliding_attention", "local_rope_theta", 10_000.0)?,
            ],
            eps: fields.positive("norm_eps")?.unwrap_or(1e-5) as f32,
            context,
        })
    }

    /// What becomes of a batch's tokens, (T, C).
    pub(super) fn forward(&self, ops: &B, tables: &DeviceBatch<B>) -> Result<Tensor<B>> {
        let AttentionSpec { heads, head_dim, .. } = self.attention[0];
        let gate = GateUpSpec { activation: Activation::Gelu, gated: true };
        let width = self.layers.first().map_or(0, |layer| layer.gate_up.features());
        let mut s = Space::new(ops, tables.tokens.rows(), &self.attention[0], width, width / 2)?;
        let (mut x, mut y) = (s.stream(ops)?, s.stream(ops)?);
        ops.embed(&mut y, &tables.tokens, &self.words, 1.0)?;
        s.norm(ops, &mut x, &y, &self.norm, self.eps)?;
        for layer in &self.layers {
            let mut normed = s.stream(ops)?;
            if let Some(norm) = &layer.attention_norm {
                s.norm(ops, &mut normed, &x, norm, self.eps)?;
            }
            let Space { qkv, o, lse, none, raw, .. } = &mut s;
            let input = if layer.attention_norm.is_some() { &normed } else { &x };
            let (spec, rope) = (self.attention[usize::from(layer.local)], &self.ropes[usize::from(layer.local)]);
            let norm = NormSpec { eps: self.eps, unit_offset: false };
            let positions = &tables.packing.positions;
            let rotation = Rotation {
                qk_norm: None,
                positions,
                rope,
                spec: QkvSpec { heads, kv_heads: heads, head_dim, norm, wide: false },
            };
            let product = LinearForward { y: qkv, xa: none, x: input, weights: layer.qkv.weights() };
            ops.qkv_forward(product, raw, rotation)?;
            ops.attention_forward(AttentionForward { o, lse, qkv, packing: &tables.packing, spec })?;
            ops.linear_forward(LinearForward { y: &mut y, xa: none, x: o, weights: layer.o.weights() }, Some(&x))?;
            s.norm(ops, &mut normed, &y, &layer.norm, self.eps)?;
            let Space { up, fed, none, .. } = &mut s;
            ops.gate_up_forward(
                fed,
                LinearForward { y: up, xa: none, x: &normed, weights: layer.gate_up.weights() },
                gate,
            )?;
            ops.linear_forward(LinearForward { y: &mut x, xa: none, x: fed, weights: layer.down.weights() }, Some(&y))?;
        }
        s.norm(ops, &mut y, &x, &self.last, self.eps)?;
        Ok(y)
    }
}
