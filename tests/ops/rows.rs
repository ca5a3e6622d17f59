//! Rows by index.

use ares::ops::Ops;
use ares::ops::rows::naive;

use crate::toolkit::{self, *};

/// Of the embedding; no power of two, so that it rounds.
const SCALE: f32 = 6.7;

#[derive(Clone)]
struct Case {
    cols: usize,
    x: Vec<f32>,
    rows: Vec<u32>,
    /// Some twice.
    tokens: Vec<u32>,
    dy: Vec<f32>,
    weights: Vec<f32>,
}

impl Case {
    /// `count` rows of `count + 5`, none of them twice.
    fn new(count: usize, cols: usize) -> Case {
        let tokens = (0..count as u32).map(|t| t * 13 % (count as u32).div_ceil(2)).collect();
        let rows = (0..count as u32).rev().map(|i| i + (i >= 2) as u32 * 3).collect();
        let (x, dy) = (random(1, (count + 5) * cols, 1.0), random(2, count * cols, 1.0));
        Case { cols, x, rows, tokens, dy, weights: random(3, count, 3.0) }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let (mut y, mut embedded, mut dx) = (nans(self.dy.len()), nans(self.dy.len()), nans(self.x.len()));
        naive::gather(&mut embedded, &self.x, &self.tokens);
        embedded.iter_mut().for_each(|x| *x *= SCALE);
        naive::gather(&mut y, &self.x, &self.rows);
        naive::scatter(&mut dx, &self.dy, &self.rows);
        let mut positioned = nans(self.dy.len());
        naive::gather(&mut positioned, &self.x, &self.rows);
        positioned.iter_mut().zip(&embedded).for_each(|(x, embedded)| *x += embedded);
        let mut scaled = y.clone();
        naive::scale_rows(&mut scaled, &self.weights);
        Plain::from([("embedded", embedded), ("y", y), ("dx", dx), ("scaled", scaled), ("positioned", positioned)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (x, dy, rows) = (act(ops, self.cols, &self.x), act(ops, self.cols, &self.dy), indices(ops, &self.rows));
        let (mut y, mut dx) = (unwritten(ops, dy.rows(), self.cols), unwritten(ops, x.rows(), self.cols));
        let [mut scaled, mut embedded] = [(); 2].map(|()| unwritten(ops, dy.rows(), self.cols));
        let table = ops.weight(x.rows(), self.cols, self.x.clone()).unwrap();
        ops.embed(&mut embedded, &indices(ops, &self.tokens), &table, SCALE).unwrap();
        ops.gather(&mut y, &x, &rows).unwrap();
        ops.scatter(&mut dx, &dy, &rows).unwrap();
        ops.gather(&mut scaled, &x, &rows).unwrap();
        ops.scale_rows(&mut scaled, &numbers(ops, 1, &self.weights)).unwrap();
        let mut out = Outputs::default();
        let mut positioned = unwritten(ops, dy.rows(), self.cols);
        ops.embed(&mut positioned, &indices(ops, &self.tokens), &table, SCALE).unwrap();
        ops.embed_add(&mut positioned, &rows, &table).unwrap();
        out.act(ops, "positioned", positioned, 1.0, 0.0);
        out.act(ops, "embedded", embedded, 1.0, 0.0);
        [("y", y), ("dx", dx), ("scaled", scaled)]
            .into_iter()
            .for_each(|(name, tensor)| out.act(ops, name, tensor, 0.0, 0.0));
        out
    }
}

const SHAPES: [(usize, usize); 5] = [(1, 8), (7, 36), (9, 128), (33, 300), (200, 7)];

#[test]
fn gradient() {
    let case = Case::new(4, 11);
    assert_slope(&case, ("y", &case.dy), ("dx", &[]), |case| &mut case.x);
}

#[test]
fn naive() {
    SHAPES.into_iter().for_each(|(count, cols)| assert_naive("rows", &Case::new(count, cols), 0.0, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    SHAPES.into_iter().for_each(|(count, cols)| assert_parity("rows", &device, &Case::new(count, cols)));
}
