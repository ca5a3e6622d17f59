//! Text at the border: rows in and out, tokenizer, chat template. Inside, only valid values.

pub(crate) mod dialogue;
pub(crate) mod fields;
pub(crate) mod foreign;
pub(crate) mod input;
pub mod ngrams;
pub(crate) mod output;
pub(crate) mod prompt;
pub(crate) mod rendering;
pub mod rows;
pub(crate) mod specials;
pub(crate) mod template;
pub(crate) mod tokenizer;

pub use foreign::is_contained;
pub(crate) use output::write_atomic;
pub use prompt::{Message, Prompt};
pub use rendering::{IdLimits, Rendered, Rendering};
pub(crate) use rows::{Exchange, Row};
pub use template::isolate_templates;
