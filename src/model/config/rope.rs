//! Rotary position embedding as the config states it: base, and how low frequencies are stretched; which layer has which.

use std::fmt;

use serde_json::Value;

use super::Family;
use super::scaling::{LongScaling, Scaling, UNSUPPORTED, YarnScaling};
use crate::error::Result;
use crate::text::fields::{Fields, brief};

/// transformers' own, where a config states none.
const DEFAULT_THETA: f64 = 10_000.0;
const OLMO_THETA: f64 = 500_000.0;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RopeConfig {
    /// Infinite where a layer does not rotate: every frequency is zero then.
    pub(crate) theta: f64,
    pub(crate) scaling: Scaling,
    /// The share of a head's channels that turn, its first ones.
    pub(crate) share: f64,
}

/// The rotations of a model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ropes {
    pub(crate) kinds: Vec<RopeConfig>,
    /// Of each layer, which of the kinds it has.
    pub(crate) of_layer: Vec<usize>,
}

impl Ropes {
    /// As the family's class in transformers reads its config; `windows` has one entry per layer.
    pub(super) fn read(fields: &Fields, family: Family, max: usize, windows: &[Option<usize>]) -> Result<Ropes> {
        one_spelling(fields)?;
        let (kinds, of_layer) = match family {
            Family::Gemma3 => (gemma3(fields, max)?, windows.iter().map(|window| window.is_some().into()).collect()),
            Family::SmolLm3 => {
                let none = RopeConfig::plain(f64::INFINITY);
                (vec![RopeConfig::read(fields, 2e6, max)?, none], without_rotation(fields, windows.len())?)
            }
            Family::Phi3 => (vec![phi3(fields, max)?], vec![0; windows.len()]),
            Family::Olmo2 => (vec![RopeConfig::read(fields, OLMO_THETA, max)?], vec![0; windows.len()]),
            Family::Olmo3 => (olmo3(fields, max)?, windows.iter().map(|window| window.is_some().into()).collect()),
            _ => (vec![RopeConfig::read(fields, DEFAULT_THETA, max)?], vec![0; windows.len()]),
        };
        Ok(Ropes { kinds, of_layer })
    }

    /// Positions that a sequence may have, of `max` that the config states: beyond those that LongRoPE was trained on first it turns all
    /// positions otherwise, which is not computed.
    pub(super) fn context(&self, max: usize) -> usize {
        let most = |kind: &RopeConfig| match &kind.scaling {
            Scaling::Long(long) => long.original_max_position,
            _ => max,
        };
        self.kinds.iter().map(most).min().unwrap_or(max).min(max)
    }
}

impl fmt::Display for Ropes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let kinds: Vec<String> = self.kinds.iter().map(RopeConfig::to_string).collect();
        f.write_str(&kinds.join("; on some layers "))
    }
}

/// Fails on a config in the words of transformers 4 and 5 at once that say different things: which of them counts depends on who reads.
fn one_spelling(fields: &Fields) -> Result<()> {
    let Some(new) = fields.object("rope_parameters")? else { return Ok(()) };
    let old = fields.object("rope_scaling")?;
    let scaling = old.iter().flat_map(|old| old.iter()).map(|(key, value)| (key.as_str(), value, "rope_scaling"));
    let theta = fields.get("rope_theta").into_iter().map(|value| ("rope_theta", value, "rope_theta"));
    for (key, value, place) in scaling.chain(theta) {
        let known = new.get(key).or_else(|| new.get("rope_type").filter(|_| key == "type"));
        let same = |known: &Value| known == value || known.as_f64().is_some_and(|x| Some(x) == value.as_f64());
        if known.map_or(place == "rope_scaling", |known| !same(known)) {
            let expected = format!("the same as in rope_parameters ({key}), or absent");
            let found = format!("{key} = {}", brief(value));
            return Err(fields.refuse(
                place,
                &expected,
                &found,
                "keep one of the two spellings: transformers 5's is rope_parameters",
            ));
        }
    }
    Ok(())
}

