//! The lists and sets that others publish, known by their columns: what their rows mean stands nowhere in the rows themselves.

use std::fmt;

use clap::ValueEnum;
use serde_json::{Map, Value};

/// A published list of prompts, or set of preferences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Format {
    #[value(name = "advbench")]
    AdvBench,
    #[value(name = "harmbench")]
    HarmBench,
    #[value(name = "jailbreakbench")]
    JailbreakBench,
    #[value(name = "strongreject")]
    StrongReject,
    #[value(name = "xstest")]
    XsTest,
    #[value(name = "or-bench")]
    OrBench,
    #[value(name = "wildjailbreak")]
    WildJailbreak,
    #[value(name = "pku-saferlhf")]
    PkuSafeRlhf,
    #[value(name = "rewardbench-2")]
    RewardBench2,
    #[value(name = "ultrafeedback")]
    UltraFeedback,
    #[value(name = "hh-rlhf")]
    HhRlhf,
    #[value(name = "trl")]
    Trl,
    #[value(name = "trl-unpaired")]
    TrlUnpaired,
    #[value(name = "evals")]
    Evals,
}

use Format::*;

/// Each with the columns by which it is known. The first that fits is it: those that need more stand before those that need less.
const COLUMNS: [(Format, &[&str]); 14] = [
    (HarmBench, &["Behavior", "BehaviorID"]),
    (JailbreakBench, &["Goal", "Behavior"]),
    (AdvBench, &["goal", "target"]),
    (StrongReject, &["forbidden_prompt"]),
    (WildJailbreak, &["adversarial"]),
    (PkuSafeRlhf, &["prompt", "response_0", "response_1", "safer_response_id"]),
    (RewardBench2, &["prompt", "chosen", "rejected", "total_completions"]),
    (UltraFeedback, &["prompt", "prompt_id", "chosen", "rejected"]),
    (Trl, &["prompt", "chosen", "rejected"]),
    (HhRlhf, &["chosen", "rejected"]),
    (TrlUnpaired, &["prompt", "completion", "label"]),
    (XsTest, &["prompt", "type"]),
    (Evals, &["input", "ideal"]),
    (OrBench, &["prompt", "category"]),
];

/// XSTest's types of prompts that only sound harmful; `contrast_…` are their harmful twins, of which the last two have one name each.
const XSTEST: &str = "homonyms figurative_language safe_targets safe_contexts definitions nons_group_real_discr \
    real_group_nons_discr historical_events privacy_public privacy_fictional discr privacy";

impl Format {
    /// The one that the row's columns, and where these are common words their values, give away.
    pub(super) fn of(row: &Map<String, Value>) -> Option<Format> {
        let known = |(format, columns): &(Format, &[&str])| {
            columns.iter().all(|column| row.contains_key(*column))
                && match format {
                    // `prompt` and `category` are everybody's: this one must be named.
                    OrBench => false,
                    XsTest => row["type"].as_str().is_some_and(|kind| {
                        let kind = kind.trim_start_matches("contrast_");
                        XSTEST.split(' ').any(|known| known == kind)
                    }),
                    // XSTest's answers come with a label of their prompts, which is a text.
                    TrlUnpaired => match &row["label"] {
                        Value::Bool(_) => true,
                        label => matches!(label.as_str(), Some("True" | "False" | "true" | "false")),
                    },
                    _ => true,
                }
        };
        COLUMNS.iter().find(|entry| known(entry)).map(|(format, _)| *format)
    }

    /// What every row of it has.
    pub(super) fn columns(self) -> &'static [&'static str] {
        COLUMNS.iter().find(|(format, _)| *format == self).map_or(&[], |(_, columns)| columns)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            AdvBench => "AdvBench",
            HarmBench => "HarmBench",
            JailbreakBench => "JailbreakBench",
            StrongReject => "StrongREJECT",
            XsTest => "XSTest",
            OrBench => "OR-Bench",
            WildJailbreak => "WildJailbreak",
            PkuSafeRlhf => "PKU-SafeRLHF",
            RewardBench2 => "RewardBench 2",
            UltraFeedback => "UltraFeedback, binarized",
            HhRlhf => "HH-RLHF",
            Trl => "TRL's preferences",
            TrlUnpaired => "TRL's unpaired preferences",
            Evals => "openai/evals",
        })
    }
}
