//! How low frequencies of the rotation are stretched beyond the context that a model was trained on first.

use crate::error::Result;
use crate::text::fields::{Fields, brief};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scaling {
    Plain,
    /// Every frequency divided by this.
    Linear(f64),
    Llama3(Llama3Scaling),
    Yarn(YarnScaling),
    Long(LongScaling),
}

/// YaRN (arXiv:2309.00071): pairs that turn often within the context that was trained on keep their frequency, those that turn seldom are
/// stretched by `factor`, those between are interpolated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct YarnScaling {
    pub(super) factor: f64,
    /// Turns within the context that are often, and seldom.
    turns: [f64; 2],
    pub(super) attention: f64,
    pub(super) original_max_position: usize,
}

impl YarnScaling {
    pub(super) fn read(fields: &Fields, max_position: usize) -> Result<YarnScaling> {
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
    pub(super) fn apply(&self, plain: &[f32], channels: usize, theta: f64) -> Vec<f32> {
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
    pub(super) factors: Vec<f32>,
    /// What cosine and sine are multiplied with.
    pub(super) attention: f64,
    pub(super) original_max_position: usize,
}

impl LongScaling {
    pub(super) fn read(fields: &Fields, original_max_position: usize, max: usize) -> Result<LongScaling> {
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

impl Scaling {
    /// Any kind but `default`, `linear`, `llama3` and `yarn` is refused by name.
    pub(super) fn read(fields: &Fields, max_position: usize) -> Result<Scaling> {
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
    pub(super) fn apply(&self, freq: f32) -> f32 {
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

pub(super) const UNSUPPORTED: &str =
    "ares computes plain, linear, Llama-3 and YaRN rotary positions: use a checkpoint with one of these";
