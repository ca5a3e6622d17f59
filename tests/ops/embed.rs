//! The embedding copies; nothing may touch the copy.

use ares::ops::Ops;
use ares::ops::embed::naive;

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    cols: usize,
    tokens: Vec<u32>,
    table: Vec<f32>,
}

impl Case {
    fn new(rows: u32, cols: usize) -> Case {
        let vocab = 29;
        Case { cols, tokens: (0..rows).map(|t| t * 13 % vocab).collect(), table: random(1, vocab as usize * cols, 1.0) }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let mut x = nans(self.tokens.len() * self.cols);
        naive::forward(&mut x, &self.tokens, &self.table);
        Plain::from([("x", x)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let mut x = unwritten(ops, self.tokens.len(), self.cols);
        let table = ops.weight(self.table.len() / self.cols, self.cols, self.table.clone()).unwrap();
        ops.embed(&mut x, &indices(ops, &self.tokens), &table).unwrap();
        let mut out = Outputs::default();
        out.act(ops, "x", x, 0.0, 0.0);
        out
    }
}

const SHAPES: [(u32, usize); 4] = [(1, 8), (7, 36), (9, 128), (200, 7)];

#[test]
fn naive() {
    SHAPES.into_iter().for_each(|(rows, cols)| assert_naive("embed", &Case::new(rows, cols), 0.0, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    SHAPES.into_iter().for_each(|(rows, cols)| assert_parity("embed", &device, &Case::new(rows, cols)));
}
