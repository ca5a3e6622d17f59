//! `DIR[+ADAPTER][,FORM]`: a language model that is asked in a form.
//!
//! Nothing is asked for as JSON: the model's turn is made to begin with one mark, and what stands before the other is the prompt.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{Attacker, Draft, Form, Task, Way, Written};
use crate::error::Result;
use crate::model::{Ask, Decoding, ModelSpec, Pretrained, Version};
use crate::ops::Ops;
use crate::text::Prompt;
use crate::text::output::sha256;
use crate::text::template::Arguments;

pub(super) struct Model<B: Ops> {
    name: String,
    model: Pretrained<B>,
    form: Form,
    ways: Vec<Way>,
    marks: Vec<String>,
}

impl<B: Ops> Model<B> {
    /// Opens the model and finds its form. Fails where either is none.
    pub(super) fn open(
        ops: &B,
        spec: &ModelSpec,
        form: Option<&Path>,
        arguments: &Arguments,
        batch_tokens: usize,
        interrupt: Arc<AtomicBool>,
    ) -> Result<Self> {
        let (form, text) = Form::find(&spec.dir, form)?;
        let model = Pretrained::open_with(ops, spec, arguments, batch_tokens, interrupt)?;
        model.transformer.config.expect_causal()?;
        let name = format!("{}+{}", model.identity()?, &sha256(text.as_bytes())[..6]);
        let marks = [&form.open, &form.close].map(|mark| mark.trim().to_string()).to_vec();
        Ok(Model { name, model, ways: form.ways(), marks, form })
    }
}

impl<B: Ops> Attacker for Model<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn ways(&self) -> &[Way] {
        &self.ways
    }

    fn marks(&self) -> &[String] {
        &self.marks
    }

    fn write(&mut self, tasks: &[Task], seed: u64) -> Result<Vec<Written>> {
        let Form { open, temperature, top_p, max_new_tokens, .. } = &self.form;
        let ask = |task: &Task| Ask {
            forced: Some((open.clone(), usize::MAX)),
            ..Ask::new(Prompt::user(self.form.told(task)), task.number)
        };
        let asks: Vec<Ask> = tasks.iter().map(ask).collect();
        let greedy = Decoding::greedy(*max_new_tokens);
        let decoding = Decoding { temperature: *temperature, top_p: *top_p, seed, ..greedy };
        let answers = self.model.generate(Version::Current, &asks, &decoding)?;
        let written = |answer: Result<_>| match answer {
            Ok(crate::model::Answer { text, .. }) => match self.form.between(&text) {
                Some(prompt) => Written::Prompt(Draft::new(prompt)),
                None => Written::Unclosed,
            },
            Err(_) => Written::Failed,
        };
        Ok(answers.into_iter().map(written).collect())
    }
}
