//! Rotary position embedding as the config states it: base, and how low frequencies are stretched; which layer has which.

use std::fmt;

use super::Family;
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

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scaling {
    Plain,
    /// Every frequency divided by this.
    Linear(f64),
    Llama3(Llama3Scaling),
    Yarn(YarnScaling),
    Long(LongScaling),
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
    let one = |rotates: &serde_json::Value| match rotates.as_u64() {
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
            let original = match nested.size("original_max_position_embeddings")? {
                Some(original) => original,
                None => fields.size("original_max_position_embeddings")?.unwrap_or(4096),
            };
            rope.scaling = Scaling::Long(LongScaling::read(nested, original, max)?);
        }
        Some(other) => {
            return Err(nested.refuse(key, "`default` or `longrope`", &format!("`{other}`"), UNSUPPORTED));
        }
    }
    Ok(rope)
}

/// YaRN (arXiv:2309.00071): pairs that turn often within the context that was trained on keep their frequency, those that turn seldom are
/// stretched by `factor`, those between are interpolated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct YarnScaling {
    factor: f64,
    /// Turns within the context that are often, and seldom.
    turns: [f64; 2],
    attention: f64,
    original_max_position: usize,
}

impl YarnScaling {
    fn read(fields: &Fields, max_position: usize) -> Result<YarnScaling> {
        for key in ["mscale", "mscale_all_dim", "truncate"] {
            if let Some(value) = fields.get(key) {
                return Err(fields.refuse(key, "absent", &brief(value), UNSUPPORTED));
            }
        }
        let original_max_position = fields.size("original_max_position_embeddings")?.unwrap_or(max_position);
        let factor = fields.positive("factor")?.unwrap_or(max_position as f64 / original_max_position as f64);
        let attention = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
        let turns = [fields.positive("beta_fast")?.unwrap_or(32.0), fields.positive("beta_slow")?.unwrap_or(1.0)];
        let attention = fields.positive("attention_factor")?.unwrap_or(attention);
        Ok(YarnScaling { factor, turns, attention, original_max_position })
    }

    /// In f32 where transformers computes in f32.
    fn apply(&self, plain: &[f32], channels: usize, theta: f64) -> Vec<f32> {
        let pair = |turns: f64| {
            let length = self.original_max_position as f64 / (turns * 2.0 * std::f64::consts::PI);
            channels as f64 * length.ln() / (2.0 * theta.ln())
        };
        let [low, high] = self.turns.map(pair);
        let (low, mut high) = (low.floor().max(0.0), high.ceil().min(channels as f64 - 1.0));
        if low == high {
            high += 0.001; // else a division by zero
        }
        let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let mixed = |(i, freq): (usize, &f32)| {
            let keep = 1.0 - ramp(i);
            1.0 / (self.factor as f32 * (1.0 / freq)) * (1.0 - keep) + freq * keep
        };
        plain.iter().enumerate().map(mixed).collect()
    }
}

/// LongRoPE (arXiv:2402.13753) within the context that the model was trained on first: each frequency divided by a factor of its own.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LongScaling {
    factors: Vec<f32>,
    /// What cosine and sine are multiplied with.
    attention: f64,
    original_max_position: usize,
}

impl LongScaling {
    fn read(fields: &Fields, original_max_position: usize, max: usize) -> Result<LongScaling> {
        let key = "short_factor";
        let wrong = |found: &str| fields.wrong(key, "a list of numbers above 0", found);
        let list = fields.get(key).and_then(|list| list.as_array()).ok_or_else(|| wrong("no such list"))?;
        let one = |x: &serde_json::Value| x.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_finite());
        let factors = list.iter().map(|x| one(x).ok_or_else(|| wrong(&brief(x)))).collect::<Result<_>>()?;
        let stretch = match fields.positive("factor")? {
            Some(factor) => factor,
            None => max as f64 / original_max_position as f64,
        };
        let attention = match fields.positive("attention_factor")? {
            Some(factor) => factor,
            None if stretch <= 1.0 => 1.0,
            None => (1.0 + stretch.ln() / (original_max_position as f64).ln()).sqrt(),
        };
        if original_max_position < 2 || !(1e-3..=1e3).contains(&attention) {
            let found = format!("{original_max_position}, attention multiplied by {attention}");
            return Err(fields.wrong("original_max_position_embeddings", "a context of at least 2", &found));
        }
        Ok(LongScaling { factors, attention, original_max_position })
    }
}

/// Wavelengths longer than `original_max_position / low_freq_factor` are stretched by `factor`, those shorter than
/// `original_max_position / high_freq_factor` are left, those between are interpolated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Llama3Scaling {
    pub(crate) factor: f64,
    pub(crate) low_freq_factor: f64,
    pub(crate) high_freq_factor: f64,
    pub(crate) original_max_position: usize,
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
        match &self.scaling {
            Scaling::Long(long) if long.factors.len() != turning / 2 => {
                let [expected, found] = [turning / 2, long.factors.len()].map(|n| format!("a list of {n}"));
                Err(fields.wrong("short_factor", &expected, &found))
            }
            _ => Ok(()),
        }
    }
}

impl Scaling {
    /// Any kind but `default`, `linear`, `llama3` and `yarn` is refused by name.
    fn read(fields: &Fields, max_position: usize) -> Result<Scaling> {
        if let Some((key, _)) = fields.iter().find(|(_, value)| value.is_object()) {
            return Err(fields.refuse(key, "one setting for all layers", "settings per kind of layer", UNSUPPORTED));
        }
        let key = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
        let number = |key| fields.positive(key)?.ok_or_else(|| fields.wrong(key, "a number", "no such field"));
        match fields.text(key)? {
            None | Some("default") => return Ok(Scaling::Plain),
            Some("linear") => return Ok(Scaling::Linear(number("factor")?)),
            Some("yarn") => return Ok(Scaling::Yarn(YarnScaling::read(fields, max_position)?)),
            Some("llama3") => {}
            Some(other) => {
                let known = "`default`, `linear`, `llama3` or `yarn`";
                return Err(fields.refuse(key, known, &format!("`{other}`"), UNSUPPORTED));
            }
        }
        let scaling = Llama3Scaling {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: fields.size("original_max_position_embeddings")?.unwrap_or(max_position),
        };
        if scaling.high_freq_factor > scaling.low_freq_factor {
            return Ok(Scaling::Llama3(scaling));
        }
        let expected = format!("above low_freq_factor ({})", scaling.low_freq_factor);
        Err(fields.wrong("high_freq_factor", &expected, &scaling.high_freq_factor.to_string()))
    }
}

impl Llama3Scaling {
    fn apply(&self, freq: f32) -> f32 {
        let context = self.original_max_position as f32;
        let (factor, low, high) = (self.factor as f32, self.low_freq_factor as f32, self.high_freq_factor as f32);
        let wavelength = 2.0 * std::f32::consts::PI / freq;
        if wavelength < context / high {
            freq
        } else if wavelength > context / low {
            freq / factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 - smooth) * freq / factor + smooth * freq
        }
    }
}

const UNSUPPORTED: &str =
    "ares computes plain, linear, Llama-3 and YaRN rotary positions: use a checkpoint with one of these";
