//! `config.json`: what a checkpoint promises to be. Valid by construction: whoever holds a [`ModelConfig`] need not check it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::ops::Activation;
use crate::text::IdLimits;
use crate::text::fields::{Fields, brief};

mod family;
mod head;
mod rope;
mod scaling;
#[cfg(test)]
pub(super) mod tests;

pub use family::Family;
pub(crate) use family::Traits;
pub use head::Head;
pub(crate) use head::ScoreRules;
use head::architecture;
pub(crate) use head::label_names;
pub(crate) use rope::{RopeConfig, Ropes};

/// Deeper than any model there is, and longer than any context: a damaged number must not ask for terabytes.
const MAX_LAYERS: usize = 10_000;
const MAX_POSITIONS: usize = 1 << 24;

/// Architecture and sizes of one checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The file it was read from, for messages.
    pub(crate) file: PathBuf,
    pub(crate) family: Family,
    pub head: Head,
    /// V
    pub vocab_size: usize,
    /// C
    pub hidden_size: usize,
    /// F
    pub intermediate_size: usize,
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    pub(crate) rms_norm_eps: f32,
    /// The longest context, in tokens.
    pub(crate) max_position_embeddings: usize,
    /// The LM head is the embedding, transposed.
    pub(crate) tie_word_embeddings: bool,
    /// What its family does beside the others.
    pub(crate) traits: Traits,
    pub(crate) activation: Activation,
    /// What rows of the embedding are multiplied with.
    pub(crate) embedding_scale: f32,
    /// And the final norm's gains, and with them the LM head's logits.
    pub(crate) logit_scale: f32,
    /// Scores of attention are q·k times this.
    pub(crate) attention_scale: f32,
    /// Scores s of attention are c·tanh(s/c).
    pub(crate) attention_cap: Option<f32>,
    /// So are the LM head's logits.
    pub(crate) logit_cap: Option<f32>,
    pub(crate) ropes: Ropes,
    /// What ends a turn: config.json's and generation_config.json's, each once. May be empty.
    pub eos_token_ids: Vec<u32>,
    /// SHA-256, in hex, of the tokenizer.json this model was trained with (`ares_tokenizer_sha256`).
    pub(crate) tokenizer_sha256: Option<String>,
    /// Of a classifier, in the order of its scores; empty where the config names none.
    pub(crate) label_names: Vec<String>,
    /// Its labels do not exclude each other (`problem_type`).
    pub(crate) multi_label: bool,
    /// How a classifier's head is read.
    pub(crate) score: ScoreRules,
    /// Per layer: how many keys, the query's own included, a query sees.
    pub(crate) windows: Vec<Option<usize>>,
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` where there is one, of a model's folder.
    pub fn open(dir: &Path) -> Result<ModelConfig> {
        let file = dir.join("config.json");
        if !file.exists() {
            let found = match dir.exists() {
                true if dir.is_dir() => "a folder without config.json",
                true => "a file",
                false => "nothing",
            };
            let remedy = "name a folder with config.json, model.safetensors and tokenizer.json";
            return Err(Error::file(dir, "a model's folder", remedy)(found));
        }
        let mut config = ModelConfig::from_fields(&Fields::open(&file)?)?;
        let generation = dir.join("generation_config.json");
        if generation.exists() {
            config.add_eos(&Fields::open(&generation)?)?;
        }
        Ok(config)
    }

    /// `text` is what `file` holds.
    pub fn parse(file: &Path, text: &str) -> Result<ModelConfig> {
        ModelConfig::from_fields(&Fields::parse(file, text)?)
    }

    /// How many keys, its own included, a query of `layer` sees; all before it when `None`.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// What [`Rendering::open`](crate::text::Rendering::open) must know of the model.
    pub fn limits(&self) -> IdLimits<'_> {
        IdLimits {
            vocab_size: self.vocab_size,
            context: self.max_position_embeddings,
            eos_token_ids: &self.eos_token_ids,
            tokenizer_sha256: self.tokenizer_sha256.as_deref(),
            pad: self.skipped_pad(),
        }
    }

    pub fn is_causal(&self) -> bool {
        self.head == Head::Causal
    }

    /// Scores per sequence; 0 for a language model.
    pub fn labels(&self) -> usize {
        match self.head {
            Head::Causal => 0,
            Head::Classification { labels } => labels,
        }
    }

    /// Fails unless this is a causal language model.
    pub(crate) fn expect_causal(&self) -> Result<()> {
        self.expect(Head::Causal, "a language model is wanted here")
    }

    /// Fails unless this is a sequence classifier with one label: a reward model or a judge.
    pub(crate) fn expect_score(&self) -> Result<()> {
        self.expect(Head::Classification { labels: 1 }, "a reward model or judge is wanted here")
    }

    fn expect(&self, expected: Head, remedy: &str) -> Result<()> {
        if self.head == expected {
            return Ok(());
        }
        let family = self.family.name();
        let [expected, found] = [expected, self.head].map(|head| match head {
            Head::Causal => format!("{family}ForCausalLM"),
            Head::Classification { labels: 1 } => format!("{family}ForSequenceClassification with one label"),
            Head::Classification { labels } => format!("{family}ForSequenceClassification with {labels} labels"),
        });
        Err(Error::File { file: self.file.clone(), expected, found, remedy: remedy.into() })
    }

    fn from_fields(fields: &Fields) -> Result<ModelConfig> {
        let (family, head, score) = architecture(fields)?;
        refuse_unsupported(fields, family)?;
        let hidden_size = fields.required_size("hidden_size")?;
        let (heads, kv_heads, head_dim) = attention_sizes(fields, family, hidden_size)?;
        let at_most = |key, most| match fields.required_size(key)? {
            size if size <= most => Ok(size),
            size => Err(fields.wrong(key, &format!("at most {most}"), &size.to_string())),
        };
        let [embedding_scale, eps_scale, logit_scale] = family.multipliers(fields, hidden_size)?;
        let (attention_scale, [attention_cap, logit_cap]) = family.scores(fields, head_dim)?;
        let layers = at_most("num_hidden_layers", MAX_LAYERS)?;
        let windows = family.windows(fields, layers)?;
        let max_position_embeddings = at_most("max_position_embeddings", MAX_POSITIONS)?;
        let ropes = Ropes::read(fields, family, max_position_embeddings, &windows)?;
        ropes.kinds.iter().try_for_each(|kind| kind.check(fields, head_dim))?;
        let mut config = ModelConfig {
            file: fields.file.clone(),
            family,
            head,
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: (eps_scale * fields.positive("rms_norm_eps")?.unwrap_or(family.traits().eps)) as f32,
            max_position_embeddings: ropes.context(max_position_embeddings),
            tie_word_embeddings: match fields.has("tie_word_embeddings") {
                true => fields.flag("tie_word_embeddings")?,
                false => family.traits().tied,
            },
            traits: family.traits(),
            activation: family.activation(fields)?,
            embedding_scale: embedding_scale as f32,
            logit_scale: logit_scale as f32,
            attention_scale,
            attention_cap,
            logit_cap,
            ropes,
            eos_token_ids: Vec::new(),
            tokenizer_sha256: fields.text("ares_tokenizer_sha256")?.map(str::to_ascii_lowercase),
            label_names: label_names(fields)?,
            multi_label: fields.text("problem_type")? == Some("multi_label_classification"),
            score,
            windows,
        };
        for key in ["bos_token_id", "pad_token_id"] {
            fields.token(key)?.map_or(Ok(()), |id| config.check_token(fields, key, id))?;
        }
        config.add_eos(fields)?;
        Ok(config)
    }

    fn add_eos(&mut self, fields: &Fields) -> Result<()> {
        for id in fields.tokens("eos_token_id")? {
            self.check_token(fields, "eos_token_id", id)?;
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }

    fn check_token(&self, fields: &Fields, key: &str, id: u32) -> Result<()> {
        if (id as usize) < self.vocab_size {
            return Ok(());
        }
        Err(fields.wrong(key, &format!("below vocab_size ({})", self.vocab_size), &id.to_string()))
    }
}

const NOT_COMPUTED: &str = "ares does not compute this: use a checkpoint without it";

/// Settings that would change the computation into one that ares does not do.
fn refuse_unsupported(fields: &Fields, family: Family) -> Result<()> {
    // Qwen2 has its biases whatever the config says; elsewhere the flag also biases the output projection.
    let flags: &[&str] = match family {
        Family::Qwen2 => &["use_mrope"],
        _ => &["attention_bias", "mlp_bias", "use_bidirectional_attention"],
    };
    for key in flags {
        if fields.flag(key)? {
            return Err(fields.refuse(key, "false", "true", NOT_COMPUTED));
        }
    }
    for parent in [Some(fields.clone()), fields.object("rope_parameters")?].into_iter().flatten() {
        if family == Family::Phi3 {
            break; // turns parts of heads
        }
        match parent.number("partial_rotary_factor")? {
            None | Some(1.0) => {}
            Some(part) => {
                return Err(parent.refuse("partial_rotary_factor", "1 (whole heads)", &part.to_string(), NOT_COMPUTED));
            }
        }
    }
    if let Some(quantized) = fields.get("quantization_config") {
        let remedy = "use the unquantised checkpoint (F32, F16 or BF16)";
        return Err(fields.refuse("quantization_config", "absent", &brief(quantized), remedy));
    }
    Ok(())
}

/// Query heads, key/value heads and head size, with each family's defaults in transformers.
fn attention_sizes(fields: &Fields, family: Family, hidden_size: usize) -> Result<(usize, usize, usize)> {
    let heads = fields.required_size("num_attention_heads")?;
    let kv_heads = fields.size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(fields.wrong("num_key_value_heads", &expected, &kv_heads.to_string()));
    }
    let stated = fields.size("head_dim")?.or(family.traits().head_dim);
    if !hidden_size.is_multiple_of(heads) && (stated.is_none() || family == Family::Llama) {
        let expected = format!("a multiple of num_attention_heads ({heads})");
        return Err(fields.wrong("hidden_size", &expected, &hidden_size.to_string()));
    }
    let head_dim = stated.unwrap_or(hidden_size / heads);
    if !head_dim.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "even, as rotary positions turn pairs", &head_dim.to_string()));
    }
    Ok((heads, kv_heads, head_dim))
}
