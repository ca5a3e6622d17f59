//! `cmd:PROGRAM ARGS`: an attacker in a process of its own.
//!
//! Each question is a [`Task`] with an `id`, its answer `{"id": 7, "prompt": "…"}`, with `safe` (y⁺) and
//! `harmful` (y⁻) where it proposes answers; [`Dialogue`] says what holds for all such programs.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use super::{Attacker, Draft, Task, Way, Written};
use crate::error::Result;
use crate::text::dialogue::Dialogue;

pub(super) struct Program(Dialogue);

impl Program {
    pub(super) fn open(words: &[String], interrupt: Arc<AtomicBool>) -> Result<Program> {
        Dialogue::open("attacker", words, interrupt).map(Program)
    }
}

impl Attacker for Program {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn ways(&self) -> &[Way] {
        &Way::ALL
    }

    fn marks(&self) -> &[String] {
        &[]
    }

    fn write(&mut self, tasks: &[Task], seed: u64) -> Result<Vec<Written>> {
        let question = |task: &Task| {
            let mut question = json!(task);
            question["seed"] = seed.into();
            question
        };
        let answers = self.0.ask::<Draft>(tasks.iter().map(question), r#""prompt": "…""#)?;
        let written = |answer: Result<Draft>| {
            answer
                .map_or(Written::Failed, |draft| Written::Prompt(Draft { prompt: draft.prompt.trim().into(), ..draft }))
        };
        Ok(answers.into_iter().map(written).collect())
    }
}
