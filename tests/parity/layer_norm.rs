//! LayerNorm: ragged shapes, rows far from zero, the zeros behind a row's columns.

use ares::backend::{Backend, Cuda, Tensor};
use ares::ops::LayerNorm;
use half::bf16;

use crate::harness::*;

const SHAPES: &[(usize, usize)] = &[(1, 8), (7, 36), (9, 128), (33, 300)];

struct Outputs<B: Backend> {
    y: Tensor<B>,
    mean: Tensor<B, f32>,
    rstd: Tensor<B, f32>,
    dx: Tensor<B>,
}

/// Rows of the given deviation at `distance` from zero, both ways.
fn run<B: LayerNorm>(ops: &B, (rows, cols): (usize, usize), bias: bool, distance: f32, deviation: f32) -> Outputs<B> {
    let x: Vec<f32> = random(1, rows * cols, deviation).iter().map(|x| x + distance).collect();
    let x = act(ops, rows, cols, &x);
    let w = act(ops, 1, cols, &random(2, cols, 1.0));
    let bias = bias.then(|| act(ops, 1, cols, &random(5, cols, 1.0)));
    let dy = act(ops, rows, cols, &random(3, rows * cols, 1.0));
    let nan = || numbers(ops, rows, 1, &vec![f32::NAN; rows]);
    let (mut y, mut mean, mut rstd) = (unwritten(ops, rows, cols), nan(), nan());
    let mut dx = act(ops, rows, cols, &random(4, rows * cols, 1.0));
    let eps = 0.3; // large: it must be seen
    ops.layer_norm_forward(&mut y, &mut mean, &mut rstd, &x, &w, bias.as_ref(), eps).unwrap();
    ops.layer_norm_backward(&mut dx, &dy, &x, &mean, &rstd, &w).unwrap();
    Outputs { y, mean, rstd, dx }
}

/// `slack`: what y may differ by where the reference's mean is another in its last place.
fn compare(device: &Cuda, shape: (usize, usize), bias: bool, distance: f32, deviation: f32, slack: f32) {
    let found = run(device, shape, bias, distance, deviation);
    let expected = run(&reference(), shape, bias, distance, deviation);
    let what = |name: &str| format!("{name} of {shape:?} at {distance}");
    let statistics = |o: &Tensor<_, f32>| o.read(device).unwrap();
    near(&what("mean"), &statistics(&found.mean), &expected.mean.read(&reference()).unwrap(), 1e-6, 1e-6);
    near(&what("rstd"), &statistics(&found.rstd), &expected.rstd.read(&reference()).unwrap(), 2e-6, 0.0);
    close(&what("y"), &read(device, &found.y), &read(&reference(), &expected.y), 1.0, slack);
    close(&what("dx"), &read(device, &found.dx), &read(&reference(), &expected.dx), 1.0, 1e-5);
    for (name, tensor) in [("y", &found.y), ("dx", &found.dx)] {
        assert_padding(&what(name), device, tensor);
    }
}

/// Whoever reads a row in whole chunks relies on the zeros behind its columns.
fn assert_padding<B: Backend<Act = bf16>>(what: &str, ops: &B, tensor: &Tensor<B>) {
    let ((rows, cols), stride) = (tensor.shape(), tensor.stride());
    let mut all = vec![bf16::NAN; rows * stride];
    ops.download(&mut all, &tensor.buffer, 0).unwrap();
    for (row, values) in all.chunks_exact(stride).enumerate() {
        assert!(values[cols..].iter().all(|v| *v == bf16::ZERO), "{what}: row {row} ends in {:?}", &values[cols..]);
    }
}

#[test]
fn both_ways() {
    let Some(device) = device() else { return };
    for &shape in SHAPES {
        for bias in [false, true] {
            compare(&device, shape, bias, 0.5, 2.0, 1e-6);
        }
    }
}

/// As far as bf16 goes, which steps by 32 up there: mean x² − mean² in f32 would be off by 1e-4 of itself.
#[test]
fn rows_far_from_zero() {
    let Some(device) = device() else { return };
    for shape in [(3, 128), (5, 300)] {
        compare(&device, shape, true, 4096.0, 40.0, 2e-5);
        compare(&device, shape, false, -4096.0, 40.0, 2e-5);
    }
}

#[test]
fn a_row_alone_has_the_same_bits() {
    let Some(device) = device() else { return };
    let (rows, cols) = (19, 200);
    let (values, gain) = (random(5, rows * cols, 1.0), random(6, 2 * cols, 1.0));
    let run = |rows: usize, values: &[f32]| {
        let x = act(&device, rows, cols, values);
        let (w, bias) = (act(&device, 1, cols, &gain[..cols]), act(&device, 1, cols, &gain[cols..]));
        let nan = || numbers(&device, rows, 1, &vec![f32::NAN; rows]);
        let (mut y, mut mean, mut rstd) = (unwritten(&device, rows, cols), nan(), nan());
        device.layer_norm_forward(&mut y, &mut mean, &mut rstd, &x, &w, Some(&bias), 1e-6).unwrap();
        read(&device, &y)
    };
    let all = run(rows, &values);
    for row in [0, 8, 18] {
        let range = row * cols..(row + 1) * cols;
        assert_eq!(run(1, &values[range.clone()]), all[range]);
    }
}
