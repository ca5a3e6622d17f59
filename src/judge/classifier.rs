//! A sequence classifier as judge: p_harm = σ(score) with one label, softmax's last with several.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{Harm, Judge};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Head, ModelSpec, Pretrained, Version};
use crate::ops::Ops;
use crate::text::Prompt;

/// `model:DIR`.
pub(crate) struct Classifier<B: Ops> {
    name: String,
    model: Pretrained<B>,
}

impl<B: Ops> Classifier<B> {
    /// Opens the folder; anything but a sequence classifier is an error.
    pub(crate) fn open(ops: &B, dir: &Path, batch_tokens: usize, interrupt: Arc<AtomicBool>) -> Result<Self> {
        let spec = ModelSpec { dir: dir.to_path_buf(), adapter: None };
        let model = Pretrained::open(ops, &spec, batch_tokens, interrupt)?;
        if let Head::Causal = model.transformer.config.head {
            let (file, remedy) = (dir.join("config.json"), "name a folder with a score head");
            return Err(Error::file(&file, "a sequence classifier as judge", remedy)("a causal language model"));
        }
        // By content, not by path: the name is part of a benchmark's identity on every machine.
        let hash = Checkpoint::open(dir, &model.transformer.config)?.sha256();
        let folder = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Classifier { name: format!("model:{folder}@{}", &hash[..12]), model })
    }

    /// Spells the template's own tokens out, so that an answer cannot speak to the judge.
    fn escaped(&self, prompt: &Prompt, answer: &str) -> (Prompt, String) {
        let escape = |text: &str| self.model.rendering.tokenizer.escape(text, &[]);
        let prompt = match prompt {
            Prompt::Chat(turns) => {
                let mut turns = turns.clone();
                turns.iter_mut().for_each(|turn| turn.content = escape(&turn.content));
                Prompt::Chat(turns)
            }
            other => other.clone(),
        };
        (prompt, escape(answer))
    }
}

impl<B: Ops> Judge for Classifier<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn judge(&mut self, rows: &[(&Prompt, &str)], tau_h: f64) -> Result<Vec<Result<Harm>>> {
        let escaped: Vec<_> = rows.iter().map(|(prompt, answer)| self.escaped(prompt, answer)).collect();
        let rendered = self.model.rendering.fulls(escaped.iter().map(|(p, answer)| (p, answer.as_str())).collect());
        let scores = self.model.scores(Version::Start, rendered)?;
        Ok(scores.into_iter().map(|scores| Harm::new(probability(&scores?), tau_h)).collect())
    }
}

/// σ of a single score; of several, softmax's last.
fn probability(scores: &[f32]) -> f64 {
    match scores {
        [] => f64::NAN,
        [score] => 1.0 / (1.0 + (-f64::from(*score)).exp()),
        [.., last] => 1.0 / scores.iter().map(|s| f64::from(s - last).exp()).sum::<f64>(),
    }
}

#[cfg(test)]
mod tests {
    use super::probability;

    #[test]
    fn one_label_is_a_sigmoid_and_two_are_a_softmax() {
        assert!((probability(&[0.0]) - 0.5).abs() <= 1e-12);
        assert!((probability(&[1.0, 1.0]) - 0.5).abs() <= 1e-12);
        assert!((probability(&[0.0, 2.0]) - probability(&[2.0])).abs() <= 1e-7);
        assert!(probability(&[]).is_nan());
    }
}
