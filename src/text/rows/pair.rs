//! Preference pairs: TRL's `prompt, chosen, rejected` (plain or conversational, prompt written out or contained in both),
//! `conversations, chosen, rejected`, HH-RLHF's two transcripts, PKU-SafeRLHF's two responses of which one is safer, and RewardBench 2's
//! lists of both, of which every better answer makes a pair with every worse one.

use serde_json::Value;

use super::{Format, Row, turns};
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
    /// The pairs that this row holds: one, but for lists of answers.
    pub(crate) fn pairs(&self) -> Result<Vec<Preference>> {
        if self.format() != Some(Format::RewardBench2) {
            return Ok(vec![self.pair()?]);
        }
        let (chosen, rejected) = (self.texts("chosen")?, self.texts("rejected")?);
        let prompt = self.prompt(false)?;
        let pair = |(chosen, rejected): (&String, &String)| Preference {
            prompt: prompt.clone(),
            chosen: chosen.clone(),
            rejected: rejected.clone(),
        };
        Ok(chosen.iter().flat_map(|chosen| rejected.iter().map(move |rejected| (chosen, rejected))).map(pair).collect())
    }

    /// Of these, those that tell what is acceptable from what is not: none of PKU-SafeRLHF's where both answers are safe, or neither.
    pub(crate) fn calibration_pairs(&self) -> Result<Vec<Preference>> {
        let safe = |key: &str| {
            let value = self.required(key)?;
            let said = value.as_bool().or_else(|| value.as_str()?.to_ascii_lowercase().parse().ok());
            said.ok_or_else(|| self.type_error(key, "true or false", value))
        };
        if self.format() == Some(Format::PkuSafeRlhf) && safe("is_response_0_safe")? == safe("is_response_1_safe")? {
            return Ok(Vec::new());
        }
        self.pairs()
    }

    /// The pair that this row holds. One in another form is an error.
    pub fn pair(&self) -> Result<Preference> {
        let (prompt, chosen, rejected) = self.halves()?;
        let chosen = chosen.ok_or_else(|| self.wrong("a field `chosen`", "none"))?;
        Ok(Preference { prompt, chosen, rejected })
    }

    /// Prompt, better and worse answer; the better one may be missing.
    pub(crate) fn halves(&self) -> Result<(Prompt, Option<String>, String)> {
        if self.format() == Some(Format::PkuSafeRlhf) {
            return self.safer();
        }
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

    /// A list of answers.
    fn texts(&self, key: &str) -> Result<Vec<String>> {
        let value = self.required(key)?;
        let list =
            value.as_array().and_then(|list| list.iter().map(|text| text.as_str().map(str::to_string)).collect());
        list.ok_or_else(|| self.type_error(key, "a list of texts", value))
    }

    /// PKU-SafeRLHF's: what its people found safer, and the other.
    fn safer(&self) -> Result<(Prompt, Option<String>, String)> {
        let answers = [self.text("response_0")?.to_string(), self.text("response_1")?.to_string()];
        match (self.number("safer_response_id")?, answers) {
            (Some(0.0), [chosen, rejected]) | (Some(1.0), [rejected, chosen]) => {
                Ok((self.prompt(false)?, Some(chosen), rejected))
            }
            (other, _) => {
                let found = other.map_or("none".to_string(), |id| id.to_string());
                Err(self.wrong("`safer_response_id` to be 0 or 1", &found))
            }
        }
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
