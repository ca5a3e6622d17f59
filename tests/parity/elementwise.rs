//! Norm, rows, score head, AdamW: kernels without a product.

use ares::backend::Tensor;
use ares::ops::{AdamW, AdamWSpec, Embed, Norm, NormSpec, Parameter, Rows, ScoreHead};

use crate::harness::*;

const SHAPES: &[(usize, usize)] = &[(1, 8), (7, 36), (9, 128), (33, 300)];

fn norm<B: Norm>(ops: &B, (rows, cols): (usize, usize), unit_offset: bool) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let spec = NormSpec { eps: 0.3, unit_offset }; // large: it must be seen
    let x = act(ops, rows, cols, &random(1, rows * cols, 2.0));
    let w = act(ops, 1, cols, &random(2, cols, 1.0));
    let dy = act(ops, rows, cols, &random(3, rows * cols, 1.0));
    let mut dx = act(ops, rows, cols, &random(4, rows * cols, 1.0));
    let (mut y, mut rstd) = (unwritten(ops, rows, cols), numbers(ops, rows, 1, &vec![f32::NAN; rows]));
    ops.norm_forward(&mut y, &mut rstd, &x, &w, spec).unwrap();
    ops.norm_backward(&mut dx, &dy, &x, &rstd, &w, spec).unwrap();
    (read(ops, &y), rstd.read(ops).unwrap(), read(ops, &dx))
}

#[test]
fn norm_both_ways() {
    let Some(device) = device() else { return };
    for &shape in SHAPES {
        for unit_offset in [false, true] {
            let (found, expected) = (norm(&device, shape, unit_offset), norm(&reference(), shape, unit_offset));
            close("y", &found.0, &expected.0, 1.0, 0.0);
            near("rstd", &found.1, &expected.1, 1e-6, 0.0);
            close("dx", &found.2, &expected.2, 1.0, 1e-5);
        }
    }
}

#[test]
fn a_row_alone_is_normed_to_the_same_bits() {
    let Some(device) = device() else { return };
    let spec = NormSpec { eps: 1e-6, unit_offset: false };
    let (rows, cols) = (19, 200);
    let (values, gain) = (random(5, rows * cols, 1.0), random(6, cols, 1.0));
    let run = |rows: usize, values: &[f32]| {
        let (x, w) = (act(&device, rows, cols, values), act(&device, 1, cols, &gain));
        let (mut y, mut rstd) = (unwritten(&device, rows, cols), numbers(&device, rows, 1, &vec![f32::NAN; rows]));
        device.norm_forward(&mut y, &mut rstd, &x, &w, spec).unwrap();
        read(&device, &y)
    };
    let all = run(rows, &values);
    for row in [0, 8, 18] {
        let range = row * cols..(row + 1) * cols;
        assert_eq!(run(1, &values[range.clone()]), all[range]);
    }
}

fn rows<B: Rows + Embed>(ops: &B, (count, cols): (usize, usize)) -> Vec<Vec<f32>> {
    let all = count + 5;
    let index: Vec<u32> = (0..count).map(|i| ((i * 7 + 3) % all) as u32).collect();
    let unique: Vec<u32> = (0..count as u32).map(|i| i + (i >= 2) as u32 * 3).collect();
    let x = act(ops, all, cols, &random(1, all * cols, 1.0));
    let dy = act(ops, count, cols, &random(2, count * cols, 1.0));
    let table = ops.weight(all, cols, random(3, all * cols, 1.0)).unwrap();
    let (mut y, mut dx) = (unwritten(ops, count, cols), unwritten(ops, all, cols));
    let mut embedded = unwritten(ops, count, cols);
    ops.gather(&mut y, &x, &numbers(ops, count, 1, &index)).unwrap();
    ops.scatter(&mut dx, &dy, &numbers(ops, count, 1, &unique)).unwrap();
    ops.embed(&mut embedded, &numbers(ops, count, 1, &index), &table).unwrap();
    let gathered = read(ops, &y);
    ops.scale_rows(&mut y, &numbers(ops, count, 1, &random(4, count, 3.0))).unwrap();
    vec![gathered, read(ops, &dx), read(ops, &embedded), read(ops, &y)]
}

#[test]
fn rows_are_moved_exactly() {
    let Some(device) = device() else { return };
    for &shape in SHAPES {
        assert_eq!(rows(&device, shape), rows(&reference(), shape));
    }
}

