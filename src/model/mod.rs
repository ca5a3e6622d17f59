//! Transformers: checkpoints, forward and backward, heads, adapters, packed batches, generation. Names no backend.

pub mod adapter_file;
pub mod checkpoint;
pub mod config;
pub mod subject;

pub use adapter_file::{AdapterFile, HostTensor, Lora, Projection};
pub use checkpoint::Checkpoint;
pub use config::{Family, Head, ModelConfig, Rope};
pub use subject::{Answer, Ask, Decoding, Finish, Subject, Version};
