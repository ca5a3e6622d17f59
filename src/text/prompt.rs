//! What is asked of a model.

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// What is asked of a model, in the three forms that rows may carry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Prompt {
    /// Rendered by the model's own chat template. Never empty.
    Chat(Vec<Message>),
    /// Used as it stands (`--raw`).
    Raw(String),
    /// Ids, taken as they are.
    Tokens(Vec<u32>),
}

impl Message {
    pub(crate) fn user(text: impl Into<String>) -> Message {
        Message { role: "user".into(), content: text.into() }
    }
}

impl Prompt {
    /// Makes one user turn.
    pub fn user(text: impl Into<String>) -> Prompt {
        Prompt::Chat(vec![Message::user(text)])
    }

    /// Returns the text that a judge or a report shows: the last user turn, or the raw text; empty for ids.
    pub fn text(&self) -> &str {
        match self {
            Prompt::Chat(turns) => turns.iter().rev().find(|m| m.role == "user").map_or("", |m| &m.content),
            Prompt::Raw(text) => text,
            Prompt::Tokens(_) => "",
        }
    }
}