fn score<B: ScoreHead>(ops: &B, (rows, cols): (usize, usize), labels: usize) -> [Vec<f32>; 3] {
    let h = act(ops, rows, cols, &random(1, rows * cols, 1.0));
    let w = numbers(ops, labels, cols, &random(2, labels * cols, 1.0));
    let dr = numbers(ops, rows, labels, &random(3, rows * labels, 1.0));
    let mut dw = numbers(ops, labels, cols, &random(4, labels * cols, 1.0));
    let mut r = numbers(ops, rows, labels, &vec![f32::NAN; rows * labels]);
    let mut dh = unwritten(ops, rows, cols);
    ops.score_forward(&mut r, &h, &w).unwrap();
    ops.score_backward(&mut dh, Some(&mut dw), &dr, &h, &w).unwrap();
    [r.read(ops).unwrap(), read(ops, &dh), dw.read(ops).unwrap()]
}

#[test]
fn score_head_both_ways() {
    let Some(device) = device() else { return };
    for &shape in SHAPES {
        for labels in [1, 3] {
            let (found, expected) = (score(&device, shape, labels), score(&reference(), shape, labels));
            near("r", &found[0], &expected[0], 1e-5, 1e-4);
            close("dh", &found[1], &expected[1], 1.0, 1e-6);
            near("dw", &found[2], &expected[2], 1e-5, 1e-5);
        }
    }
}

/// Three parameters, one of them of more than one block, one without an operand; two steps.
fn adamw<B: AdamW>(ops: &B, clip: f32, poison: bool) -> Vec<Vec<f32>> {
    let shapes = [(5, 12), (40, 210), (1, 3)];
    let values = |seed: u64, (r, c): (usize, usize)| numbers(ops, r, c, &random(seed, r * c, 1.0));
    let mut master: Vec<Tensor<B, f32>> = (0..).zip(shapes).map(|(i, s)| values(i, s)).collect();
    let zeros = |(r, c): (usize, usize)| numbers(ops, r, c, &vec![0.0f32; r * c]);
    let (mut m, mut v): (Vec<_>, Vec<_>) = shapes.iter().map(|&s| (zeros(s), zeros(s))).unzip();
    let mut operands: Vec<Tensor<B>> = shapes.iter().map(|&(r, c)| unwritten(ops, r, c)).collect();
    let mut norm = numbers(ops, 1, 1, &[f32::NAN]);
    for step in 1..=2 {
        let mut grad: Vec<Tensor<B, f32>> =
            (0..).zip(shapes).map(|(i, s)| values(10 * u64::from(step) + i, s)).collect();
        if poison && step == 2 {
            let (r, c) = shapes[1];
            let mut spoilt = random(1, r * c, 1.0);
            spoilt[r * c - 1] = f32::NAN;
            grad[1] = numbers(ops, r, c, &spoilt);
        }
        let spec = AdamWSpec { lr: 0.05, beta1: 0.9, beta2: 0.99, eps: 1e-8, decay: 0.1, clip, step };
        let tensors = master.iter_mut().zip(&mut m).zip(&mut v).zip(&grad).zip(&mut operands).enumerate();
        let mut parameters: Vec<Parameter<'_, B>> = tensors
            .map(|(i, ((((master, m), v), grad), operand))| Parameter {
                master,
                m,
                v,
                grad,
                operand: (i < 2).then_some((operand, 0.5)),
            })
            .collect();
        ops.adamw(&mut norm, &mut parameters, spec).unwrap();
    }
    let mut out = vec![norm.read(ops).unwrap()];
    out.extend(master.iter().chain(&m).chain(&v).map(|t| t.read(ops).unwrap()));
    out.extend(operands[..2].iter().map(|t| read(ops, t)));
    let mut again = unwritten(ops, 40, 210);
    ops.operand(&mut again, &master[1], 0.25).unwrap();
    out.push(read(ops, &again));
    out
}

#[test]
fn adamw_steps_and_clips() {
    let Some(device) = device() else { return };
    for clip in [0.5, 1e9] {
        let (found, expected) = (adamw(&device, clip, false), adamw(&reference(), clip, false));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            if i < 10 {
                near(&format!("tensor {i}"), found, expected, 2e-5, 1e-6);
            } else {
                close(&format!("operand {i}"), found, expected, 1.0, 1e-6);
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let Some(device) = device() else { return };
    let (found, expected) = (adamw(&device, 1.0, true), adamw(&reference(), 1.0, true));
    assert!(found[0][0].is_nan() && expected[0][0].is_nan());
    for (found, expected) in found[1..10].iter().zip(&expected[1..10]) {
        near("kept", found, expected, 2e-5, 1e-6);
    }
}
