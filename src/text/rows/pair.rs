//! Preference pairs: TRL's `prompt, chosen, rejected` (plain or conversational, prompt written out or contained in both),
//! `conversations, chosen, rejected`, and HH-RLHF's two transcripts.

use serde_json::Value;

use super::{Row, turns};
use crate::error::Result;
use crate::text::{Message, Prompt};

/// A preference: `chosen` is the better answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    pub prompt: Prompt,
    /// y⁺
    pub chosen: String,
    /// y⁻
    pub rejected: String,
}

impl Row {
    /// The pair that this row holds. One in another form is an error.
    pub fn pair(&self) -> Result<Preference> {
        self.required("chosen")?;
        let (prompt, chosen, rejected) = self.halves()?;
        Ok(Preference { prompt, chosen: chosen.unwrap_or_default(), rejected })
    }

    /// Prompt, better and worse answer; the better one may be missing.
    pub(crate) fn halves(&self) -> Result<(Prompt, Option<String>, String)> {
        let (chosen, rejected) = (self.get("chosen")?, self.required("rejected")?);
        let prompt = match self.get("conversations")? {
            Some(turns) => Prompt::Chat(self.turns("conversations", turns)?),
            None if self.written_prompt(false)?.is_some() || self.get("tokens")?.is_some() => self.prompt(false)?,
            None => {
                return self.split(self.whole("chosen", self.required("chosen")?)?, self.whole("rejected", rejected)?);
            }
        };
        let chosen = chosen.map(|value| self.answer("chosen", value, &prompt)).transpose()?;
        let rejected = self.answer("rejected", rejected, &prompt)?;
        Ok((prompt, chosen, rejected))
    }

    fn required(&self, key: &str) -> Result<&Value> {
        self.get(key)?.ok_or_else(|| self.wrong(&format!("a field `{key}`"), "none"))
    }

    /// One answer: a text, a message, or a list of one message, which the prompt's own may precede.
    fn answer(&self, key: &str, value: &Value, prompt: &Prompt) -> Result<String> {
        if let Some(text) = value.as_str() {
            return Ok(text.to_string());
        }
        let mut turns = turns::message(value).map(|turn| vec![turn]).or_else(|| turns::messages(value));
        let last = turns.as_mut().and_then(Vec::pop);
        match (last, turns) {
            (Some(answer), Some(before)) if before.is_empty() || *prompt == Prompt::Chat(before.clone()) => {
                Ok(answer.content)
            }
            _ => Err(self.type_error(key, "one answer", value)),
        }
    }

    /// A conversation that contains its prompt.
    fn whole(&self, key: &str, value: &Value) -> Result<Vec<Message>> {
        let turns = match value.as_str() {
            Some(text) => turns::transcript(text),
            None => turns::messages(value),
        };
        let expected = "a transcript (`Human:`, `Assistant:`) or messages, as there is no `prompt`";
        turns.ok_or_else(|| self.type_error(key, expected, value))
    }

    /// Two conversations that differ in the assistant's last turn alone.
    fn split(&self, mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Result<(Prompt, Option<String>, String)> {
        let expected = "`chosen` and `rejected` to differ in the assistant's last turn alone";
        match (chosen.pop(), rejected.pop()) {
            (Some(good), Some(bad)) if good.role == "assistant" && bad.role == "assistant" && !chosen.is_empty() => {
                if chosen != rejected {
                    return Err(self.wrong(expected, "different turns before it"));
                }
                Ok((Prompt::Chat(chosen), Some(good.content), bad.content))
            }
            _ => Err(self.wrong(expected, "one that has no prompt, or does not end with the assistant's turn")),
        }
    }
}
