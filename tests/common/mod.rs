//! What the tests of the operations share: noise, tensors with a guarded tail, packings.

#![allow(dead_code)] // each test target uses its own part of this

use std::ops::Range;

use ares::backend::{Backend, Cpu, Tensor};
use ares::ops::{AttentionSpec, Lora, LoraGrad, Packing, Segment};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows behind those in use: NaN before, NaN after, so that an op that reads or writes them is found out.
const SPARE: usize = 3;

/// `len` numbers in (-1, 1).
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// `values` as a matrix of `cols` columns.
pub fn tensor(cols: usize, values: &[f32]) -> Tensor<Cpu> {
    let mut tensor = nans(values.len() / cols, cols);
    tensor.write(&Cpu::new(), values).unwrap();
    tensor
}

/// An output that must be overwritten.
pub fn nans(rows: usize, cols: usize) -> Tensor<Cpu> {
    let mut tensor =
        Tensor::from_host(&Cpu::new(), rows + SPARE, cols, &vec![f32::NAN; (rows + SPARE) * cols]).unwrap();
    tensor.set_rows(rows).unwrap();
    tensor
}

/// A parameter: no spare rows, since the optimiser owns it whole.
pub fn parameter(cols: usize, values: &[f32]) -> Tensor<Cpu> {
    Tensor::from_host(&Cpu::new(), values.len() / cols, cols, values).unwrap()
}

pub fn indices(values: &[u32]) -> Tensor<Cpu, u32> {
    Tensor::from_host(&Cpu::new(), values.len(), 1, values).unwrap()
}

pub fn weight(rows: usize, values: &[f32]) -> <Cpu as Backend>::Weight {
    Cpu::new().weight(rows, values.len() / rows, values.to_vec()).unwrap()
}

/// The rows in use; the spare rows must be as they were.
pub fn values(tensor: &Tensor<Cpu>) -> Vec<f32> {
    let used = tensor.rows() * tensor.cols();
    let spare = &tensor.buffer[used..];
    assert!(spare.iter().all(|v| v.is_nan()), "rows behind the {} in use were written", tensor.rows());
    tensor.buffer[..used].to_vec()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Every number within `limit` of what is expected; NaN fails.
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], limit: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let apart = (f64::from(found) - expected).abs();
        assert!(apart <= limit, "{what}, element {i}: found {found}, expected {expected} (limit {limit:e})");
    }
}

/// Masters of one product's adapter.
pub struct Masters {
    pub parts: Vec<usize>,
    pub rank: usize,
    pub scale: f32,
    pub a: Vec<f32>, // (P·r, K)
    pub b: Vec<f32>, // (N, r)
}

impl Masters {
    pub fn noise(seed: u64, parts: &[usize], inputs: usize, rank: usize) -> Masters {
        let (width, outputs) = (parts.len() * rank, parts.iter().sum::<usize>());
        let (a, b) = (noise(seed, width * inputs), noise(seed + 1, outputs * rank));
        Masters { parts: parts.to_vec(), rank, scale: 0.7, a, b }
    }

    pub fn width(&self) -> usize {
        self.parts.len() * self.rank
    }

    /// The operands that a product reads.
    pub fn lora(&self) -> Lora<Cpu> {
        self.lora_of(&self.a, &self.b)
    }

    /// The same adapter with other masters.
    pub fn lora_of(&self, a: &[f32], b: &[f32]) -> Lora<Cpu> {
        let scaled: Vec<f32> = b.iter().map(|b| b * self.scale).collect();
        let (a, b) = (parameter(a.len() / self.width(), a), parameter(self.rank, &scaled));
        Lora { parts: self.parts.clone(), rank: self.rank, scale: self.scale, a, b }
    }

    /// Gradients that already hold `noise(seed, …)`.
    pub fn grad(&self, seed: u64) -> LoraGrad<Cpu> {
        let (da, db) = (noise(seed, self.a.len()), noise(seed + 1, self.b.len()));
        LoraGrad { da: parameter(self.a.len() / self.width(), &da), db: parameter(self.rank, &db) }
    }
}

/// Lengths of a prompt segment and of the answer segments behind it.
pub type Group<'a> = (usize, &'a [usize]);

/// The tables of a packed batch; positions run on from the prompt into each answer.
pub fn packing(groups: &[Group]) -> Packing<Cpu> {
    let (mut segments, mut ranges, mut positions, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (prompt_len, answers) in groups {
        let (first, end) = (segments.len(), at + prompt_len + answers.iter().sum::<usize>());
        let prompt = at..at + prompt_len;
        if *prompt_len > 0 {
            segments.push(Segment { rows: prompt.clone(), prompt: at..at, seen_until: end });
            positions.extend(0..*prompt_len as u32);
            at += prompt_len;
        }
        for answer in *answers {
            let rows = at..at + answer;
            segments.push(Segment { rows: rows.clone(), prompt: prompt.clone(), seen_until: rows.end });
            positions.extend((0..*answer as u32).map(|p| p + *prompt_len as u32));
            at += answer;
        }
        ranges.push(first..segments.len());
    }
    let mut packing = Packing::with_capacity(&Cpu::new(), at).unwrap();
    packing.set(&Cpu::new(), segments, ranges, &positions).unwrap();
    packing
}

/// Keys that packed row `i` sees, by the batch's table: the definition that every implementation is held against.
pub fn keys_of(packing: &Packing<Cpu>, i: usize, spec: &AttentionSpec) -> Vec<usize> {
    let positions = &packing.positions.buffer;
    let segment = packing.segments.iter().find(|s| s.rows.contains(&i)).expect("segments tile the rows");
    let visible = |j: &usize| {
        let back = i64::from(positions[i]) - i64::from(positions[*j]);
        (!spec.causal || back >= 0) && spec.window.is_none_or(|window| back.abs() < window as i64)
    };
    segment.prompt.clone().chain(segment.rows.clone()).filter(visible).collect()
}

/// Columns of head `head` of q (0), k (1) or v (2).
pub fn columns(spec: &AttentionSpec, which: usize, head: usize) -> Range<usize> {
    let first = [0, spec.heads, spec.heads + spec.kv_heads][which] + head;
    first * spec.head_dim..(first + 1) * spec.head_dim
}
