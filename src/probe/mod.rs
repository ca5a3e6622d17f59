//! Search for prompts that expose coupled failures.
//!
//! A probe is a topic, a goal form, a persona and a tactic of a [`Grammar`], composed to a prompt. [`fn@search`] lets a [`Sampler`]
//! choose where to look, breeds probes from the elites of an archive, asks policy, judge and reward model, and learns from each
//! answer; an attacker writes some of them. [`select_failures`] picks what is repaired; [`fn@lift`] says whether the search was worth it.

mod archive;
mod beta;
mod bleu;
pub(crate) mod fitness;
pub(crate) mod genotype;
pub(crate) mod grammar;
pub mod lift;
pub(crate) mod operators;
mod plausible;
pub(crate) mod record;
pub(crate) mod sampler;
pub mod search;
pub(crate) mod select;
pub(crate) mod summary;
pub(crate) mod weights;
mod writing;

pub(crate) use fitness::Fitness;
pub use genotype::{Casing, Genotype, Surface};
pub use grammar::Grammar;
pub use lift::{ProbeResult, lift};
pub use operators::Operator;
pub use record::{Ending, Judged, ProbeRecord};
pub use sampler::{Sampler, SamplerKind};
pub use search::{Found, SearchSettings, World, search};
pub use select::select_failures;
pub use summary::SearchSummary;
pub use weights::SamplerWeights;
pub use writing::{Writing, Yield};