/// Of layers that see everything, and of those that look through a window.
fn gemma3(fields: &Fields, max: usize) -> Result<Vec<RopeConfig>> {
    let Some(both) = fields.object("rope_parameters")? else {
        let local = fields.positive("rope_local_base_freq")?.unwrap_or(1e4);
        return Ok(vec![RopeConfig::read(fields, 1e6, max)?, RopeConfig::plain(local)]);
    };
    let of = |(key, theta)| match both.object(key)? {
        Some(fields) => RopeConfig::of(&fields, theta, max),
        None => Ok(RopeConfig::plain(theta)),
    };
    [("full_attention", 1e6), ("sliding_attention", 1e4)].into_iter().map(of).collect()
}

/// Of layers that see everything, which alone are stretched, and of those that look through a window, whose base transformers reads where
/// both have one set of parameters each, else not.
fn olmo3(fields: &Fields, max: usize) -> Result<Vec<RopeConfig>> {
    let Some(both) = fields.object("rope_parameters")? else {
        return Ok(vec![RopeConfig::read(fields, OLMO_THETA, max)?, RopeConfig::plain(OLMO_THETA)]);
    };
    let of = |key| match both.object(key)? {
        Some(fields) => RopeConfig::of(&fields, OLMO_THETA, max),
        None => Ok(RopeConfig::plain(OLMO_THETA)),
    };
    ["full_attention", "sliding_attention"].into_iter().map(of).collect()
}

/// One for each layer that does not rotate, else zero.
fn without_rotation(fields: &Fields, layers: usize) -> Result<Vec<usize>> {
    let Some(list) = fields.get("no_rope_layers").and_then(|list| list.as_array()) else {
        let interval = fields.size("no_rope_layer_interval")?.unwrap_or(4);
        return Ok((1..=layers).map(|layer| layer.is_multiple_of(interval).into()).collect());
    };
    // The list says which layers do rotate, whatever it is called.
    let one = |rotates: &Value| match rotates.as_u64() {
        Some(rotates @ 0..=1) => Ok(1 - rotates as usize),
        _ => Err(fields.wrong("no_rope_layers", "0 or 1 for each layer", &brief(rotates))),
    };
    if list.len() != layers {
        let [expected, found] = [layers, list.len()].map(|n| format!("a list of {n}"));
        return Err(fields.wrong("no_rope_layers", &expected, &found));
    }
    list.iter().map(one).collect()
}

/// Whole heads, or their first part; stretched by LongRoPE, which earlier files call `su`.
fn phi3(fields: &Fields, max: usize) -> Result<RopeConfig> {
    let nested = match fields.object("rope_parameters")? {
        Some(nested) => Some(nested),
        None => fields.object("rope_scaling")?,
    };
    let both = || nested.iter().chain([fields]);
    let mut theta = None;
    let mut share = None;
    for place in both() {
        theta = theta.or(place.positive("rope_theta")?);
        share = share.or(place.positive("partial_rotary_factor")?);
    }
    let share = share.unwrap_or(1.0);
    if share > 1.0 {
        return Err(fields.wrong("partial_rotary_factor", "at most 1", &share.to_string()));
    }
    let mut rope = RopeConfig { share, ..RopeConfig::plain(theta.unwrap_or(DEFAULT_THETA)) };
    let Some(nested) = &nested else { return Ok(rope) };
    let key = if nested.get("rope_type").is_some() { "rope_type" } else { "type" };
    match nested.text(key)? {
        None | Some("default") => {}
        Some("longrope" | "su" | "yarn") => {
            // The field beside the rotation, or its default, counts whatever the rotation says: so does transformers.
            let original = fields.size("original_max_position_embeddings")?.unwrap_or(4096);
            rope.scaling = Scaling::Long(LongScaling::read(nested, original, max)?);
        }
        Some(other) => {
            return Err(nested.refuse(key, "`default` or `longrope`", &format!("`{other}`"), UNSUPPORTED));
        }
    }
    Ok(rope)
}

