//! LayerNorm, also of rows far from zero.

use ares::ops::layer_norm::naive;
use ares::ops::{LayerNormBackward, LayerNormForward, Ops};

use crate::toolkit::{self, *};

const EPS: f32 = 0.3; // large: it must be seen

#[derive(Clone)]
struct Case {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    dy: Vec<f32>,
    dx: Vec<f32>,
    /// What y may differ by where the device's mean is another in its last place.
    slack: f32,
}

impl Case {
    fn new(rows: usize, cols: usize, bias: bool) -> Case {
        let random = |seed, scale| random(seed, rows * cols, scale);
        let [w, b] = [2, 5].map(|seed| toolkit::random(seed, cols, 1.0));
        Case { x: random(1, 2.0), w, bias: bias.then_some(b), dy: random(3, 1.0), dx: random(4, 1.0), slack: 1e-6 }
    }

    /// As far as bf16 goes, which steps by 32 up there: mean x² − mean² in f32 would be off by 1e-4 of itself.
    fn far(self, distance: f32) -> Case {
        let x = self.x.iter().map(|x| half::bf16::from_f32(20.0 * x + distance).to_f32()).collect();
        Case { x, slack: 2e-5, ..self }
    }

    fn take(&self, rows: &[usize]) -> Case {
        let take = |values| rows_of(values, self.w.len(), rows);
        Case { x: take(&self.x), dy: take(&self.dy), dx: take(&self.dx), ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let rows = self.x.len() / self.w.len();
        let (mut y, mut mean, mut rstd, mut dx) = (nans(self.x.len()), nans(rows), nans(rows), self.dx.clone());
        naive::forward(&mut y, &mut mean, &mut rstd, &self.x, &self.w, self.bias.as_deref(), EPS);
        naive::backward(&mut dx, &self.dy, &self.x, &mean, &rstd, &self.w);
        Plain::from([("y", y), ("mean", mean), ("rstd", rstd), ("dx", dx)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let cols = self.w.len();
        let [x, w, dy] = &[&self.x, &self.w, &self.dy].map(|values| act(ops, cols, values));
        let (bias, mut dx) = (&self.bias.as_ref().map(|bias| act(ops, cols, bias)), act(ops, cols, &self.dx));
        let (mut y, mut mean, mut rstd) =
            (unwritten(ops, x.rows(), cols), unwritten(ops, x.rows(), 1), unwritten(ops, x.rows(), 1));
        ops.layer_norm_forward(LayerNormForward {
            y: &mut y,
            mean: &mut mean,
            rstd: &mut rstd,
            x,
            w,
            bias: bias.as_ref(),
            eps: EPS,
        })
        .unwrap();
        ops.layer_norm_backward(LayerNormBackward { dx: &mut dx, dy, x, mean: &mean, rstd: &rstd, w }).unwrap();
        let mut out = Outputs::default();
        out.act(ops, "y", y, 1.0, self.slack);
        out.f32(ops, "mean", mean, 1e-6, 1e-6);
        out.f32(ops, "rstd", rstd, 2e-6, 0.0);
        out.act(ops, "dx", dx, 1.0, 1e-5);
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [(1, 8), (7, 37), (9, 128), (33, 300)];
    let near = shapes.into_iter().flat_map(|(rows, cols)| [false, true].map(|bias| Case::new(rows, cols, bias)));
    let far = [(3, 128, true, 4096.0), (5, 300, false, -4096.0)];
    near.chain(far.into_iter().map(|(rows, cols, bias, distance)| Case::new(rows, cols, bias).far(distance)))
}

#[test]
fn gradient() {
    let case = Case::new(3, 37, true);
    assert_slope(&case, ("y", &case.dy), ("dx", &case.dx), |case| &mut case.x);
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("layer_norm", &case, if case.slack > 1e-6 { 1e-4 } else { 1e-5 }, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("layer_norm", &device, &case));
}

#[test]
fn invariance() {
    for cols in [37, 128] {
        let case = Case::new(ROWS, cols, true);
        assert_alone("layer_norm", &|rows: &[usize]| case.take(rows));
    }
}
