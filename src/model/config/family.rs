//! The families of decoders that are read, and what each does beside the others: a row of [`Family::traits`].

use serde_json::Value;

use super::ModelConfig;
use crate::error::Result;
use crate::ops::Activation;
use crate::text::fields::{Fields, brief};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma,
    Gemma2,
    Gemma3,
    SmolLm3,
    Granite,
    Phi3,
    Olmo2,
    Olmo3,
}

/// What distinguishes a family, whatever its sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Traits {
    /// Biases on q, k and v; never on the other projections.
    pub(crate) qkv_bias: bool,
    /// RMSNorm over each head of q and k.
    pub(crate) qk_norm: bool,
    /// Or over all of q, and all of k.
    pub(crate) wide_qk_norm: bool,
    /// Gains of norms are 1 + w.
    pub(crate) unit_offset: bool,
    /// Attention and feed-forward each have a norm before them.
    pub(crate) pre_norms: bool,
    /// And after them, before they are added.
    pub(crate) post_norms: bool,
    /// The embedding comes out √C times as large.
    pub(crate) scaled_embedding: bool,
    /// Files hold q∣k∣v as one matrix, and gate∣up.
    pub(crate) fused: bool,
    /// The embedding is the LM head, unless the config says otherwise.
    pub(super) tied: bool,
    /// Size of a head where the config does not state it; without one C / h.
    pub(super) head_dim: Option<usize>,
    /// Padding where the config says nothing of it.
    pub(super) pad: Option<u32>,
    /// Of norms, where the config says nothing.
    pub(super) eps: f64,
}

const PLAIN: Traits = Traits {
    qkv_bias: false,
    qk_norm: false,
    wide_qk_norm: false,
    unit_offset: false,
    pre_norms: true,
    post_norms: false,
    scaled_embedding: false,
    fused: false,
    tied: false,
    head_dim: None,
    pad: None,
    eps: 1e-6,
};
const GEMMA: Traits =
    Traits { unit_offset: true, scaled_embedding: true, tied: true, head_dim: Some(256), pad: Some(0), ..PLAIN };

const OLMO: Traits =
    Traits { qk_norm: true, wide_qk_norm: true, pre_norms: false, post_norms: true, pad: Some(1), eps: 1e-5, ..PLAIN };

