//! RMSNorm.

use ares::ops::norm::naive;
use ares::ops::{NormBackward, NormForward, NormSpec, Ops};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    spec: NormSpec,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
    residual: Option<Vec<f32>>,
}

impl Case {
    /// With an offset also with a residual, as Gemma 2 has it.
    fn new(rows: usize, cols: usize, unit_offset: bool) -> Case {
        let spec = NormSpec { eps: 0.3, unit_offset }; // large: it must be seen
        let random = |seed, scale| random(seed, rows * cols, scale);
        let (residual, w) = (unit_offset.then(|| random(5, 1.0)), toolkit::random(2, cols, 1.0));
        Case { spec, x: random(1, 2.0), w, dy: random(3, 1.0), dx: random(4, 1.0), residual }
    }

    fn take(&self, rows: &[usize]) -> Case {
        let take = |values| rows_of(values, self.w.len(), rows);
        let residual = self.residual.as_ref().map(|values| take(values));
        Case { x: take(&self.x), dy: take(&self.dy), dx: take(&self.dx), residual, ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let (mut y, mut rstd, mut dx) = (nans(self.x.len()), nans(self.x.len() / self.w.len()), self.dx.clone());
        naive::forward(&mut y, &mut rstd, &self.x, &self.w, self.residual.as_deref(), self.spec);
        naive::backward(&mut dx, &self.dy, &self.x, &rstd, &self.w, self.spec);
        Plain::from([("y", y), ("rstd", rstd), ("dx", dx)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let cols = self.w.len();
        let [x, w, dy] = &[&self.x, &self.w, &self.dy].map(|values| act(ops, cols, values));
        let (mut y, mut rstd, mut dx) =
            (unwritten(ops, x.rows(), cols), unwritten(ops, x.rows(), 1), act(ops, cols, &self.dx));
        let residual = self.residual.as_ref().map(|values| act(ops, cols, values));
        let residual = residual.as_ref();
        ops.norm_forward(NormForward { y: &mut y, rstd: &mut rstd, x, w, residual, spec: self.spec }).unwrap();
        ops.norm_backward(NormBackward { dx: &mut dx, dy, x, rstd: &rstd, w, spec: self.spec }).unwrap();
        let mut out = Outputs::default();
        out.act(ops, "y", y, 1.0, 0.0);
        out.f32(ops, "rstd", rstd, 1e-6, 0.0);
        out.act(ops, "dx", dx, 1.0, 1e-5);
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [(1, 8), (7, 37), (9, 128), (33, 300), (130, 5)];
    shapes.into_iter().flat_map(|(rows, cols)| [false, true].map(|unit_offset| Case::new(rows, cols, unit_offset)))
}

#[test]
fn gradient() {
    for unit_offset in [false, true] {
        let case = Case::new(3, 37, unit_offset);
        assert_slope(&case, ("y", &case.dy), ("dx", &case.dx), |case| &mut case.x);
    }
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("norm", &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("norm", &device, &case));
}

#[test]
fn invariance() {
    for (cols, unit_offset) in [(37, false), (128, true)] {
        let case = Case::new(ROWS, cols, unit_offset);
        assert_alone("norm", &|rows: &[usize]| case.take(rows));
    }
}
