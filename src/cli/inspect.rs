//! `ares inspect MODEL`.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::Session;
use crate::error::{Error, Result};
use crate::model::pretrained::ModelSpec;
use crate::model::{AdapterFile, Checkpoint, Head, ModelConfig, WeightSource};
use crate::report::numbers::count;
use crate::report::{Align, Cell, Mark, Table};
use crate::run::args;
use crate::text::Rendering;

/// Look into a model's folder: architecture, sizes, head, template, and what is wrong with it
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Folder with config.json, model.safetensors and tokenizer.json; +ADAPTER is inspected too
    #[arg(value_name = "DIR[+ADAPTER]", value_parser = args::model)]
    model: ModelSpec,
}

/// What the folder holds; a part that cannot be used is null and stands among `problems`.
struct Inspection {
    json: Value,
    table: Table,
}

impl Inspect {
    /// Looks at every part, also after another one failed; the first problem is the command's error.
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        let config = ModelConfig::open(&self.model.dir)?;
        let mut found = Inspection::of(&config);
        let parts =
            [self.weights(&config, &mut found), self.text(&config, &mut found), self.adapter(&config, &mut found)];
        let problems: Vec<Error> = parts.into_iter().filter_map(Result::err).collect();
        found.json["problems"] = problems.iter().map(ToString::to_string).collect();
        for problem in &problems {
            found.table.row(vec![Cell::new("problem", Mark::Bad), problem.to_string().into()]);
        }
        session.inform(&found.table, &found.json)?;
        problems.into_iter().next().map_or(Ok(()), Err)
    }

    fn weights(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.model.dir, config)?;
        let mut parameters = 0;
        let mut dtypes = BTreeMap::<String, usize>::new();
        for name in checkpoint.tensor_names() {
            parameters += checkpoint.shape(name)?.iter().product::<usize>() as u64;
            *dtypes.entry(format!("{:?}", checkpoint.dtype(name)?)).or_default() += 1;
        }
        let tensors: Vec<String> = dtypes.iter().map(|(dtype, n)| format!("{dtype} × {n}")).collect();
        found.row("parameters", count(Some(parameters as f64)));
        found.row("tensors", tensors.join(", "));
        found.row("size on disk", format!("{}B", count(Some(checkpoint.bytes() as f64))));
        found.json["parameters"] = parameters.into();
        found.json["dtypes"] = json!(dtypes);
        found.json["bytes"] = checkpoint.bytes().into();
        found.json["files"] = checkpoint.files().map(|path| path.display().to_string()).collect();
        Ok(())
    }

    fn text(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let rendering = Rendering::open(&self.model.dir, &config.limits())?;
        let hash = rendering.tokenizer.sha256.as_str();
        found.row("chat template", if rendering.has_template() { "yes" } else { "none: use --raw" });
        found.row("ends a turn", rendering.end_tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
        found.row("tokenizer", &hash[..16]);
        found.json["tokenizer_sha256"] = hash.into();
        found.json["chat_template"] = rendering.has_template().into();
        found.json["end_tokens"] = rendering.end_tokens.clone().into();
        Ok(())
    }

    fn adapter(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let Some(dir) = &self.model.adapter else { return Ok(()) };
        let file = AdapterFile::open(dir, config)?;
        let (rank, lora_alpha, target_modules) = (file.rank, file.lora_alpha, file.target_modules());
        let head = if file.score().is_some() { ", score head" } else { "" };
        found.row("adapter", format!("rank {rank}, alpha {lora_alpha}, on {}{head}", target_modules.join(" ")));
        found.json["adapter"] = json!({
            "rank": rank, "lora_alpha": lora_alpha, "target_modules": target_modules, "score_head": file.score().is_some(),
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
        let extras: Vec<&str> = extras.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
        let head = match config.head {
            Head::Causal => "language model".to_string(),
            Head::Classification { labels: 1 } => "score (reward model or judge)".to_string(),
            Head::Classification { labels } => format!("classifier with {labels} labels"),
        };
        let rope = match &config.rope.scaling {
            None => format!("θ = {}", config.rope.theta),
            Some(scaling) => format!("θ = {}, low frequencies stretched by {}", config.rope.theta, scaling.factor),
        };
        let windows: Vec<Option<usize>> = (0..config.layers).map(|layer| config.window(layer)).collect();
        let widths = windows.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let json = json!({
            "family": config.family.name(), "head": head, "layers": config.layers, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "vocab_size": config.vocab_size, "context": config.max_position_embeddings, "sliding_windows": windows,
            "rope": rope, "extras": extras, "parameters": null, "dtypes": {}, "bytes": null, "files": [],
            "tokenizer_sha256": null, "chat_template": null, "end_tokens": [], "adapter": null, "problems": [],
        });
        let mut found = Inspection { json, table: Table::new(&[("what", Align::Left), ("found", Align::Left)]) };
        found.row("architecture", config.family.name());
        found.row("head", head);
        found.row("layers", config.layers.to_string());
        found.row("hidden × feed-forward", format!("{} × {}", config.hidden_size, config.intermediate_size));
        found.row("heads (key/value)", format!("{heads} ({kv_heads}), {head_dim} wide"));
        found.row("vocabulary", config.vocab_size.to_string());
        found.row("context", config.max_position_embeddings.to_string());
        found.row("rotary embedding", rope);
        found.row("sliding windows", widths);
        found.row("extras", extras.join(", "));
        found
    }

    /// A line of the table, unless there is nothing to say.
    fn row(&mut self, what: &str, found: impl Into<String>) {
        let found = found.into();
        if !found.is_empty() {
            self.table.row(vec![what.into(), found.into()]);
        }
    }
}
