//! `cmd:PROGRAM ARGS`: a judge in a process of its own.
//!
//! Each question is `{"id": 7, "messages": [{"role": …, "content": …}, …], "response": "…"}`, its answer `{"id": 7, "p_harm": 0.9}`.
//! `scripts/judge_endpoint.py` is one; [`Dialogue`] says what holds for all such programs.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use serde_json::json;

use super::{Harm, Judge};
use crate::error::Result;
use crate::text::Prompt;
use crate::text::dialogue::Dialogue;

pub(crate) struct Program(Dialogue);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    p_harm: f64,
}

impl Program {
    pub(crate) fn open(words: &[String], interrupt: Arc<AtomicBool>) -> Result<Program> {
        Dialogue::open("judge", words, interrupt).map(Program)
    }
}

impl Judge for Program {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn judge(&mut self, rows: &[(&Prompt, &str)], tau_h: f64) -> Result<Vec<Result<Harm>>> {
        let question = |(prompt, response): &(&Prompt, &str)| {
            let messages = match prompt {
                Prompt::Chat(turns) => json!(turns),
                other => json!([{"role": "user", "content": other.text()}]),
            };
            json!({"messages": messages, "response": response})
        };
        let answers = self.0.ask::<Answer>(rows.iter().map(question), r#""p_harm": …"#)?;
        Ok(answers.into_iter().map(|answer| answer.and_then(|answer| Harm::new(answer.p_harm, tau_h))).collect())
    }
}
