//! What a repair is made from: failures, benign answers to retain, validated pairs to replay.

use serde::{Deserialize, Serialize};

use crate::judge::Verdict;
use crate::text::Prompt;

/// An answer as text, with the policy's own ids where it was sampled: those are trained on as sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<Vec<u32>>,
}

impl Reply {
    pub fn text(text: impl Into<String>) -> Reply {
        Reply { text: text.into(), tokens: None }
    }
}

/// One prompt on which policy, reward model or both failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub prompt: Prompt,
    /// y⁻: the policy's own harmful answer, or the reference that the reward model wrongly approves.
    pub rejected: Reply,
    /// y⁺; without one the item keeps its likelihood term and gets no y⁺ term.
    pub chosen: Option<String>,
    pub verdict: Verdict,
    /// How many tokens of y⁻ stand before y⁺ in every step; `None`: drawn anew in each.
    pub forced: Option<usize>,
}

/// A benign or borderline prompt with the answer to keep.
#[derive(Debug, Clone, PartialEq)]
pub struct RetainRow {
    pub prompt: Prompt,
    pub response: String,
}

/// A validated preference.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplayPair {
    pub prompt: Prompt,
    pub chosen: String,
    pub rejected: String,
}

/// Everything that one repair trains on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RepairData {
    pub failures: Vec<Failure>,
    pub retain: Vec<RetainRow>,
    pub replay: Vec<ReplayPair>,
}

/// Draws without replacement, round after round, each round in a new order: every item is seen equally often, and step t's
/// items depend on the seed alone, not on the method.
#[derive(Debug, Clone)]
pub(crate) struct Shuffle {
    rng: rand_chacha::ChaCha8Rng,
    order: Vec<usize>,
    at: usize,
}

impl Shuffle {
    /// Over `0..len`; `stream` keeps several shuffles of one seed apart.
    pub(crate) fn new(len: usize, seed: u64, stream: u64) -> Shuffle {
        use rand::SeedableRng;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Shuffle { rng, order: (0..len).collect(), at: len }
    }

    /// The next `count` items, fewer only where there are none at all.
    pub(crate) fn draw(&mut self, count: usize) -> Vec<usize> {
        self.draw_where(count, |_| true)
    }

    /// The next `count` items that `wanted` lets pass, fewer only where it lets none pass.
    pub(crate) fn draw_where(&mut self, count: usize, wanted: impl Fn(usize) -> bool) -> Vec<usize> {
        use rand::seq::SliceRandom;
        let mut drawn = Vec::with_capacity(count);
        let any = self.order.iter().any(|&item| wanted(item));
        while drawn.len() < count && any {
            if self.at == self.order.len() {
                self.order.shuffle(&mut self.rng);
                self.at = 0;
            }
            drawn.extend(Some(self.order[self.at]).filter(|&item| wanted(item)));
            self.at += 1;
        }
        drawn
    }
}
