//! A classifier's head as its file lays it out, and what becomes of the numbers that the device's score product gives:
//!
//!   u = W₁h                            on the device, `units` numbers a row
//!   r = (W₂·relu(u + b₁) + b₂ − μ)/σ   of two layers
//!   r = (u + b₁ − μ)/σ                 of one
//!
//! The rest is done here, in f64: a few thousand products a row are not worth a kernel.

use super::checkpoint::WeightSource;
use super::config::ModelConfig;
use crate::error::{Error, Result};

/// What trainers call a head: transformers and TRL, GRM, Starling, UltraRM and Eurus, Safe-RLHF, OpenRLHF.
const NAMES: [&str; 6] = ["score", "v_head.summary", "v_head", "regression_head", "score_head", "value_head"];

/// What a head consists of.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Layout {
    /// What its tensors' names begin with.
    name: String,
    /// Scores per row, by the shape of the (last) layer.
    pub(crate) labels: Option<usize>,
    /// Width of the layer between, where there are two (`NAME.0` and, behind a ReLU, `NAME.2`).
    pub(crate) hidden: Option<usize>,
    /// Of the first layer and of the second.
    biases: [bool; 2],
}

impl Layout {
    /// What transformers' own classes have.
    pub(super) fn plain() -> Layout {
        Layout { name: NAMES[0].to_string(), ..Layout::default() }
    }

    /// Looks for a head called `prefix` or, without one, by any of the names that are known.
    pub(super) fn find(weights: &impl WeightSource, prefix: Option<&str>) -> Result<Layout> {
        let rows = |name: String| weights.shape(&name).ok().map(|shape| shape.first().copied().unwrap_or_default());
        let has = |name: &&str| rows(format!("{name}.weight")).or_else(|| rows(format!("{name}.0.weight"))).is_some();
        let name = prefix.or_else(|| NAMES.into_iter().find(has)).unwrap_or(NAMES[0]).to_string();
        let of = |layer: &str, part: &str| rows(format!("{name}{layer}.{part}"));
        if let Some(labels) = of("", "weight") {
            let biases = [of("", "bias").is_some(), false];
            return Ok(Layout { labels: Some(labels), hidden: None, biases, name });
        }
        if let Some(third) = ["1", "3", "4"].into_iter().find(|at| of(&format!(".{at}"), "weight").is_some()) {
            return Err(Error::Shape {
                op: "reward head",
                expected: format!("{name} of one layer, or of two with a ReLU between ({name}.0 and {name}.2)"),
                found: format!("{name}.{third}.weight"),
            });
        }
        let hidden = of(".0", "weight");
        let biases = [of(".0", "bias").is_some(), of(".2", "bias").is_some()];
        Ok(Layout { labels: of(".2", "weight").filter(|_| hidden.is_some()), hidden, biases, name })
    }

    /// transformers' own head: one matrix called `score`.
    pub(crate) fn is_plain(&self) -> bool {
        self.name == NAMES[0] && self.hidden.is_none() && !self.biases[0]
    }

    /// What it is, in words.
    pub(crate) fn describe(&self) -> String {
        let layers = self.hidden.map_or("one layer".to_string(), |hidden| format!("two layers, {hidden} between"));
        let biases = if self.biases.contains(&true) { ", with biases" } else { "" };
        format!("{}: {layers}{biases}", self.name)
    }

    /// Every tensor of the head, with its shape, for inputs of `inputs` numbers.
    pub(super) fn promised(&self, labels: usize, inputs: usize) -> Vec<(String, Vec<usize>)> {
        let name = |layer: &str, part: &str| format!("{}{layer}.{part}", self.name);
        let layers = match self.hidden {
            None => vec![("", labels, inputs)],
            Some(hidden) => vec![(".0", hidden, inputs), (".2", labels, hidden)],
        };
        let tensors = layers.into_iter().zip(self.biases).flat_map(|((layer, rows, cols), biased)| {
            let bias = biased.then(|| (name(layer, "bias"), vec![rows]));
            [Some((name(layer, "weight"), vec![rows, cols])), bias]
        });
        tensors.flatten().collect()
    }
}

/// μ and σ² of Safe-RLHF's scores, where `do_normalize` says that they count.
pub(super) const NORMALIZER: [&str; 2] = ["normalizer.mean", "normalizer.var"];

/// What is done on the host.
#[derive(Debug, Default)]
pub(super) struct Readout {
    bias: Option<Vec<f32>>,
    second: Option<Second>,
    /// μ and σ of each label.
    normal: Option<Vec<[f64; 2]>>,
}

#[derive(Debug)]
struct Second {
    w: Vec<f32>, // (labels, hidden)
    bias: Option<Vec<f32>>,
    hidden: usize,
}

