//! Which modules an adapter changes, with which rank and alpha, by PEFT's rules (`check_target_module_exists` and `get_pattern_key` of
//! peft 0.21): what it would leave out or scale otherwise must not be used here.

use fancy_regex::Regex;
use serde_json::Value;

use super::REMEDY;
use crate::error::{Error, Result};
use crate::text::fields::{Fields, brief};

/// Modules by their paths below the model (`model.layers.0.self_attn.q_proj`).
pub(super) struct Targets<'a> {
    fields: &'a Fields,
    included: Names,
    excluded: Names,
    /// Empty: all.
    layers: Vec<u64>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

/// How PEFT names modules.
enum Names {
    All,
    /// Each a module's whole path, or its end.
    List(Vec<String>),
    /// Of the whole path.
    Pattern(Regex),
}

impl Names {
    /// Reads a field; `absent` where there is none.
    fn read(fields: &Fields, key: &str, absent: Names) -> Result<Names> {
        match fields.get(key) {
            None => Ok(absent),
            Some(Value::String(all)) if all == "all-linear" && key == "target_modules" => Ok(Names::All),
            Some(Value::String(pattern)) => {
                regex(fields, key, pattern, &format!(r"\A(?:{pattern})\z")).map(Names::Pattern)
            }
            Some(_) => fields.texts(key)?.map_or(Ok(absent), |list| Ok(Names::List(list))),
        }
    }

    fn holds(&self, path: &str) -> bool {
        let ends = |name: &String| {
            path.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        match self {
            Names::All => true,
            Names::List(list) => list.iter().any(ends),
            // `decide` has seen that the engine does not give up on it.
            Names::Pattern(pattern) => pattern.is_match(path).unwrap_or(false),
        }
    }
}

impl<'a> Targets<'a> {
    pub(super) fn read(fields: &'a Fields) -> Result<Targets<'a>> {
        let layer =
            |value: &Value| value.as_u64().ok_or_else(|| fields.wrong(LAYERS, "layers' numbers", &brief(value)));
        let layers = match fields.get(LAYERS) {
            None => Vec::new(),
            Some(Value::Array(list)) => list.iter().map(layer).collect::<Result<_>>()?,
            Some(value) => vec![layer(value)?],
        };
        let (mut ranks, mut alphas) = (Vec::new(), Vec::new());
        if let Some(patterns) = fields.object("rank_pattern")? {
            for (key, _) in patterns.iter() {
                ranks.push((ending(fields, "rank_pattern", key)?, patterns.required_size(key)?));
            }
        }
        if let Some(patterns) = fields.object("alpha_pattern")? {
            for (key, value) in patterns.iter() {
                let alpha = patterns.positive(key)?;
                let alpha = alpha.ok_or_else(|| patterns.wrong(key, "a number above 0", &brief(value)))?;
                alphas.push((ending(fields, "alpha_pattern", key)?, alpha));
            }
        }
        let included = Names::read(fields, TARGETS, Names::All)?;
        let excluded = Names::read(fields, EXCLUDED, Names::List(Vec::new()))?;
        Ok(Targets { fields, included, excluded, layers, ranks, alphas })
    }

    /// Fails where the engine gives up on a pattern: whether it matches the module at `path` must not be guessed.
    pub(super) fn decide(&self, path: &str) -> Result<()> {
        let names = [(TARGETS, &self.included), (EXCLUDED, &self.excluded)].into_iter();
        let names = names
            .filter_map(|(key, names)| if let Names::Pattern(pattern) = names { Some((key, pattern)) } else { None });
        let ranks = self.ranks.iter().map(|(pattern, _)| ("rank_pattern", pattern));
        let alphas = self.alphas.iter().map(|(pattern, _)| ("alpha_pattern", pattern));
        for (key, pattern) in names.chain(ranks).chain(alphas) {
            pattern.is_match(path).map_err(|error| {
                let found = format!("`{}`: {error}", pattern.as_str());
                self.fields.refuse(key, "a regular expression that can be matched", &found, REMEDY)
            })?;
        }
        Ok(())
    }

    /// Fails unless the module at `path`, of which the adapter has matrices, is one that PEFT would change.
    pub(super) fn check(&self, path: &str) -> Result<()> {
        let refuse = |key: &str, expected: String| -> Error {
            let found = self.fields.get(key).map_or("none".to_string(), |value| match value {
                Value::Array(list) => list.iter().map(brief).collect::<Vec<_>>().join(", "),
                other => brief(other),
            });
            self.fields.refuse(key, &expected, &found, REMEDY)
        };
        let why = "of which the adapter has matrices";
        if self.excluded.holds(path) {
            return Err(refuse(EXCLUDED, format!("without {path}, {why}")));
        }
        if !self.included.holds(path) {
            return Err(refuse(TARGETS, format!("one that names {path}, {why}")));
        }
        // A pattern, and a whole path, says by itself which layers it means.
        let by_layer = match &self.included {
            Names::Pattern(_) => false,
            Names::List(list) => !list.iter().any(|name| name == path),
            Names::All => true,
        };
        let layer = path.split_once("layers.").and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
        if by_layer && !self.layers.is_empty() && !layer.is_some_and(|layer| self.layers.contains(&layer)) {
            let layer = layer.map_or(path.to_string(), |layer| layer.to_string());
            return Err(refuse(LAYERS, format!("one with {layer}, {why}")));
        }
        Ok(())
    }

    pub(super) fn rank(&self, path: &str) -> Option<usize> {
        first(&self.ranks, path)
    }

    pub(super) fn alpha(&self, path: &str) -> Option<f64> {
        first(&self.alphas, path)
    }
}

const TARGETS: &str = "target_modules";
const EXCLUDED: &str = "exclude_modules";
const LAYERS: &str = "layers_to_transform";

/// Of the first pattern that matches.
fn first<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(path).unwrap_or(false)).map(|(_, value)| *value)
}

/// What `key` of a pattern matches: a module's path, or its end.
fn ending(fields: &Fields, field: &str, key: &str) -> Result<Regex> {
    regex(fields, field, key, &format!(r"\A(?:.*\.)?(?:{key})\z"))
}

fn regex(fields: &Fields, field: &str, written: &str, pattern: &str) -> Result<Regex> {
    let refuse = |error: fancy_regex::Error| {
        fields.refuse(field, "a regular expression that ares can read", &format!("`{written}`: {error}"), REMEDY)
    };
    Regex::new(pattern).map_err(refuse)
}
