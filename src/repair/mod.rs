//! The joint objective, its optimiser loop, and the methods it is compared with.
//!
//! Where the two halves meet: the coupling weight (the policy is pushed harder where the *current* reward model still approves),
//! answers resampled on-policy, judged and scored afresh, and one gate over both. With fixed texts and separate parameters their
//! gradients do not meet otherwise.

pub(crate) mod config;
pub(crate) mod data;
pub(crate) mod intake;
pub mod objective;
pub mod policy_step;
pub(crate) mod prepared;
pub mod reward_step;
pub mod rlhf;
pub(crate) mod room;
pub mod side;
pub mod trainer;

pub(crate) use config::LARGEST_SEED;
pub(crate) use config::Phase;
pub use config::{LogpScale, Method, Recipe, Recompute, RepairConfig, RetainLoss, UnlearnLoss};
pub use data::{Failure, RepairData, Reply};
pub use intake::{Quarantined, admit};
pub use prepared::Prepared;
pub use trainer::{RepairOutcome, Setting, StepMetrics, Trainer};
