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
use crate::text::{Prompt, Rendering};

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
        let mut config = ModelConfig::open(&self.model.dir)?;
        let checkpoint = Checkpoint::open(&self.model.dir, &config)
            .and_then(|checkpoint| config.settle_head(&checkpoint).map(|()| checkpoint));
        let mut found = Inspection::of(&config);
        let parts = [
            checkpoint.and_then(|checkpoint| found.weights(&checkpoint)),
            self.text(&config, &mut found),
            self.adapter(&config, &mut found),
        ];
        let problems: Vec<Error> = parts.into_iter().filter_map(Result::err).collect();
        found.json["problems"] = problems.iter().map(ToString::to_string).collect();
        for problem in &problems {
            found.table.row(vec![Cell::new("problem", Mark::Bad), problem.to_string().into()]);
        }
        session.inform(&found.table, &found.json)?;
        problems.into_iter().next().map_or(Ok(()), Err)
    }

    fn text(&self, config: &ModelConfig, found: &mut Inspection) -> Result<()> {
        let mut rendering = Rendering::open(&self.model.dir, &config.limits())?;
        let hash = rendering.tokenizer.sha256.as_str();
        found.row("chat template", if rendering.has_template() { "yes" } else { "none: use --raw" });
        if rendering.thinks() {
            found.row(
                "thinks",
                "before it answers, unless --template-arg enable_thinking=false (or what its template calls it)",
            );
        }
        found.row("ends a turn", rendering.end_tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
        found.row("tokenizer", &hash[..16]);
        found.json["tokenizer_sha256"] = hash.into();
        found.json["chat_template"] = rendering.has_template().into();
        found.json["end_tokens"] = rendering.end_tokens.clone().into();
        if config.is_causal() { Ok(()) } else { found.reading(config, &mut rendering) }
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
            (config.traits.qkv_bias, "biases on q, k, v"),
            (config.traits.qk_norm, "norm over q and k"),
            (config.traits.pre_norms && config.traits.post_norms, "norms after both halves of a block"),
            (!config.traits.pre_norms, "norms after both halves of a block alone"),
            (config.embedding_scale != 1.0, "scaled embedding"),
            (config.logit_scale != 1.0, "scaled logits"),
            (config.attention_cap.is_some(), "capped scores of attention"),
            (config.logit_cap.is_some() && config.head == Head::Causal, "capped logits"),
        ];
        let extras: Vec<&str> = extras.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
        let head = match config.head {
            Head::Causal => "language model".to_string(),
            Head::Classification { labels: 1 } => "score (reward model or judge)".to_string(),
            Head::Classification { labels } => format!("classifier with {labels} labels"),
        };
        let score = config.score.layout.as_ref().map(|layout| match (config.score.normalizer, config.score.normal) {
            (true, _) => format!("{}, then (r − μ)/σ of the checkpoint", layout.describe()),
            (false, Some([mean, std])) => format!("{}, then (r − {mean})/{std}", layout.describe()),
            (false, None) => layout.describe(),
        });
        let rope = config.ropes.to_string();
        let windows: Vec<Option<usize>> = (0..config.layers).map(|layer| config.window(layer)).collect();
        let widths = windows.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let json = json!({
            "family": config.family.name(), "head": head, "score_head": score, "score_read": null, "warnings": [], "layers": config.layers, "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "vocab_size": config.vocab_size, "context": config.max_position_embeddings, "sliding_windows": windows,
            "rope": rope, "extras": extras, "parameters": null, "dtypes": {}, "bytes": null, "files": [],
            "tokenizer_sha256": null, "chat_template": null, "end_tokens": [], "adapter": null, "problems": [],
        });
        let mut found = Inspection { json, table: Table::new(&[("what", Align::Left), ("found", Align::Left)]) };
        found.row("architecture", config.family.name());
        found.row("head", head);
        found.row("score head", score.unwrap_or_default());
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

    fn weights(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let mut parameters = 0;
        let mut dtypes = BTreeMap::<String, usize>::new();
        for name in checkpoint.tensor_names() {
            parameters += checkpoint.shape(name)?.iter().product::<usize>() as u64;
            *dtypes.entry(format!("{:?}", checkpoint.dtype(name)?)).or_default() += 1;
        }
        let tensors: Vec<String> = dtypes.iter().map(|(dtype, n)| format!("{dtype} × {n}")).collect();
        self.row("parameters", count(Some(parameters as f64)));
        self.row("tensors", tensors.join(", "));
        self.row("size on disk", format!("{}B", count(Some(checkpoint.bytes() as f64))));
        self.json["parameters"] = parameters.into();
        self.json["dtypes"] = json!(dtypes);
        self.json["bytes"] = checkpoint.bytes().into();
        self.json["files"] = checkpoint.files().map(|path| path.display().to_string()).collect();
        Ok(())
    }

    /// At which token of an exchange a classifier is read, and whether others would read it elsewhere.
    fn reading(&mut self, config: &ModelConfig, rendering: &mut Rendering) -> Result<()> {
        let prompt = if rendering.has_template() { Prompt::user("Hello") } else { Prompt::Raw("Hello".into()) };
        let pad = rendering.pad.take();
        let whole = rendering.full(&prompt, " there.")?;
        rendering.pad = pad;
        let (read, length) = (rendering.as_read(whole.clone()).tokens.len(), whole.tokens.len());
        let last: Vec<(u32, String)> = whole.tokens[length.saturating_sub(4)..]
            .iter()
            .map(|id| Ok((*id, rendering.tokenizer.decode(&[*id], false)?)))
            .collect::<Result<_>>()?;
        let shown: Vec<String> = last.iter().map(|(id, text)| format!("{id} {text:?}")).collect();
        self.row("an exchange ends in", shown.join(", "));
        self.row("is scored at", format!("token {read} of {length}"));
        self.json["score_read"] = json!({ "last_tokens": last, "position": read, "length": length });
        if config.score.pad.is_some_and(|pad| whole.tokens.last() == Some(&pad)) {
            let warning = format!(
                "the last token is pad_token_id: transformers reads before it, trainers that look at the last token read there; ares \
                 reads token {read} of {length}, as {} does",
                if read < length { "transformers" } else { "this model's class" },
            );
            self.table.row(vec![Cell::new("warning", Mark::Strong), warning.clone().into()]);
            self.json["warnings"] = json!([warning]);
        }
        Ok(())
    }

    /// A line of the table, unless there is nothing to say.
    fn row(&mut self, what: &str, found: impl Into<String>) {
        let found = found.into();
        if !found.is_empty() {
            self.table.row(vec![what.into(), found.into()]);
        }
    }
}
