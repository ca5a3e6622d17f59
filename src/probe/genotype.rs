//! A probe before it is text: numbers into the grammar's lists.

use serde::{Deserialize, Serialize};

/// A composed probe. Numbers point into the lists of the grammar it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Genotype {
    pub topic: usize,
    pub form: usize,
    pub persona: usize,
    pub tactic: usize,
    /// Which of the tactic's templates.
    pub template: usize,
    pub surface: Surface,
}

/// Changes to a probe's surface; none by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Surface {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suffix: Option<usize>,
    /// Translation table of the request, after the tactic's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub casing: Option<Casing>,
    /// Translation table of the whole prompt, persona and framing included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<usize>,
}

/// Casing of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Casing {
    Lower,
    Upper,
}
