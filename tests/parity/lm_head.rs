//! The language-model head: log-probabilities and gradient rows, in one chunk and in several; KL between two models.

use ares::backend::{Backend, Cuda, Tensor};
use ares::ops::{HeadRows, LmHead};

use crate::harness::*;

/// (R, C, V, chunk rows)
const SHAPES: &[(usize, usize, usize, usize)] =
    &[(1, 24, 100, 128), (7, 40, 256, 128), (70, 36, 301, 64), (200, 64, 131, 128)];

struct Head {
    logprob: Vec<f32>,
    lse: Vec<f32>,
    log_rest: Vec<f32>,
    dh: Vec<f32>,
}

fn targets(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|r| ((r * 37 + vocab - 1) % vocab) as u32).collect()
}

/// Rows whose logits are a few apart; every third one is sure of its target.
fn hidden(rows: usize, cols: usize, vocab: usize, w: &[f32]) -> Vec<f32> {
    let mut h = random(2, rows * cols, 1.0);
    for (r, target) in targets(rows, vocab).into_iter().enumerate().filter(|(r, _)| r % 3 == 1) {
        let direction = &w[target as usize * cols..][..cols];
        let size: f32 = direction.iter().map(|w| w * w).sum();
        h[r * cols..][..cols]
            .iter_mut()
            .zip(direction)
            .for_each(|(h, w)| *h = half::bf16::from_f32(18.0 * w / size).to_f32());
    }
    h
}

fn head<B: LmHead>(ops: &B, (rows, cols, vocab, chunk): (usize, usize, usize, usize), back: bool) -> Head {
    let weights = random(1, vocab * cols, 0.3);
    let h = act(ops, rows, cols, &hidden(rows, cols, vocab, &weights));
    let w = ops.weight(vocab, cols, weights).unwrap();
    let targets = numbers(ops, rows, 1, &targets(rows, vocab));
    let mut out = HeadRows::with_capacity(ops, rows).unwrap();
    for column in [&mut out.logprob, &mut out.lse, &mut out.log_rest] {
        *column = numbers(ops, rows, 1, &vec![f32::NAN; rows]);
    }
    let (mut dh, mut chunk) = (unwritten(ops, rows, cols), unwritten(ops, chunk, vocab));
    ops.lm_head_forward(&mut out, back.then_some(&mut dh), &mut chunk, &h, &targets, &w).unwrap();
    let column = |tensor: &Tensor<B, f32>| tensor.read(ops).unwrap();
    Head { logprob: column(&out.logprob), lse: column(&out.lse), log_rest: column(&out.log_rest), dh: read(ops, &dh) }
}

/// Against the reference, with and without gradient rows.
pub fn compare_head(device: &Cuda, shape: (usize, usize, usize, usize)) {
    let (found, expected) = (head(device, shape, true), head(&reference(), shape, true));
    near("logprob", &found.logprob, &expected.logprob, 2e-6, 4e-6);
    near("lse", &found.lse, &expected.lse, 2e-6, 2e-6);
    near("log_rest", &found.log_rest, &expected.log_rest, 2e-6, 4e-6);
    // p is rounded twice, each time to half an ulp, and multiplied with weights below 1.
    close("dh", &found.dh, &expected.dh, 1.0, 2e-3);
    let without = head(device, shape, false);
    assert_eq!((without.logprob, without.lse, without.log_rest), (found.logprob, found.lse, found.log_rest));
    assert!(without.dh.iter().all(|v| v.is_nan()), "dh was not asked for");
}

#[test]
fn log_probabilities_and_gradient_rows() {
    let Some(device) = device() else { return };
    SHAPES.iter().for_each(|&shape| compare_head(&device, shape));
}

/// One row's results do not depend on the others, nor on the chunk that it falls into.
#[test]
fn a_row_alone_has_the_same_bits() {
    let Some(device) = device() else { return };
    let (rows, cols, vocab) = (200, 64, 131);
    let values = random(5, rows * cols, 1.0);
    let w = device.weight(vocab, cols, random(1, vocab * cols, 0.3)).unwrap();
    let run = |rows: std::ops::Range<usize>, chunk: usize| {
        let h = act(&device, rows.len(), cols, &values[rows.start * cols..rows.end * cols]);
        let targets: Vec<u32> = rows.clone().map(|r| (r % vocab) as u32).collect();
        let targets = numbers(&device, rows.len(), 1, &targets);
        let mut out = HeadRows::with_capacity(&device, rows.len()).unwrap();
        let (mut dh, mut chunk) = (unwritten(&device, rows.len(), cols), unwritten(&device, chunk, vocab));
        device.lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &h, &targets, &w).unwrap();
        let columns = [&out.logprob, &out.lse, &out.log_rest].map(|column| column.read(&device).unwrap());
        (columns, read(&device, &dh))
    };
    let (columns, dh) = run(0..rows, 128);
    for row in [0, 17, 130, 199] {
        let (alone, dh_alone) = run(row..row + 1, 64);
        assert_eq!(alone.map(|column| column[0]), columns.clone().map(|column| column[row]), "row {row}");
        assert_eq!(dh_alone, dh[row * cols..][..cols], "row {row}");
    }
}

fn divergence<B: LmHead>(
    ops: &B,
    (rows, cols, vocab, chunk): (usize, usize, usize, usize),
    apart: f32,
) -> [Vec<f32>; 2] {
    let (h0, noise) = (random(2, rows * cols, 1.0), random(3, rows * cols, 1.0));
    let h: Vec<f32> = h0.iter().zip(&noise).map(|(h, n)| half::bf16::from_f32(h + apart * n).to_f32()).collect();
    let (h, h0) = (act(ops, rows, cols, &h), act(ops, rows, cols, &h0));
    let w = ops.weight(vocab, cols, random(1, vocab * cols, 0.3)).unwrap();
    let (mut kl, mut dh) = (numbers(ops, rows, 1, &vec![f32::NAN; rows]), unwritten(ops, rows, cols));
    let (mut chunk, mut chunk0) = (unwritten(ops, chunk, vocab), unwritten(ops, chunk, vocab));
    ops.lm_head_kl(&mut kl, &mut dh, &mut chunk, &mut chunk0, &h, &h0, &w).unwrap();
    [kl.read(ops).unwrap(), read(ops, &dh)]
}

/// Against the reference, for models that are `apart`.
pub fn compare_divergence(device: &Cuda, shape: (usize, usize, usize, usize), apart: f32) {
    let ([kl, dh], [expected_kl, expected_dh]) =
        (divergence(device, shape, apart), divergence(&reference(), shape, apart));
    near("kl", &kl, &expected_kl, 1e-4, 4e-6);
    // An ulp of the largest differences, however small they are: nothing is lost where the models agree.
    let largest = expected_dh.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    close("dh", &dh, &expected_dh, 1.0, largest / 64.0);
}

#[test]
fn divergence_of_near_and_of_distant_models() {
    let Some(device) = device() else { return };
    for &shape in SHAPES {
        [0.01, 0.2, 3.0].into_iter().for_each(|apart| compare_divergence(&device, shape, apart));
    }
    let [kl, dh] = divergence(&device, SHAPES[1], 0.0);
    assert!(
        kl.iter().all(|kl| kl.abs() <= 1e-6) && dh.iter().all(|d| *d == 0.0),
        "a model does not differ from itself"
    );
}
