//! Text at the border: rows in and out, tokenizer, chat template. Inside, only valid values.

pub mod ngrams;
pub mod prompt;

pub use prompt::{Message, Prompt};
