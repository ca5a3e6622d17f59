//! Transformers: checkpoints, forward and backward, heads, adapters, packed batches, generation. Names no backend.

pub(crate) mod adapter;
pub(crate) mod adapter_file;
pub(crate) mod batch;
pub(crate) mod block;
pub(crate) mod checkpoint;
pub(crate) mod config;
pub(crate) mod encoder;
pub(crate) mod flops;
pub mod generate;
pub(crate) mod lanes;
pub(crate) mod merge;
pub(crate) mod pair;
pub mod pretrained;
pub(crate) mod projection;
pub(crate) mod random;
mod readout;
pub(crate) mod subject;
mod tensors;
pub(crate) mod transformer;
pub(crate) mod workspace;

pub use adapter::{Adapter, AdapterGrad, AdapterInit, Moments};
pub use adapter_file::{AdapterFile, HostTensor};
pub use batch::{AnswerTokens, Batch, Heads};
pub use checkpoint::{Checkpoint, WeightSource};
pub use config::{Family, Head, ModelConfig};
pub use generate::{Continue, Continued, Generator};
pub use pair::Pair;
pub use pretrained::{ModelSpec, Pretrained};
pub use projection::Projection;
pub(crate) use random::{BlankWeights, RandomWeights};
pub use subject::{Answer, Ask, Decoding, Finish, Subject, Version};
pub use transformer::{TargetLogprobs, Transformer};
pub use workspace::{Keep, Workspace};