impl Family {
    pub(crate) const ALL: [Family; 12] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
        Family::SmolLm3,
        Family::Granite,
        Family::Phi3,
        Family::Olmo2,
        Family::Olmo3,
    ];

    /// The name as it begins transformers' class names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Llama => "Llama",
            Family::Mistral => "Mistral",
            Family::Qwen2 => "Qwen2",
            Family::Qwen3 => "Qwen3",
            Family::Gemma => "Gemma",
            Family::Gemma2 => "Gemma2",
            Family::Gemma3 => "Gemma3",
            Family::SmolLm3 => "SmolLM3",
            Family::Granite => "Granite",
            Family::Phi3 => "Phi3",
            Family::Olmo2 => "Olmo2",
            Family::Olmo3 => "Olmo3",
        }
    }

    pub(crate) fn traits(self) -> Traits {
        match self {
            Family::Llama | Family::Mistral | Family::Granite => PLAIN,
            Family::Qwen2 => Traits { qkv_bias: true, ..PLAIN },
            Family::Qwen3 => Traits { qk_norm: true, head_dim: Some(128), ..PLAIN },
            Family::Gemma => GEMMA,
            Family::Gemma2 => Traits { post_norms: true, ..GEMMA },
            Family::Gemma3 => Traits { post_norms: true, qk_norm: true, ..GEMMA },
            Family::SmolLm3 => Traits { tied: true, pad: Some(128_004), ..PLAIN },
            Family::Phi3 => Traits { fused: true, pad: Some(32_000), eps: 1e-5, ..PLAIN },
            Family::Olmo2 | Family::Olmo3 => OLMO,
        }
    }

    /// What gates the feed-forward.
    pub(super) fn activation(self, fields: &Fields) -> Result<Activation> {
        let gemma = self.traits().scaled_embedding;
        let key = if gemma && self.traits().post_norms { "hidden_activation" } else { "hidden_act" };
        match (gemma, fields.text(key)?) {
            (false, None | Some("silu" | "swish")) => Ok(Activation::Silu),
            // The first release said `gelu`, meant this, and is read so.
            (true, None | Some("gelu_pytorch_tanh")) => Ok(Activation::GeluTanh),
            (true, Some("gelu")) if self == Family::Gemma => Ok(Activation::GeluTanh),
            (true, Some("gelu")) => Ok(Activation::Gelu),
            (_, Some(other)) => {
                let expected = if gemma { "`gelu_pytorch_tanh`" } else { "`silu`" };
                Err(fields.refuse(key, expected, &format!("`{other}`"), super::NOT_COMPUTED))
            }
        }
    }

    /// What attention and the LM head do to their scores: the factor of attention's, the caps of both.
    pub(super) fn scores(self, fields: &Fields, head_dim: usize) -> Result<(f32, [Option<f32>; 2])> {
        if self == Family::Granite {
            return Ok((multiplier(fields, "attention_multiplier")? as f32, [None; 2]));
        }
        if !self.traits().scaled_embedding || !self.traits().post_norms {
            return Ok(((head_dim as f32).powf(-0.5), [None; 2]));
        }
        let scalar = fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
        let cap = |key, default| match fields.has(key) {
            true => Ok(fields.positive(key)?.map(|cap| cap as f32)),
            false => Ok(default),
        };
        let [attention, logits] = if self == Family::Gemma2 { [Some(50.0), Some(30.0)] } else { [None; 2] };
        let caps = [cap("attn_logit_softcapping", attention)?, cap("final_logit_softcapping", logits)?];
        Ok((scalar.powf(-0.5) as f32, caps))
    }

    /// What the embedding, the mean square's ε of every norm, and the LM head's logits are multiplied with.
    ///
    /// Granite adds m·f(norm(x)) to its residual stream x. A stream of x/m adds f(norm(x)) to itself, and its norms are the same with
    /// ε/m²: no product of ours knows m.
    pub(super) fn multipliers(self, fields: &Fields, hidden_size: usize) -> Result<[f64; 3]> {
        if self != Family::Granite {
            let embedding = if self.traits().scaled_embedding { (hidden_size as f64).sqrt() } else { 1.0 };
            return Ok([embedding, 1.0, 1.0]);
        }
        let of = |key| multiplier(fields, key);
        let residual = of("residual_multiplier")?;
        Ok([of("embedding_multiplier")? / residual, residual.powi(-2), 1.0 / of("logits_scaling")?])
    }

    /// Sliding windows per layer, as the family's class in transformers reads its config.
    pub(super) fn windows(self, fields: &Fields, layers: usize) -> Result<Vec<Option<usize>>> {
        let on = match self {
            Family::Llama | Family::Gemma | Family::Granite | Family::Olmo2 => false,
            Family::Mistral | Family::Gemma2 | Family::Gemma3 | Family::Olmo3 => true,
            Family::Phi3 => fields.has("sliding_window"),
            Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 => fields.flag("use_sliding_window")?,
        };
        // Null turns the window off; where the field is missing, transformers takes its own default.
        let window = if fields.has("sliding_window") { fields.size("sliding_window")? } else { Some(4096) };
        let Some(window) = window.filter(|_| on) else {
            return Ok(vec![None; layers]);
        };
        if matches!(self, Family::Mistral | Family::Phi3) {
            return Ok(vec![Some(window); layers]);
        }
        let Some(Value::Array(kinds)) = fields.get("layer_types") else {
            let first = fields.count("max_window_layers")?.unwrap_or(28);
            let pattern = fields.size("sliding_window_pattern")?.unwrap_or(6);
            let windowed = |layer: usize| match self {
                Family::Gemma2 => layer.is_multiple_of(2),
                Family::Gemma3 => !(layer + 1).is_multiple_of(pattern),
                Family::Olmo3 => !(layer + 1).is_multiple_of(4),
                _ => layer >= first,
            };
            return Ok((0..layers).map(|layer| windowed(layer).then_some(window)).collect());
        };
        if kinds.len() != layers {
            let [expected, found] = [layers, kinds.len()].map(|n| format!("a list of {n}"));
            return Err(fields.wrong("layer_types", &expected, &found));
        }
        let kind = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(Some(window)),
            _ => Err(fields.wrong("layer_types", "`full_attention` or `sliding_attention` each", &brief(kind))),
        };
        kinds.iter().map(kind).collect()
    }
}

/// One of Granite's, 1 where it is not stated. Beyond any that is in use activations would overflow, and answers mean nothing.
fn multiplier(fields: &Fields, key: &str) -> Result<f64> {
    let value = fields.positive(key)?.unwrap_or(1.0);
    if (1e-6..=1e6).contains(&value) {
        return Ok(value);
    }
    Err(fields.wrong(key, "between 1e-6 and 1e6", &value.to_string()))
}

impl ModelConfig {
    /// What a block's norms are called: those before attention and feed-forward, and those after each, where there are such.
    pub(crate) fn norm_names(&self) -> [Option<[&'static str; 2]>; 2] {
        let after = ["post_attention_layernorm", "post_feedforward_layernorm"];
        match (self.traits.pre_norms, self.traits.post_norms) {
            (true, false) => [Some(["input_layernorm", "post_attention_layernorm"]), None],
            (true, true) => [Some(["input_layernorm", "pre_feedforward_layernorm"]), Some(after)],
            (false, _) => [None, Some(after)],
        }
    }
}
