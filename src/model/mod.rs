//! Transformers: checkpoints, forward and backward, heads, adapters, packed batches, generation. Names no backend.

pub mod adapter;
pub mod adapter_file;
pub mod batch;
pub mod block;
pub mod checkpoint;
pub mod config;
pub mod flops;
pub mod generate;
pub mod pair;
pub mod pretrained;
pub mod random;
pub mod subject;
pub mod transformer;
pub mod workspace;

pub use adapter::{Adapter, AdapterGrad, AdapterInit, Moments, Snapshot};
pub use adapter_file::{AdapterFile, HostTensor, Lora, Projection};
pub use batch::{AnswerTokens, Batch, Heads};
pub use checkpoint::{Checkpoint, Weights};
pub use config::{Family, Head, ModelConfig, Rope};
pub use generate::{Continue, Continued, Generator};
pub use pair::Pair;
pub use pretrained::{ModelSpec, Pretrained};
pub use random::RandomWeights;
pub use subject::{Answer, Ask, Decoding, Finish, Subject, Version};
pub use transformer::{TargetLogprobs, Transformer};
pub use workspace::Workspace;
