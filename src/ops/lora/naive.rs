//! A product with its adapter in plain loops.

use crate::ops::product::naive as product;
use product::dot;

/// The masters; `b` is not yet scaled.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    /// Output features of each part.
    pub parts: &'a [usize],
    pub rank: usize,
    pub scale: f32,
    pub a: &'a [f32], // (P·r, K)
    pub b: &'a [f32], // (N, r)
}

impl Adapter<'_> {
    /// The columns of xa that output `j` reads: those of its part.
    fn columns(&self, j: usize) -> std::ops::Range<usize> {
        let ends = self.parts.iter().scan(0, |end, part| {
            *end += part;
            Some(*end)
        });
        let part = ends.take_while(|end| *end <= j).count();
        part * self.rank..(part + 1) * self.rank
    }

    fn width(&self) -> usize {
        self.parts.len() * self.rank
    }
}

/// What a product reads in both directions.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    pub w: &'a [f32],            // (N, K)
    pub k: usize,                // K
    pub bias: Option<&'a [f32]>, // (N)
    pub lora: Option<Adapter<'a>>,
}

/// Overwrites `y` (T, N) and, with an adapter, `xa` (T, P·r); adds `residual` (T, N).
pub fn forward(y: &mut [f32], xa: &mut [f32], x: &[f32], weights: Weights, residual: Option<&[f32]>) {
    let Weights { w, k, bias, lora } = weights;
    let n = w.len() / k;
    product::forward(y, x, w, k);
    if let Some(lora) = lora {
        product::forward(xa, x, lora.a, k);
        for (y, xa) in y.chunks_mut(n).zip(xa.chunks(lora.width())) {
            for j in 0..n {
                y[j] += lora.scale * dot(&xa[lora.columns(j)], &lora.b[j * lora.rank..][..lora.rank]);
            }
        }
    }
    for i in 0..y.len() {
        y[i] += residual.map_or(0.0, |residual| residual[i]) + bias.map_or(0.0, |bias| bias[i % n]);
    }
}

/// Overwrites `dx` (T, K) and, with an adapter, `dxa` (T, P·r); adds to `da` and `db`.
pub fn backward(
    dx: &mut [f32],
    (da, db): (&mut [f32], &mut [f32]),
    dxa: &mut [f32],
    dy: &[f32],
    x: &[f32],
    xa: &[f32],
    weights: Weights,
) {
    let Weights { w, k, lora, .. } = weights;
    product::backward(dx, dy, w, k);
    let Some(lora) = lora else { return };
    let (n, width, s) = (w.len() / k, lora.width(), lora.scale);
    dxa.fill(0.0);
    for t in 0..x.len() / k {
        for j in 0..n {
            for (i, p) in lora.columns(j).enumerate() {
                dxa[t * width + p] += s * dy[t * n + j] * lora.b[j * lora.rank + i];
                db[j * lora.rank + i] += s * dy[t * n + j] * xa[t * width + p];
            }
        }
        for p in 0..width {
            for i in 0..k {
                dx[t * k + i] += dxa[t * width + p] * lora.a[p * k + i];
                da[p * k + i] += dxa[t * width + p] * x[t * k + i];
            }
        }
    }
}
