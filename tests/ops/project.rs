//! Products with and without LoRA, through the projection: one to three parts, every remainder of eight, odd numbers of rows.

use ares::ops::Ops;
use ares::ops::project::naive;

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    k: usize,
    x: Vec<f32>,
    residual: Vec<f32>,
    w: Vec<f32>,
    /// Of one adapter part or more, with a bias; or neither.
    adapter: Option<(Masters, Vec<f32>)>,
    dy: Vec<f32>,
}

impl Case {
    fn new(t: usize, k: usize, parts: &[usize], rank: usize, adapted: bool) -> Case {
        let n = parts.iter().sum::<usize>();
        let adapter = adapted.then(|| (Masters::new(4, parts, k, rank), random(9, n, 2.0)));
        let (x, residual, dy) = (random(1, t * k, 1.0), random(2, t * n, 3.0), random(3, t * n, 1.0));
        Case { k, x, residual, w: random(8, n * k, 0.2), adapter, dy }
    }

    fn n(&self) -> usize {
        self.w.len() / self.k
    }

    fn masters(&self) -> Option<&Masters> {
        self.adapter.as_ref().map(|(masters, _)| masters)
    }

    fn width(&self) -> usize {
        self.masters().map_or(0, Masters::width)
    }

    /// y and xa.
    fn forward(&self) -> [Vec<f32>; 2] {
        let [mut y, mut xa] = [nans(self.dy.len()), nans(self.x.len() / self.k * self.width())];
        let (bias, adapter) = (self.adapter.as_ref().map(|(_, bias)| &bias[..]), self.masters().map(Masters::naive));
        naive::forward(&mut y, &mut xa, &self.x, &self.residual, &self.w, bias, adapter, self.k);
        [y, xa]
    }

    fn take(&self, rows: &[usize]) -> Case {
        let (x, residual) = (rows_of(&self.x, self.k, rows), rows_of(&self.residual, self.n(), rows));
        Case { x, residual, dy: rows_of(&self.dy, self.n(), rows), ..self.clone() }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let [y, xa] = self.forward();
        let (mut dx, mut dxa) = (nans(self.x.len()), nans(xa.len()));
        let (mut da, mut db) = self.masters().map_or_else(Default::default, |m| (m.da.clone(), m.db.clone()));
        let adapter = self.masters().map(Masters::naive);
        naive::backward(&mut dx, &mut da, &mut db, &mut dxa, &self.dy, &self.x, &xa, &self.w, adapter, self.k);
        let mut plain = Plain::from([("y", y), ("dx", dx)]);
        if adapter.is_some() {
            plain.extend([("xa", xa), ("dxa", dxa), ("dA", da), ("dB", db)]);
        }
        plain
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (k, n, width, [_, saved]) = (self.k, self.n(), self.width(), self.forward());
        let (x, residual, dy) = (act(ops, k, &self.x), act(ops, n, &self.residual), act(ops, n, &self.dy));
        let (t, w) = (x.rows(), ops.weight(n, k, self.w.clone()).unwrap());
        let (lora, bias) =
            (self.masters().map(|m| m.lora(ops)), self.adapter.as_ref().map(|(_, bias)| act(ops, n, bias)));
        let mut grad = self.masters().map(|m| m.grad(ops));
        let (mut y, mut xa) = (unwritten(ops, t, n), unwritten(ops, t, width));
        let (mut dx, mut dxa) = (unwritten(ops, t, k), unwritten(ops, t, width));
        ops.project_forward(&mut y, &mut xa, &x, &residual, &w, bias.as_ref(), lora.as_ref()).unwrap();
        let saved = if width > 0 { act(ops, width, &saved) } else { unwritten(ops, t, 0) };
        ops.project_backward(&mut dx, grad.as_mut(), &mut dxa, &dy, &x, &saved, &w, lora.as_ref()).unwrap();
        let mut out = Outputs::default();
        // xa and dxa may round the other way where a sum lies between two bf16: an ulp of one term.
        out.act(ops, "y", y, 1.0, if width > 0 { 4e-3 } else { 1e-5 });
        out.act(ops, "dx", dx, 1.0, if width > 0 { 8e-3 } else { 1e-5 });
        if let Some(grad) = grad {
            out.act(ops, "xa", xa, 1.0, 2e-6);
            out.act(ops, "dxa", dxa, 1.0, 2e-6);
            out.f32(ops, "dA", grad.da, 1e-5, 2e-2).sum();
            out.f32(ops, "dB", grad.db, 1e-5, 1e-4).sum();
        }
        out
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes: [(usize, usize, &[usize], usize); 6] = [
        (1, 24, &[8], 4),
        (7, 40, &[24, 8, 8], 8),
        (64, 200, &[300], 16),
        (67, 100, &[33, 17, 9], 5),
        (130, 72, &[136, 128], 16),
        (300, 64, &[70, 50], 40),
    ];
    let both = |(t, k, parts, rank)| [false, true].map(|adapted| Case::new(t, k, parts, rank, adapted));
    shapes.into_iter().flat_map(both)
}

#[test]
fn gradient() {
    let case = Case::new(5, 11, &[6, 3], 2, true);
    let (dy, masters) = (("y", &case.dy[..]), case.masters().unwrap());
    assert_slope(&case, dy, ("dx", &[]), |case| &mut case.x);
    assert_slope(&case, dy, ("dA", &masters.da), |case| &mut case.adapter.as_mut().unwrap().0.a);
    assert_slope(&case, dy, ("dB", &masters.db), |case| &mut case.adapter.as_mut().unwrap().0.b);
    let case = Case::new(5, 11, &[9], 0, false);
    assert_slope(&case, ("y", &case.dy), ("dx", &[]), |case| &mut case.x);
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("project", &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("project", &device, &case));
}

/// The CPU's products on every kind of edge: of vectors, of panels, of the part of k that stays in registers.
#[test]
fn tiles_of_the_cpu() {
    let edges = [(5, 7), (96, 1030), (352, 24), (2, 8), (40, 1), (1300, 48), (1300, 112), (512, 49), (513, 95)];
    for (k, n) in edges {
        let case = Case::new(ROWS, k, &[n], 0, false);
        assert_naive(&format!("{n} x {k}"), &case, 1e-5, 0.0);
        assert_alone_on_cpu(&format!("{n} x {k}"), &|rows: &[usize]| case.take(rows));
    }
}

#[test]
fn invariance() {
    for (k, n, rank) in [(19, 23, 3), (72, 136, 8), (352, 128, 8), (1030, 7, 4)] {
        let case = Case::new(ROWS, k, &[n], rank, true);
        assert_alone("project", &|rows: &[usize]| case.take(rows));
    }
}
