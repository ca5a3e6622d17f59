//! The score head.

use ares::ops::score_head::naive;
use ares::ops::{Ops, ScoreBackward};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    cols: usize,
    h: Vec<f32>,
    w: Vec<f32>,
    dr: Vec<f32>,
    dw: Vec<f32>,
}

impl Case {
    fn new(rows: usize, cols: usize, labels: usize) -> Case {
        let random = |seed, len| random(seed, len, 1.0);
        let (w, dw) = (random(2, labels * cols), random(4, labels * cols));
        Case { cols, h: random(1, rows * cols), w, dr: random(3, rows * labels), dw }
    }

    fn labels(&self) -> usize {
        self.w.len() / self.cols
    }

    fn take(&self, rows: &[usize]) -> Case {
        let (h, dr) = (rows_of(&self.h, self.cols, rows), rows_of(&self.dr, self.labels(), rows));
        Case { h, dr, ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let (mut r, mut dh, mut dw) = (nans(self.dr.len()), nans(self.h.len()), self.dw.clone());
        naive::forward(&mut r, &self.h, &self.w, self.cols);
        naive::backward(&mut dh, &mut dw, &self.dr, &self.h, &self.w, self.cols);
        Plain::from([("r", r), ("dh", dh), ("dw", dw)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (h, w) = (&act(ops, self.cols, &self.h), &numbers(ops, self.cols, &self.w));
        let (dr, mut dw) = (&numbers(ops, self.labels(), &self.dr), numbers(ops, self.cols, &self.dw));
        let mut r = unwritten(ops, h.rows(), self.labels());
        let [mut dh, mut frozen] = [(); 2].map(|()| unwritten(ops, h.rows(), self.cols));
        ops.score_forward(&mut r, h, w).unwrap();
        ops.score_backward(ScoreBackward { dh: &mut dh, dw: Some(&mut dw), dr, h, w }).unwrap();
        ops.score_backward(ScoreBackward { dh: &mut frozen, dw: None, dr, h, w }).unwrap();
        let mut out = Outputs::default();
        out.f32(ops, "r", r, 1e-5, 1e-4);
        out.act(ops, "dh", dh, 1.0, 1e-6);
        out.f32(ops, "dw", dw, 1e-5, 1e-5).sum();
        assert_eq!(bits(&read(ops, frozen)), bits(out.named("dh")), "dh of a frozen head");
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [(1, 8), (7, 36), (9, 128), (33, 300)];
    shapes.into_iter().flat_map(|(rows, cols)| [1, 3].map(|labels| Case::new(rows, cols, labels)))
}

#[test]
fn gradient() {
    let case = Case::new(5, 11, 3);
    assert_slope(&case, ("r", &case.dr), ("dh", &[]), |case| &mut case.h);
    assert_slope(&case, ("r", &case.dr), ("dw", &case.dw), |case| &mut case.w);
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("score_head", &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("score_head", &device, &case));
}

#[test]
fn invariance() {
    let case = Case::new(ROWS, 24, 2);
    assert_alone("score_head", &|rows: &[usize]| case.take(rows));
}
