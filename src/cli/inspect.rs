//! `ares inspect MODEL`.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::{Session, args};
use crate::error::{Error, Result};
use crate::model::pretrained::ModelSpec;
use crate::model::{AdapterFile, Checkpoint, Head, ModelConfig, Weights};
use crate::report::numbers::count;
use crate::report::{Align, Mark, Table};
use crate::text::Rendering;

/// Look into a model's folder: architecture, sizes, head, template, and what is wrong with it
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Folder with config.json, model.safetensors and tokenizer.json; +ADAPTER is inspected too
    #[arg(value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    model: ModelSpec,
}

/// What the folder holds; a part that cannot be used is null and stands among `problems`.
#[derive(Debug, Default, Serialize)]
struct Inspection {
    family: &'static str,
    head: String,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    context: usize,
    sliding_windows: Vec<Option<usize>>,
    rope: String,
    extras: Vec<&'static str>,
    parameters: Option<u64>,
    dtypes: BTreeMap<String, usize>,
    bytes: Option<u64>,
    files: Vec<String>,
    tokenizer_sha256: Option<String>,
    chat_template: Option<bool>,
    end_tokens: Vec<u32>,
    adapter: Option<AdapterFound>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct AdapterFound {
    rank: usize,
    lora_alpha: f64,
    target_modules: Vec<&'static str>,
    score_head: bool,
}

impl Inspect {
    /// Looks at every part, also after another one failed; the first problem is the command's error.
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let config = ModelConfig::open(&self.model.dir)?;
        let mut found = Inspection::of(&config);
        let mut problems: Vec<Error> = Vec::new();
        problems.extend(self.weights(&config, &mut found).err());
        problems.extend(self.text(&config, &mut found).err());
        problems.extend(self.adapter(&config, &mut found).err());
        found.problems = problems.iter().map(ToString::to_string).collect();
        session.inform(&found.table(), &found)?;
        problems.into_iter().next().map_or(Ok(()), Err)
    }

    fn weights(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.model.dir, config)?;
        let mut parameters = 0;
        for name in checkpoint.tensor_names() {
            parameters += checkpoint.shape(name)?.iter().product::<usize>() as u64;
            *found.dtypes.entry(format!("{:?}", checkpoint.dtype(name)?)).or_default() += 1;
        }
        found.parameters = Some(parameters);
        found.bytes = Some(checkpoint.bytes());
        found.files = checkpoint.files().map(|path| path.display().to_string()).collect();
        Ok(())
    }

    fn text(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let rendering = Rendering::open(&self.model.dir, &config.limits())?;
        found.tokenizer_sha256 = Some(rendering.tokenizer().sha256().to_string());
        found.chat_template = Some(rendering.has_template());
        found.end_tokens = rendering.end_tokens().to_vec();
        Ok(())
    }

    fn adapter(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let Some(dir) = &self.model.adapter else { return Ok(()) };
        let file = AdapterFile::open(dir, config)?;
        found.adapter = Some(AdapterFound {
            rank: file.rank,
            lora_alpha: file.lora_alpha,
            target_modules: file.target_modules(),
            score_head: file.score().is_some(),
        });
        Ok(())
    }
}

impl Inspection {
    fn of(config: &ModelConfig) -> Inspection {
        let extras = [
            (config.tie_word_embeddings && config.head == Head::Causal, "tied embeddings"),
            (config.qkv_bias, "biases on q, k, v"),
            (config.qk_norm, "norm over q and k"),
        ];
        Inspection {
            family: config.family.name(),
            head: match config.head {
                Head::Causal => "language model".to_string(),
                Head::Classification { labels: 1 } => "score (reward model or judge)".to_string(),
                Head::Classification { labels } => format!("classifier with {labels} labels"),
            },
            layers: config.layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            context: config.max_position_embeddings,
            sliding_windows: (0..config.layers).map(|layer| config.window(layer)).collect(),
            rope: match &config.rope.scaling {
                None => format!("θ = {}", config.rope.theta),
                Some(scaling) => format!("θ = {}, low frequencies stretched by {}", config.rope.theta, scaling.factor),
            },
            extras: extras.into_iter().filter_map(|(has, name)| has.then_some(name)).collect(),
            ..Inspection::default()
        }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[("what", Align::Left), ("found", Align::Left)]);
        let windows: Vec<String> = self.sliding_windows.iter().flatten().map(ToString::to_string).collect();
        let dtypes: Vec<String> = self.dtypes.iter().map(|(dtype, n)| format!("{dtype} × {n}")).collect();
        let known = |value: Option<String>| value.unwrap_or_else(|| "–".to_string());
        let adapter = self.adapter.as_ref().map(|a| {
            let head = if a.score_head { ", score head" } else { "" };
            format!("rank {}, alpha {}, on {}{head}", a.rank, a.lora_alpha, a.target_modules.join(" "))
        });
        let template = self.chat_template.map(|has| if has { "yes" } else { "none: use --raw" }.to_string());
        let rows = [
            ("architecture", self.family.to_string()),
            ("head", self.head.clone()),
            ("parameters", count(self.parameters.map(|n| n as f64))),
            ("layers", self.layers.to_string()),
            ("hidden × feed-forward", format!("{} × {}", self.hidden_size, self.intermediate_size)),
            ("heads (key/value)", format!("{} ({}), {} wide", self.heads, self.kv_heads, self.head_dim)),
            ("vocabulary", self.vocab_size.to_string()),
            ("context", self.context.to_string()),
            ("rotary embedding", self.rope.clone()),
            ("sliding windows", windows.join(" ")),
            ("extras", self.extras.join(", ")),
            ("tensors", dtypes.join(", ")),
            ("size on disk", known(self.bytes.map(|bytes| format!("{}B", count(Some(bytes as f64)))))),
            ("chat template", known(template)),
            ("ends a turn", format!("{:?}", self.end_tokens)),
            ("tokenizer", known(self.tokenizer_sha256.as_ref().map(|hash| hash.chars().take(16).collect()))),
            ("adapter", known(adapter)),
        ];
        for (what, found) in rows.into_iter().filter(|(_, found)| !matches!(found.as_str(), "" | "–" | "[]")) {
            table.row(vec![what.into(), found.into()]);
        }
        for problem in &self.problems {
            table.row(vec![crate::report::Cell::new("problem", Mark::Bad), problem.as_str().into()]);
        }
        table
    }
}
