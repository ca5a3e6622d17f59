//! Special tokens, as tokenizer_config.json and special_tokens_map.json name them.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::text::fields::{Fields, brief};

/// In the order in which transformers adds those that the tokenizer does not have.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The named ones, and others.
#[derive(Debug, Default)]
pub(crate) struct Specials {
    pub(crate) named: BTreeMap<String, String>,
    others: Vec<String>,
}

impl Specials {
    /// Fails on what is neither a text nor an object with `content`.
    pub(crate) fn open(dir: &Path) -> Result<Specials> {
        let mut found = Specials::default();
        // The first file wins, as in transformers.
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let file = dir.join(name);
            if !file.exists() {
                continue;
            }
            let fields = Fields::open(&file)?;
            let text = |key: &str, value: &serde_json::Value| {
                let text = value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string);
                text.ok_or_else(|| fields.wrong(key, "a text, or an object with `content`", &brief(value)))
            };
            for key in NAMES {
                let Some(value) = fields.get(key) else { continue };
                let text = text(key, value)?;
                found.named.entry(key.to_string()).or_insert(text);
            }
            const OTHERS: &str = "additional_special_tokens";
            for value in fields.get(OTHERS).and_then(|value| value.as_array()).into_iter().flatten() {
                found.others.push(text(OTHERS, value)?);
            }
        }
        Ok(found)
    }

    /// All of them in the order in which transformers adds them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &String> {
        NAMES.iter().filter_map(|name| self.named.get(*name)).chain(&self.others)
    }
}
