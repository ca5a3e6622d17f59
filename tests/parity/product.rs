//! Products with LoRA, both ways, through the projection: one to three parts, every remainder of eight, odd numbers of rows.

use ares::backend::{Backend, Cuda};
use ares::ops::{Lora, LoraGrad, Project};

use crate::harness::*;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub t: usize,
    pub k: usize,
    pub parts: &'static [usize],
    pub rank: usize,
}

const SHAPES: &[Shape] = &[
    Shape { t: 1, k: 24, parts: &[8], rank: 4 },
    Shape { t: 7, k: 40, parts: &[24, 8, 8], rank: 8 },
    Shape { t: 64, k: 200, parts: &[300], rank: 16 },
    Shape { t: 67, k: 100, parts: &[33, 17, 9], rank: 5 },
    Shape { t: 130, k: 72, parts: &[136, 128], rank: 16 },
    Shape { t: 300, k: 64, parts: &[70, 50], rank: 40 },
];

/// What an op overwrote, and the gradients that it added to.
struct Results {
    y: Vec<f32>,
    xa: Vec<f32>,
    dx: Vec<f32>,
    dxa: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
}

fn project<B: Project>(ops: &B, Shape { t, k, parts, rank }: Shape, adapted: bool) -> Results {
    let (n, width) = (parts.iter().sum::<usize>(), parts.len() * rank);
    let w = ops.weight(n, k, random(1, n * k, 0.2)).unwrap();
    let (x, residual) = (act(ops, t, k, &random(2, t * k, 1.0)), act(ops, t, n, &random(3, t * n, 3.0)));
    let (a, b) = (act(ops, width, k, &random(4, width * k, 0.3)), act(ops, n, rank, &random(5, n * rank, 0.3)));
    let lora = adapted.then(|| Lora { parts: parts.to_vec(), rank, scale: 2.0, a, b });
    let mut grad = LoraGrad {
        da: numbers(ops, width, k, &random(6, width * k, 1.0)),
        db: numbers(ops, n, rank, &random(7, n * rank, 1.0)),
    };
    let (mut y, mut xa) = (unwritten(ops, t, n), unwritten(ops, t, width));
    let bias = adapted.then(|| act(ops, 1, n, &random(9, n, 2.0)));
    ops.project_forward(&mut y, &mut xa, &x, &residual, &w, bias.as_ref(), lora.as_ref()).unwrap();
    let dy = act(ops, t, n, &random(8, t * n, 1.0));
    let (mut dx, mut dxa) = (unwritten(ops, t, k), unwritten(ops, t, width));
    let grads = adapted.then_some(&mut grad);
    ops.project_backward(&mut dx, grads, &mut dxa, &dy, &x, &xa, &w, lora.as_ref()).unwrap();
    let (da, db) = (grad.da.read(ops).unwrap(), grad.db.read(ops).unwrap());
    Results { y: read(ops, &y), xa: read(ops, &xa), dx: read(ops, &dx), dxa: read(ops, &dxa), da, db }
}

/// Both ways against the reference, with or without an adapter.
pub fn compare(device: &Cuda, shape: Shape, adapted: bool) {
    let (found, expected) = (project(device, shape, adapted), project(&reference(), shape, adapted));
    let what = |name: &str| format!("{name} of {shape:?}");
    if !adapted {
        close(&what("y"), &found.y, &expected.y, 1.0, 1e-5);
        close(&what("dx"), &found.dx, &expected.dx, 1.0, 1e-5);
        return;
    }
    close(&what("xa"), &found.xa, &expected.xa, 1.0, 2e-6);
    close(&what("dxa"), &found.dxa, &expected.dxa, 1.0, 2e-6);
    // xa and dxa may round the other way where a sum lies between two bf16: an ulp of one term.
    close(&what("y"), &found.y, &expected.y, 1.0, 4e-3);
    close(&what("dx"), &found.dx, &expected.dx, 1.0, 8e-3);
    near(&what("dA"), &found.da, &expected.da, 1e-5, 2e-2);
    near(&what("dB"), &found.db, &expected.db, 1e-5, 4e-2);
}

#[test]
fn products_with_adapters() {
    let Some(device) = device() else { return };
    SHAPES.iter().for_each(|&shape| compare(&device, shape, true));
}

#[test]
fn products_without_adapters() {
    let Some(device) = device() else { return };
    SHAPES.iter().for_each(|&shape| compare(&device, shape, false));
}

/// One row alone, and among others: the same bits.
#[test]
fn a_row_alone_has_the_same_bits() {
    let Some(device) = device() else { return };
    let (rows, k, n, rank) = (130, 72, 136, 8);
    let values = random(9, rows * k, 1.0);
    let w = device.weight(n, k, random(1, n * k, 0.2)).unwrap();
    let (a, b) = (act(&device, rank, k, &random(4, rank * k, 0.3)), act(&device, n, rank, &random(5, n * rank, 0.3)));
    let lora = Lora { parts: vec![n], rank, scale: 2.0, a, b };
    let run = |range: std::ops::Range<usize>| {
        let t = range.len();
        let x = act(&device, t, k, &values[range.start * k..range.end * k]);
        let residual = act(&device, t, n, &vec![0.5; t * n]);
        let (mut y, mut xa) = (unwritten(&device, t, n), unwritten(&device, t, rank));
        device.project_forward(&mut y, &mut xa, &x, &residual, &w, None, Some(&lora)).unwrap();
        let (mut dx, mut dxa) = (unwritten(&device, t, k), unwritten(&device, t, rank));
        device.project_backward(&mut dx, None, &mut dxa, &y, &x, &xa, &w, Some(&lora)).unwrap();
        (read(&device, &y), read(&device, &dx))
    };
    let (y, dx) = run(0..rows);
    for row in [0, 63, 64, 129] {
        assert_eq!(run(row..row + 1), (y[row * n..][..n].to_vec(), dx[row * k..][..k].to_vec()), "row {row}");
    }
}
