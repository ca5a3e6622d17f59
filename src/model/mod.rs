//! Transformers: checkpoints, forward and backward, heads, adapters, packed batches, generation. Names no backend.

pub mod subject;

pub use subject::{Answer, Ask, Decoding, Finish, Subject, Version};