impl fmt::Display for RopeConfig {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.scaling {
            _ if self.theta.is_infinite() => f.write_str("none"),
            Scaling::Plain => write!(f, "θ = {}", self.theta),
            Scaling::Linear(factor) => write!(f, "θ = {}, stretched by {factor}", self.theta),
            Scaling::Llama3(scaling) => {
                write!(f, "θ = {}, low frequencies stretched by {}", self.theta, scaling.factor)
            }
            Scaling::Yarn(yarn) => write!(f, "θ = {}, stretched by {} (YaRN)", self.theta, yarn.factor),
            Scaling::Long(long) => write!(f, "θ = {}, LongRoPE within {}", self.theta, long.original_max_position),
        }?;
        if self.share < 1.0 { write!(f, ", {} of each head", self.share) } else { Ok(()) }
    }
}

impl RopeConfig {
    pub(crate) fn plain(theta: f64) -> RopeConfig {
        RopeConfig { theta, scaling: Scaling::Plain, share: 1.0 }
    }

    /// Reads transformers 5's `rope_parameters`, else transformers 4's `rope_theta` and `rope_scaling`.
    fn read(config: &Fields, default_theta: f64, max_position: usize) -> Result<RopeConfig> {
        let theta = config.positive("rope_theta")?.unwrap_or(default_theta);
        let scaling = match config.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_scaling")?,
        };
        scaling.map_or(Ok(RopeConfig::plain(theta)), |fields| RopeConfig::of(&fields, theta, max_position))
    }

    /// Of one set of parameters.
    pub(crate) fn of(fields: &Fields, default_theta: f64, max_position: usize) -> Result<RopeConfig> {
        let theta = fields.positive("rope_theta")?.unwrap_or(default_theta);
        Ok(RopeConfig { theta, scaling: Scaling::read(fields, max_position)?, share: 1.0 })
    }

    /// Channels of a head that turn.
    pub(crate) fn channels(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.share) as usize
    }

    /// What cosine and sine of the pairs that turn are multiplied with.
    pub(crate) fn attention_factor(&self) -> f32 {
        match &self.scaling {
            Scaling::Long(LongScaling { attention, .. }) | Scaling::Yarn(YarnScaling { attention, .. }) => {
                *attention as f32
            }
            _ => 1.0,
        }
    }

    /// The `head_dim / 2` inverse frequencies, in f32 step by step as transformers computes them; zero for pairs that do not turn.
    pub(crate) fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let turning = self.channels(head_dim);
        let power = move |i: usize| (self.theta as f32).powf(i as f32 / turning as f32);
        let plain = (0..turning).step_by(2).map(|i| 1.0 / power(i));
        let mut freq: Vec<f32> = match &self.scaling {
            _ if self.theta.is_infinite() => vec![0.0; head_dim / 2],
            Scaling::Plain => plain.collect(),
            Scaling::Linear(factor) => plain.map(|freq| freq / *factor as f32).collect(),
            Scaling::Llama3(scaling) => plain.map(|freq| scaling.apply(freq)).collect(),
            Scaling::Yarn(yarn) => yarn.apply(&plain.collect::<Vec<f32>>(), turning, self.theta),
            Scaling::Long(long) => {
                (0..turning).step_by(2).zip(&long.factors).map(|(i, factor)| 1.0 / (factor * power(i))).collect()
            }
        };
        freq.resize(head_dim / 2, 0.0);
        freq
    }

    /// Fails where the parts of a head that turn are no pairs, or their factors are not as many.
    pub(super) fn check(&self, fields: &Fields, head_dim: usize) -> Result<()> {
        let turning = self.channels(head_dim);
        if turning < 2 || !turning.is_multiple_of(2) {
            let expected = format!("a share of {head_dim} channels that is even and not zero");
            return Err(fields.wrong("partial_rotary_factor", &expected, &self.share.to_string()));
        }
        if !self.inv_freq(head_dim).iter().all(|freq| freq.is_finite()) {
            return Err(fields.wrong("rope_theta", "a base whose frequencies are finite", &self.theta.to_string()));
        }
        match &self.scaling {
            Scaling::Long(long) if long.factors.len() != turning / 2 => {
                let [expected, found] = [turning / 2, long.factors.len()].map(|n| format!("a list of {n}"));
                Err(fields.wrong("short_factor", &expected, &found))
            }
            _ => Ok(()),
        }
    }
}
