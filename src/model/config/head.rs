//! What stands on top of a transformer, as the class in `config.json` and the weights' own tensors say.

use super::{Family, ModelConfig};
use crate::error::Result;
use crate::model::checkpoint::WeightSource;
use crate::model::encoder;
use crate::model::readout::Layout;
use crate::text::fields::Fields;

/// What stands on top of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Head {
    /// A distribution over the vocabulary.
    Causal,
    /// `labels` numbers, read at one token near the end; a reward model has one.
    Classification { labels: usize },
}

/// Classes of reward models that transformers does not have, by the name under which their trainers save them, and whether they look
/// for the last token that is no padding, as copies of transformers' own do; the others read the last one, whatever it is.
const REWARD_CLASSES: [(&str, bool); 7] = [
    ("RewardModel", false),
    ("GRewardModel", false),
    ("LlamaRewardModel", false),
    ("EurusRewardModel", false),
    ("LlamaForScore", false),
    ("INFORMForSequenceClassification", true),
    ("Qwen2ForRewardModel", true), // Qwen2.5-Math-RM, WorldPM
];

/// How a classifier's head is read.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ScoreRules {
    /// What the head's tensors are called (`value_head_prefix`, which OpenRLHF writes).
    pub(crate) prefix: Option<String>,
    /// The config says how many labels there are; where it does not, the head's shape does.
    labels_stated: bool,
    pub(crate) pad: Option<u32>,
    /// The last token that is not `pad` is read, as transformers does; else the last.
    skips_pad: bool,
    /// Scores are (r − μ)/σ, with μ and σ of the config.
    pub(crate) normal: Option<[f64; 2]>,
    /// Scores are (r − μ)/σ, with μ and σ² of the checkpoint's `normalizer` (`do_normalize`, which Safe-RLHF writes).
    pub(crate) normalizer: bool,
    /// Where the weights have been looked at: what they hold.
    pub(crate) layout: Option<Layout>,
}

impl ModelConfig {
    /// Takes over what `weights` say of a classifier's head: its layers and, unless the config states it, the number of its labels.
    pub(crate) fn settle_head(&mut self, weights: &impl WeightSource) -> Result<()> {
        let Head::Classification { labels } = &mut self.head else { return Ok(()) };
        let layout = Layout::find(weights, self.score.prefix.as_deref())?;
        if let Some(found) = layout.labels.filter(|_| !self.score.labels_stated) {
            *labels = found;
        }
        self.score.layout = Some(layout);
        Ok(())
    }

    /// The token that a classifier is not read at.
    pub(super) fn skipped_pad(&self) -> Option<u32> {
        self.score.pad.filter(|_| self.score.skips_pad)
    }

    /// Numbers that the head's first layer gives per row: the scores, where there is no other layer.
    pub(crate) fn score_units(&self) -> usize {
        self.score.layout.as_ref().and_then(|layout| layout.hidden).unwrap_or(self.labels())
    }

    /// Whether an adapter may carry a head of its own: only where the head is transformers' own, `score.weight`.
    pub(crate) fn has_plain_head(&self) -> bool {
        !self.is_causal() && self.score.layout.as_ref().is_none_or(Layout::is_plain)
    }
}

/// Family, head and how it is read, from `architectures`, whose single entry is a class name.
pub(super) fn architecture(fields: &Fields) -> Result<(Family, Head, ScoreRules)> {
    let names = fields.texts("architectures")?.unwrap_or_default();
    let refuse = |found: &str| fields.refuse("architectures", &supported(), found, "use a checkpoint of one of these");
    let [name] = names.as_slice() else {
        return Err(refuse(&if names.is_empty() { "none".to_string() } else { names.join(", ") }));
    };
    for family in Family::ALL {
        match name.strip_prefix(family.name()) {
            Some("ForCausalLM") => return Ok((family, Head::Causal, ScoreRules::default())),
            // transformers has none of Granite; Gemma 3's is the one without eyes.
            Some("ForSequenceClassification" | "TextForSequenceClassification") if family != Family::Granite => {
                return classifier(fields, family, true);
            }
            _ => {}
        }
    }
    let Some((_, skips_pad)) = REWARD_CLASSES.into_iter().find(|(class, _)| class == name) else {
        if encoder::classes().any(|class| class == name) {
            let remedy = "an encoder classifies answers, as --judge or --refusal model:DIR; it neither writes nor is trained here";
            return Err(fields.refuse("architectures", "a decoder", name, remedy));
        }
        return Err(refuse(name));
    };
    let kind = fields.text("model_type")?.unwrap_or("none");
    let family = Family::ALL.into_iter().find(|family| family.name().eq_ignore_ascii_case(kind)).ok_or_else(|| {
        let families = Family::ALL.map(|family| family.name().to_ascii_lowercase()).join(", ");
        fields.refuse("model_type", &format!("one of {families}"), kind, "use a checkpoint of one of these")
    })?;
    classifier(fields, family, skips_pad)
}

fn supported() -> String {
    let names: Vec<_> = Family::ALL.iter().map(|family| family.name()).collect();
    let others = REWARD_CLASSES.map(|(class, _)| class).join(", ");
    format!("one of {{{}}} ForCausalLM or ForSequenceClassification, or of {others}", names.join(", "))
}

/// A classifier's head; `skips_pad` where its class looks for the last token that is no padding.
fn classifier(fields: &Fields, family: Family, skips_pad: bool) -> Result<(Family, Head, ScoreRules)> {
    let stated = labels(fields)?;
    let normalizer = fields.flag("do_normalize")?;
    let normal = match (fields.number("mean")?, fields.positive("std")?) {
        (Some(mean), Some(std)) if !fields.has("normalize_reward") || fields.flag("normalize_reward")? => {
            Some([mean, std])
        }
        _ => None,
    };
    let rules = ScoreRules {
        prefix: fields.text("value_head_prefix")?.map(str::to_string),
        labels_stated: stated.is_some(),
        pad: if fields.has("pad_token_id") { fields.token("pad_token_id")? } else { family.traits().pad },
        skips_pad,
        normal,
        normalizer,
        layout: None,
    };
    Ok((family, Head::Classification { labels: stated.unwrap_or(2) }, rules))
}

/// transformers writes `id2label` and not the number; without either its default is two, whatever the head's shape.
fn labels(fields: &Fields) -> Result<Option<usize>> {
    match (fields.size("num_labels")?, fields.object("id2label")?) {
        (Some(labels), _) => Ok(Some(labels)),
        (None, Some(names)) => match names.iter().count() {
            0 => Err(fields.wrong("id2label", "an object with a name per label", "an empty one")),
            labels => Ok(Some(labels)),
        },
        (None, None) => Ok(None),
    }
}

/// The names in `id2label`, by their numbers; none unless they are 0, 1, 2, … each once.
pub(crate) fn label_names(fields: &Fields) -> Result<Vec<String>> {
    let Some(names) = fields.object("id2label")? else { return Ok(Vec::new()) };
    let mut found: Vec<(usize, String)> =
        names.iter().filter_map(|(id, name)| Some((id.parse().ok()?, name.as_str()?.to_string()))).collect();
    found.sort();
    let whole = found.len() == names.iter().count() && found.iter().enumerate().all(|(at, (id, _))| at == *id);
    Ok(if whole { found.into_iter().map(|(_, name)| name).collect() } else { Vec::new() })
}
