//! Products with and without LoRA, bias and residual: one to three parts, every remainder of eight, odd numbers of rows.

use ares::ops::Ops;
use ares::ops::lora::naive;

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    product: Product,
    residual: Option<Vec<f32>>,
    dy: Vec<f32>,
    n: usize,
}

impl Case {
    fn new(rows: usize, k: usize, parts: &[usize], rank: usize) -> Case {
        let (n, bias) = (parts.iter().sum::<usize>(), (rank > 0).then_some(2.0));
        let (residual, dy) = (Some(random(4, rows * n, 3.0)), random(5, rows * n, 1.0));
        Case { product: Product::new((rows, k), parts, rank, 0.2, bias), residual, dy, n }
    }

    /// y and xa.
    fn forward(&self) -> [Vec<f32>; 2] {
        let [mut y, mut xa] = [nans(self.dy.len()), nans(self.product.rows() * self.product.width())];
        naive::forward(&mut y, &mut xa, &self.product.x, self.product.weights(), self.residual.as_deref());
        [y, xa]
    }

    fn take(&self, rows: &[usize]) -> Case {
        let residual = self.residual.as_ref().map(|residual| rows_of(residual, self.n, rows));
        Case { product: self.product.take(rows), residual, dy: rows_of(&self.dy, self.n, rows), n: self.n }
    }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let ([y, xa], product) = (self.forward(), &self.product);
        let gradients = product.gradients(|(dx, dab, dxa)| {
            naive::backward(dx, dab, dxa, &self.dy, &product.x, &xa, product.weights());
        });
        let all = [("y", y), ("xa", xa)].into_iter().chain(gradients);
        all.filter(|(_, values)| !values.is_empty()).collect()
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let ([_, xa], dy) = (self.forward(), act(ops, self.n, &self.dy));
        let residual = self.residual.as_ref().map(|residual| act(ops, self.n, residual));
        let mut product = self.product.on(ops, &xa);
        ops.linear_forward(product.forward(), residual.as_ref()).unwrap();
        ops.linear_backward(product.backward(), &dy).unwrap();
        product.gradients(ops, &dy);
        let mut out = Outputs::default();
        let (y, flips) = product.outputs(ops, &mut out, [1e-5, 2e-6, 2e-6], [(1e-5, 2e-2), (1e-5, 1e-4)]);
        out.each(ops, "y", y, 1.0, flips.into_iter().map(|flips| flips + 1e-5).collect());
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
    shapes.into_iter().flat_map(|(t, k, parts, rank)| {
        let case = Case::new(t, k, parts, rank);
        [Case::new(t, k, parts, 0), Case { residual: None, ..case.clone() }, case]
    })
}

#[test]
fn gradient() {
    for rank in [0, 2] {
        let case = Case::new(5, 11, &[6, 3], rank);
        assert_product_slopes(&case, ("y", &case.dy), |case| &mut case.product);
    }
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("lora", &case, 1e-5, 0.0));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    cases().for_each(|case| assert_parity("lora", &device, &case));
}

/// As deep as the largest model's, and more tiles than a card's multiprocessors take at once, in the order of a real raster.
#[test]
fn parity_at_the_sizes_of_real_models() {
    let Some(device) = device() else { return };
    for (t, k, parts, rank) in [(9, 8960, &[24][..], 16), (3000, 24, &[700, 100, 100], 4)] {
        assert_parity("lora", &device, &Case::new(t, k, parts, rank));
    }
}

/// The CPU's products on every kind of edge: of vectors, of panels, of the part of k that stays in registers.
#[test]
fn tiles_of_the_cpu() {
    let edges = [(5, 7), (96, 1030), (352, 24), (2, 8), (40, 1), (1300, 48), (1300, 112), (512, 49), (513, 95)];
    for (k, n) in edges {
        let case = Case::new(ROWS, k, &[n], 0);
        assert_naive(&format!("{n} x {k}"), &case, 1e-5, 0.0);
        assert_alone_on_cpu(&format!("{n} x {k}"), &|rows: &[usize]| case.take(rows));
    }
}

#[test]
fn invariance() {
    for (k, n, rank) in [(19, 23, 3), (72, 136, 8), (352, 128, 8), (1030, 7, 4)] {
        let case = Case::new(ROWS, k, &[n], rank);
        assert_alone("lora", &|rows: &[usize]| case.take(rows));
    }
}
