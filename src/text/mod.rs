//! Text at the border: rows in and out, tokenizer, chat template. Inside, only valid values.

pub mod fields;
pub mod ngrams;
pub mod output;
pub mod prompt;

pub use output::{AtomicFile, write_atomic};
pub use prompt::{Message, Prompt};
