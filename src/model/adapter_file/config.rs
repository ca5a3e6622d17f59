//! `adapter_config.json`: what ares applies exactly as PEFT does is read, everything else is refused with its reason.

use std::collections::BTreeMap;

use super::AdapterFile;
use crate::error::Result;
use crate::text::fields::{Fields, brief};

const REMEDY: &str = "merge this adapter into its base with PEFT (`merge_and_unload`), and open the merged checkpoint";

/// The adapter without its tensors.
pub fn read(fields: &Fields) -> Result<AdapterFile> {
    refuse_unsupported(fields)?;
    let lora_alpha = fields.positive("lora_alpha")?;
    let task_type = fields.text("task_type")?.unwrap_or("CAUSAL_LM").to_string();
    if !matches!(task_type.as_str(), "CAUSAL_LM" | "SEQ_CLS") {
        return Err(fields.refuse("task_type", "CAUSAL_LM or SEQ_CLS", &task_type, "ares has no other heads"));
    }
    Ok(AdapterFile {
        rank: fields.required_size("r")?,
        lora_alpha: lora_alpha.ok_or_else(|| fields.wrong("lora_alpha", "a number above 0", "no such field"))?,
        use_rslora: fields.flag("use_rslora")?,
        task_type,
        base_model_name: fields.text("base_model_name_or_path")?.map(str::to_string),
        tensors: BTreeMap::new(),
    })
}

fn refuse_unsupported(fields: &Fields) -> Result<()> {
    let kind = fields.text("peft_type")?.unwrap_or("none");
    if kind != "LORA" {
        return Err(fields.refuse("peft_type", "LORA", kind, REMEDY));
    }
    let bias = fields.text("bias")?.unwrap_or("none");
    if bias != "none" {
        return Err(fields.refuse("bias", "`none` (the base stays frozen)", &format!("`{bias}`"), REMEDY));
    }
    for (flag, meaning) in [
        ("use_dora", "DoRA also trains magnitudes"),
        ("fan_in_fan_out", "the matrices are transposed"),
        ("lora_bias", "biases beside B"),
        ("use_qalora", "pooled inputs"),
        ("use_bdlora", "block-diagonal matrices"),
    ] {
        if fields.flag(flag)? {
            return Err(fields.refuse(flag, "false", &format!("true ({meaning})"), REMEDY));
        }
    }
    for (pattern, meaning) in [("rank_pattern", "ranks"), ("alpha_pattern", "alphas")] {
        let own = fields.object(pattern)?.map_or(0, |patterns| patterns.iter().count());
        if own > 0 {
            return Err(fields.refuse(pattern, "empty", &format!("{own} modules with {meaning} of their own"), REMEDY));
        }
    }
    for key in [
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
    ] {
        if let Some(value) = fields.get(key) {
            return Err(fields.refuse(key, "absent", &brief(value), REMEDY));
        }
    }
    refuse_changed_base(fields)
}

/// PiSSA and its kin move part of the base's weights into the adapter: without that changed base the adapter is wrong.
fn refuse_changed_base(fields: &Fields) -> Result<()> {
    let Some(init) = fields.get("init_lora_weights") else { return Ok(()) };
    match init.as_str() {
        None | Some("gaussian" | "eva" | "orthogonal") => Ok(()),
        Some(other) => {
            let found = format!("`{other}`, which changes the base's weights too");
            Err(fields.refuse("init_lora_weights", "one that leaves the base as it is", &found, REMEDY))
        }
    }
}
