//! Text at the border: rows in and out, tokenizer, chat template. Inside, only valid values.

pub mod fields;
pub mod ngrams;
pub mod output;
pub mod prompt;
pub mod rendering;
pub mod rows;
pub mod template;
pub mod tokenizer;

pub use output::{AtomicFile, write_atomic};
pub use prompt::{Message, Prompt};
pub use rendering::{Limits, Rendered, Rendering};
pub use rows::{Exchange, Pair, Row, RowWriter};
pub use tokenizer::Tokenizer;