impl Readout {
    /// The first layer's matrix (units, C), and what follows it. The head of `config` is settled.
    pub(super) fn load(config: &ModelConfig, weights: &impl WeightSource) -> Result<(Vec<f32>, Readout)> {
        let layout = config.score.layout.clone().unwrap_or_else(Layout::plain);
        let read = |name: &str| -> Result<Vec<f32>> {
            let mut values = Vec::new();
            weights.read(name, &mut values)?;
            Ok(values)
        };
        let part = |layer: &str, part: &str| read(&format!("{}{layer}.{part}", layout.name));
        let bias = |at: usize, layer: &str| layout.biases[at].then(|| part(layer, "bias")).transpose();
        let first = if layout.hidden.is_some() { ".0" } else { "" };
        let second = |hidden| Ok(Second { w: part(".2", "weight")?, bias: bias(1, ".2")?, hidden });
        let normal = match (config.score.normalizer, config.score.normal) {
            (true, _) => {
                let [mean, var] = NORMALIZER.map(read);
                let both = mean?.into_iter().zip(var?).map(|(mean, var)| [f64::from(mean), f64::from(var).sqrt()]);
                Some(both.collect())
            }
            (false, normal) => normal.map(|normal| vec![normal; config.labels()]),
        };
        let second = layout.hidden.map(second).transpose()?;
        Ok((part(first, "weight")?, Readout { bias: bias(0, first)?, second, normal }))
    }

    /// Scores (rows, labels) of what the device gave (rows, units).
    pub(super) fn forward(&self, mut units: Vec<f32>) -> Vec<f32> {
        if let Some(bias) = &self.bias {
            add_rows(&mut units, bias);
        }
        if let Some(Second { w, bias, hidden }) = &self.second {
            let row = |u: &[f32]| w.chunks_exact(*hidden).map(|w| dot(w, u, |u| u.max(0.0))).collect::<Vec<_>>();
            units = units.chunks_exact(*hidden).flat_map(row).collect();
            if let Some(bias) = bias {
                add_rows(&mut units, bias);
            }
        }
        if let Some(normal) = &self.normal {
            for scores in units.chunks_exact_mut(normal.len()) {
                for (score, [mean, std]) in scores.iter_mut().zip(normal) {
                    *score = ((f64::from(*score) - mean) / std) as f32;
                }
            }
        }
        units
    }

    /// Gradients (rows, units) from those of the scores (rows, labels); `units` are read where a ReLU stands behind them.
    pub(super) fn backward(&self, d_scores: &[f32], units: impl FnOnce() -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let mut d = d_scores.to_vec();
        if let Some(normal) = &self.normal {
            for d in d.chunks_exact_mut(normal.len()) {
                d.iter_mut().zip(normal).for_each(|(d, [_, std])| *d = (f64::from(*d) / std) as f32);
            }
        }
        let Some(Second { w, hidden, .. }) = &self.second else { return Ok(d) };
        let mut units = units()?;
        if let Some(bias) = &self.bias {
            add_rows(&mut units, bias);
        }
        for (units, d) in units.chunks_exact_mut(*hidden).zip(d.chunks_exact(w.len() / hidden)) {
            for (at, unit) in units.iter_mut().enumerate() {
                let column = w.iter().skip(at).step_by(*hidden);
                let sum: f64 = column.zip(d).map(|(w, d)| f64::from(*w) * f64::from(*d)).sum();
                *unit = if *unit > 0.0 { sum as f32 } else { 0.0 };
            }
        }
        Ok(units)
    }
}

/// Adds `bias` to every row.
fn add_rows(rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
}

fn dot(w: &[f32], u: &[f32], curve: impl Fn(f32) -> f32) -> f32 {
    w.iter().zip(u).map(|(w, u)| f64::from(*w) * f64::from(curve(*u))).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of two labels and three hidden units: every part is there.
    fn whole() -> Readout {
        let second = Second { w: vec![0.5, -1.0, 2.0, 0.25, 3.0, -0.5], bias: Some(vec![0.1, -0.2]), hidden: 3 };
        Readout { bias: Some(vec![0.3, -0.1, 0.2]), second: Some(second), normal: Some(vec![[0.4, 2.0], [-1.0, 0.5]]) }
    }

    #[test]
    fn a_plain_head_leaves_every_bit() {
        let units = vec![1.5f32, -0.0, f32::MIN_POSITIVE, 3.0e38];
        let same = Readout::default().forward(units.clone());
        assert!(units.iter().zip(&same).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(Readout::default().backward(&units, || unreachable!()).unwrap(), units);
    }

    #[test]
    fn two_layers_by_hand() {
        // relu(u + b₁) = (1.3, 0, 0.7): 0.65 + 1.4 + 0.1 = 2.15 and 0.325 − 0.35 − 0.2 = −0.225.
        let scores = whole().forward(vec![1.0, 0.05, 0.5]);
        for (found, expected) in scores.iter().zip([(2.15 - 0.4) / 2.0, (-0.225 + 1.0) / 0.5]) {
            assert!((found - expected).abs() <= 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn backward_is_the_slope_of_forward() {
        let (units, d) = (vec![1.0, 0.05, 0.5, -0.4, 0.9, 0.7], vec![0.7, -1.1, 0.2, 0.9]);
        let loss = |units: &[f32]| {
            whole().forward(units.to_vec()).iter().zip(&d).map(|(r, d)| f64::from(*r) * f64::from(*d)).sum::<f64>()
        };
        let found = whole().backward(&d, || Ok(units.clone())).unwrap();
        for at in 0..units.len() {
            let [up, down] = [0.01f32, -0.01].map(|step| {
                let mut moved = units.clone();
                moved[at] += step;
                loss(&moved)
            });
            let slope = (up - down) / 0.02;
            assert!((f64::from(found[at]) - slope).abs() <= 2e-4, "unit {at}: found {}, slope {slope}", found[at]);
        }
    }
}
