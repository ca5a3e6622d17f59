//! A sampler's weights as a file: what one search learned and the next begins with, in another grammar too.

use super::grammar::Grammar;
use super::operators::name;
use super::sampler::{Arm, Sampler};
use crate::attacker::Way;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// By the names of the grammar, so that they hold in another grammar as far as it knows these names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplerWeights {
    pub(crate) schema: u32,
    /// tactic → domain → evidence.
    pub arms: BTreeMap<String, BTreeMap<String, Arm>>,
    /// tactic → topic → evidence, where there is any.
    #[serde(default)]
    pub(crate) cells: BTreeMap<String, BTreeMap<String, Arm>>,
    /// Layer → id → weight of the published update.
    pub(crate) layers: BTreeMap<String, BTreeMap<String, f64>>,
    /// The grammar, and what an attacker can do, where there was one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) authors: BTreeMap<String, Arm>,
}

impl Sampler {
    /// What this sampler has learned.
    pub fn weights(&self, grammar: &Grammar) -> SamplerWeights {
        let (arms, cells, layers) = Default::default();
        let authors = self.authors.iter().map(|(author, arm)| (name(*author).to_string(), *arm)).collect();
        let mut weights = SamplerWeights { schema: 1, arms, cells, layers, authors };
        let of_tactics = self.arms.chunks(self.domains).zip(self.cells.chunks(grammar.topics.len()));
        for (tactic, (arms, cells)) in grammar.tactics.iter().zip(of_tactics) {
            let arms = grammar.domains.iter().cloned().zip(arms.iter().copied());
            weights.arms.insert(tactic.id.clone(), arms.collect());
            let cells = grammar.topics.iter().map(|t| t.id.clone()).zip(cells.iter().copied());
            weights.cells.insert(tactic.id.clone(), cells.filter(|(_, c)| c.pulls > 0.0).collect());
        }
        for (own, (layer, ids)) in self.layers.iter().zip(grammar.ids()) {
            weights.layers.insert(layer.to_string(), ids.into_iter().cloned().zip(own.iter().copied()).collect());
        }
        weights
    }

    /// Takes over what another search learned. Names that this grammar lacks are passed over. An error, which names `path`, if no
    /// tactic × domain is known to both.
    pub fn carry_over(&mut self, grammar: &Grammar, weights: &SamplerWeights, path: &Path) -> Result<()> {
        let mut known = 0;
        let of_tactics = self.arms.chunks_mut(self.domains).zip(self.cells.chunks_mut(grammar.topics.len()));
        for (tactic, (arms, cells)) in grammar.tactics.iter().zip(of_tactics) {
            known += take(arms, grammar.domains.iter(), weights.arms.get(&tactic.id));
            take(cells, grammar.topics.iter().map(|t| &t.id), weights.cells.get(&tactic.id));
        }
        if known == 0 {
            let example = format!("{} × {}", grammar.tactics[0].id, grammar.domains[0]);
            return Err(wrong(path, format!("a tactic × domain of the grammar, such as {example}"), "none".into()));
        }
        for (own, (layer, ids)) in self.layers.iter_mut().zip(grammar.ids()) {
            let saved = weights.layers.get(layer);
            for (weight, id) in own.iter_mut().zip(ids) {
                *weight = saved.and_then(|l| l.get(id)).copied().unwrap_or(*weight);
            }
            let sum: f64 = own.iter().sum();
            own.iter_mut().for_each(|w| *w /= sum);
        }
        for author in std::iter::once(None).chain(Way::ALL.map(Some)) {
            self.authors.extend(weights.authors.get(name(author)).map(|arm| (author, *arm)));
        }
        Ok(())
    }
}

/// Copies the evidence whose names are saved; returns how many were.
fn take<'a>(own: &mut [Arm], names: impl Iterator<Item = &'a String>, saved: Option<&BTreeMap<String, Arm>>) -> usize {
    let mut known = 0;
    for (arm, name) in own.iter_mut().zip(names) {
        if let Some(saved) = saved.and_then(|s| s.get(name)) {
            (*arm, known) = (*saved, known + 1);
        }
    }
    known
}

impl SamplerWeights {
    /// Reads a weights file.
    pub fn read(path: &Path) -> Result<SamplerWeights> {
        let text = crate::text::input::read_text(path)?;
        let weights: SamplerWeights = serde_json::from_str(&text).map_err(Error::file(
            path,
            "weights of the probe search (JSON, schema 1)",
            REMEDY,
        ))?;
        weights.check(path)?;
        Ok(weights)
    }

    /// Pretty JSON, as [`SamplerWeights::read`] takes it.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n" // names and numbers: cannot fail
    }

    fn check(&self, path: &Path) -> Result<()> {
        if self.schema != 1 {
            return Err(wrong(path, "schema 1".into(), self.schema.to_string()));
        }
        let authors = BTreeMap::from([("of".to_string(), self.authors.clone())]);
        for (place, of_tactic) in [("arms", &self.arms), ("cells", &self.cells), ("authors", &authors)] {
            for (tactic, name, arm) in of_tactic.iter().flat_map(|(t, arms)| arms.iter().map(move |(n, a)| (t, n, a))) {
                let sound = arm.pulls <= MOST_PULLS && arm.hits >= 0.0 && arm.hits <= arm.pulls;
                if !sound {
                    let expected = format!("{place}.{tactic}.{name}: {MOST_PULLS:e} ≥ pulls ≥ hits ≥ 0");
                    return Err(wrong(path, expected, format!("{} and {}", arm.pulls, arm.hits)));
                }
            }
        }
        for (layer, weights) in &self.layers {
            if let Some((id, w)) = weights.iter().find(|(_, w)| !(**w > 0.0 && **w <= 1.0)) {
                return Err(wrong(path, format!("layers.{layer}.{id} to be above 0 and at most 1"), format!("{w:e}")));
            }
        }
        Ok(())
    }
}

/// More queries than any search has: what is counted in f64 stays exact.
const MOST_PULLS: f64 = 1e15;
const REMEDY: &str = "give the weights.json of an earlier search, or start without";

fn wrong(path: &Path, expected: String, found: String) -> Error {
    Error::file(path, &expected, REMEDY)(found)
}
