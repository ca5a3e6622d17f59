//! Rotary position embedding as the config states it: base, and Llama 3's stretching of the low frequencies.

use crate::error::Result;
use crate::text::fields::Fields;

/// transformers' own, where a config states none.
const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RopeConfig {
    pub(crate) theta: f64,
    pub(crate) scaling: Option<Llama3Scaling>,
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

impl RopeConfig {
    /// Reads transformers 5's `rope_parameters`, else transformers 4's `rope_theta` and `rope_scaling`.
    pub(super) fn read(config: &Fields, max_position: usize) -> Result<RopeConfig> {
        let (scaling, theta) = match config.object("rope_parameters")? {
            Some(parameters) => {
                let theta = parameters.positive("rope_theta")?;
                (Some(parameters), theta)
            }
            None => (config.object("rope_scaling")?, None),
        };
        let theta = theta.or(config.positive("rope_theta")?).unwrap_or(DEFAULT_THETA);
        let scaling = scaling.map_or(Ok(None), |fields| Llama3Scaling::read(&fields, max_position))?;
        Ok(RopeConfig { theta, scaling })
    }

    /// The `head_dim / 2` inverse frequencies, in f32 step by step as transformers computes them.
    pub(crate) fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim).step_by(2).map(|i| 1.0 / (self.theta as f32).powf(i as f32 / head_dim as f32));
        match &self.scaling {
            None => plain.collect(),
            Some(scaling) => plain.map(|freq| scaling.apply(freq)).collect(),
        }
    }
}

impl Llama3Scaling {
    /// `None` for the kind `default`; any other kind but `llama3` is refused by name.
    fn read(fields: &Fields, max_position: usize) -> Result<Option<Llama3Scaling>> {
        if let Some((key, _)) = fields.iter().find(|(_, value)| value.is_object()) {
            return Err(fields.refuse(key, "one setting for all layers", "settings per kind of layer", UNSUPPORTED));
        }
        let key = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
        match fields.text(key)? {
            None | Some("default") => return Ok(None),
            Some("llama3") => {}
            Some(other) => return Err(fields.refuse(key, "`default` or `llama3`", &format!("`{other}`"), UNSUPPORTED)),
        }
        let number = |key| fields.positive(key)?.ok_or_else(|| fields.wrong(key, "a number", "no such field"));
        let scaling = Llama3Scaling {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: fields.size("original_max_position_embeddings")?.unwrap_or(max_position),
        };
        if scaling.high_freq_factor > scaling.low_freq_factor {
            return Ok(Some(scaling));
        }
        let expected = format!("above low_freq_factor ({})", scaling.low_freq_factor);
        Err(fields.wrong("high_freq_factor", &expected, &scaling.high_freq_factor.to_string()))
    }

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

const UNSUPPORTED: &str = "ares computes plain and Llama-3 rotary positions only: use a checkpoint with one of these";
