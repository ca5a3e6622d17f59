//! Random weights of a real shape: what a benchmark runs on where there is no checkpoint. Never zeros: they are faster.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::checkpoint::{WeightSource, promised};
use super::config::ModelConfig;
use crate::error::{Error, Result};

/// Uniform numbers, scaled so that activations keep their size from layer to layer; norms are 1.
pub(crate) struct RandomWeights {
    shapes: BTreeMap<String, Vec<usize>>,
    seed: u64,
}

impl RandomWeights {
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> RandomWeights {
        RandomWeights { shapes: promised(config).into_iter().collect(), seed }
    }
}

impl WeightSource for RandomWeights {
    fn shape(&self, name: &str) -> Result<&[usize]> {
        let missing =
            || Error::Shape { op: "random weights", expected: "a tensor of the config".into(), found: name.into() };
        self.shapes.get(name).map(Vec::as_slice).ok_or_else(missing)
    }

    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        let shape = self.shape(name)?;
        let (count, before) = (shape.iter().product::<usize>(), out.len());
        if name.contains("norm") {
            out.resize(before + count, 1.0);
            return Ok(());
        }
        let key = name.bytes().fold(self.seed, |key, byte| mix(key ^ u64::from(byte)));
        let size = (3.0 / shape[shape.len() - 1] as f32).sqrt();
        out.par_extend((0..count as u64).into_par_iter().map(|i| {
            let unit = (mix(key.wrapping_add(i)) >> 40) as f32 / (1u64 << 24) as f32;
            (2.0 * unit - 1.0) * size
        }));
        Ok(())
    }
}

/// Zeros of a real shape, for a device that computes nothing.
pub(crate) struct BlankWeights(pub(crate) RandomWeights);

impl WeightSource for BlankWeights {
    fn shape(&self, name: &str) -> Result<&[usize]> {
        self.0.shape(name)
    }

    fn read(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        out.resize(out.len() + self.0.shape(name)?.iter().product::<usize>(), 0.0);
        Ok(())
    }
}

/// SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
