//! Preference pairs: TRL's `prompt, chosen, rejected` (plain or conversational, prompt written out or contained in both),
//! `conversations, chosen, rejected`, and HH-RLHF's two transcripts.

use serde_json::Value;

use super::{PROMPT, Row, turns};
use crate::error::Result;
use crate::text::{Message, Prompt};

#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub(crate) prompt: Prompt,
    /// y⁺
    pub(crate) chosen: String,
    /// y⁻
    pub(crate) rejected: String,
}

impl Pair {}

impl Row {
    /// The pair that this row holds.
    pub fn pair(&self, raw: bool) -> Result<Pair> {
        let (chosen, rejected) = (self.required("chosen")?, self.required("rejected")?);
        if let Some(conversations) = self.get("conversations")? {
            let prompt = Prompt::Chat(self.turns("conversations", conversations)?);
            return Ok(Pair {
                prompt,
                chosen: self.answer("chosen", chosen)?,
                rejected: self.answer("rejected", rejected)?,
            });
        }
        let has_prompt = PROMPT.iter().any(|key| self.object.get(*key).is_some_and(|value| !value.is_null()));
        if has_prompt || self.ids("tokens")?.is_some() {
            let prompt = self.prompt(raw)?;
            return Ok(Pair {
                prompt,
                chosen: self.answer("chosen", chosen)?,
                rejected: self.answer("rejected", rejected)?,
            });
        }
        self.split(self.whole("chosen", chosen)?, self.whole("rejected", rejected)?)
    }

    fn required(&self, key: &str) -> Result<&Value> {
        self.get(key)?.ok_or_else(|| self.wrong(&format!("a field `{key}`"), "none"))
    }

    /// One answer: a text, a message, or a list of one message.
    fn answer(&self, key: &str, value: &Value) -> Result<String> {
        let single = || turns::messages(value).filter(|turns| turns.len() == 1).and_then(|mut turns| turns.pop());
        let text = value.as_str().map(str::to_string);
        let text = text.or_else(|| turns::message(value).or_else(single).map(|turn| turn.content));
        text.ok_or_else(|| self.type_error(key, "one answer", value))
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
    fn split(&self, mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Result<Pair> {
        let expected = "`chosen` and `rejected` to differ in the assistant's last turn alone";
        match (chosen.pop(), rejected.pop()) {
            (Some(good), Some(bad)) if good.role == "assistant" && bad.role == "assistant" && !chosen.is_empty() => {
                if chosen != rejected {
                    return Err(self.wrong(expected, "different turns before it"));
                }
                Ok(Pair { prompt: Prompt::Chat(chosen), chosen: good.content, rejected: bad.content })
            }
            _ => Err(self.wrong(expected, "one that has no prompt, or does not end with the assistant's turn")),
        }
    }
}
