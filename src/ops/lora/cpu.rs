use std::ops::Range;

use rayon::prelude::*;

use super::{Linear, LinearBackward, LinearForward, LinearGradients, LinearWeights, Lora, check, check_gradients};
use crate::backend::cpu::{CpuMatrix, Packed};
use crate::backend::{Cpu, Matrix, Tensor};
use crate::error::Result;
use crate::ops::expect;
use crate::ops::product::{View, ViewMut, add_scaled, add_transposed, product, rows_at_once};

impl Linear for Cpu {
    fn linear_forward(&self, operands: LinearForward<Self>, residual: Option<&Tensor<Self>>) -> Result<()> {
        let rows = operands.y.rows();
        let blocks = rows.div_ceil(at_once(operands.weights.w, rows));
        forward_by_blocks(self, operands, residual, vec![(); blocks], |_, _, ()| {})
    }

    fn linear_backward(&self, operands: LinearBackward<Self>, dy: &Tensor<Self>) -> Result<()> {
        check(dy, operands.dxa, operands.dx.as_deref(), &operands.weights)?;
        let (rows, cols) = dy.shape();
        let blocks = dy.buffer[..rows * cols].chunks(at_once(operands.weights.w, rows) * cols).collect();
        backward_by_blocks(self, operands, rows, blocks, |_, dy| dy);
        Ok(())
    }

    fn linear_gradients(&self, operands: LinearGradients<Self>, dy: &Tensor<Self>) -> Result<()> {
        check_gradients(&operands, dy)?;
        let LinearGradients { grad, dxa, x, xa, lora } = operands;
        let (t, n, k) = (x.rows(), dy.cols(), x.cols());
        let (width, rank) = (lora.width(), lora.rank);
        let (inner, input) = (View::new(&dxa.buffer, t, width, width), View::new(&x.buffer, t, k, k));
        add_transposed(ViewMut::new(&mut grad.da.buffer, width, k, k), inner, input, 1.0, false);
        let mut first = 0;
        for (p, &part) in lora.parts.iter().enumerate() {
            let db = ViewMut::new(&mut grad.db.buffer[first * rank..], part, rank, rank);
            let dy = View::new(&dy.buffer[first..], t, part, n);
            add_transposed(db, View::new(&xa.buffer[p * rank..], t, rank, width), dy, lora.scale, true);
            first += part;
        }
        Ok(())
    }
}

/// Rows of a block: of few rows each thread's share, but where a weight must be widened first, which costs as much as some rows.
pub(in crate::ops) fn at_once(w: &CpuMatrix, rows: usize) -> usize {
    let (w, share) = (w.forward(), rows.max(1).div_ceil(rayon::current_num_threads()).next_multiple_of(8));
    if w.is_widened() { rows_at_once(w) } else { rows_at_once(w).min(share) }
}

/// Cuts `values` (rows, cols) into blocks of rows; cols may be 0.
pub(in crate::ops) fn blocks(values: &mut [f32], (rows, cols): (usize, usize), at_once: usize) -> Vec<&mut [f32]> {
    let mut rest = &mut values[..rows * cols];
    let cut = |first| rest.split_off_mut(..at_once.min(rows - first) * cols).unwrap_or_default();
    (0..rows).step_by(at_once).map(cut).collect()
}

/// Forward, a block of rows after the other, so that each lies in a cache until it is done: `then` is given the block's first row, its
/// y, and its own one of `with`.
pub(in crate::ops) fn forward_by_blocks<T: Send>(
    cpu: &Cpu,
    operands: LinearForward<Cpu>,
    residual: Option<&Tensor<Cpu>>,
    with: Vec<T>,
    then: impl Fn(usize, &mut [f32], T) + Sync,
) -> Result<()> {
    let LinearForward { y, xa, x, weights } = operands;
    check(y, xa, Some(x), &weights)?;
    if let Some(residual) = residual {
        expect("linear", "residual", residual.shape(), y.shape())?;
    }
    let LinearWeights { w, bias, lora } = weights;
    let (shape, k, n) = (y.shape(), w.cols(), w.rows());
    let inner = lora.map(|lora| Inner::forward(lora, k));
    let width = inner.as_ref().map_or(0, Inner::width);
    let at_once = at_once(w, shape.0);
    assert_eq!(with.len(), shape.0.div_ceil(at_once));
    let ys = blocks(&mut y.buffer, shape, at_once).into_par_iter();
    let blocks = ys.zip(blocks(&mut xa.buffer, (shape.0, width), at_once)).zip(with).enumerate();
    blocks.for_each(|(index, ((y, xa), with))| {
        let (first, rows) = (index * at_once, y.len() / n);
        let accumulate = begin(y, n, bias, residual.map(|residual| &residual.buffer[first * n..]));
        let x = View::new(&x.buffer[first * k..], rows, k, k);
        product(ViewMut::new(y, rows, n, n), x, w.forward(), accumulate);
        if let Some(inner) = &inner {
            product(ViewMut::new(xa, rows, width, width), x, &inner.a, false);
            cpu.store(xa);
            for (p, (part, b)) in inner.parts.iter().enumerate() {
                let xa = View::new(&xa[p * inner.rank..], rows, inner.rank, width);
                product(ViewMut::new(&mut y[part.start..], rows, part.len(), n), xa, b, true);
            }
        }
        cpu.store(y);
        then(first, y, with);
    });
    Ok(())
}

/// Backward likewise, of operands that were checked: `before` is given a block's first row and its own one of `dys`, of which it makes
/// the block's dy.
pub(in crate::ops) fn backward_by_blocks<'a, T: Send>(
    cpu: &Cpu,
    operands: LinearBackward<Cpu>,
    rows: usize,
    dys: Vec<T>,
    before: impl Fn(usize, T) -> &'a [f32] + Sync,
) {
    let LinearBackward { dx, dxa, weights: LinearWeights { w, lora, .. } } = operands;
    let (k, n) = (w.cols(), w.rows());
    let inner = lora.map(|lora| Inner::backward(lora, k));
    let width = inner.as_ref().map_or(0, Inner::width);
    let (dx, cols) = dx.map_or((&mut [][..], 0), |dx| (&mut dx.buffer[..], k));
    let at_once = at_once(w, rows);
    assert_eq!(dys.len(), rows.div_ceil(at_once));
    let dxs = blocks(dx, (rows, cols), at_once).into_par_iter();
    let blocks = dxs.zip(blocks(&mut dxa.buffer, (rows, width), at_once)).zip(dys).enumerate();
    blocks.for_each(|(index, ((dx, dxa), dy))| {
        let dy = before(index * at_once, dy);
        let rows = dy.len() / n;
        let upper = View::new(dy, rows, n, n);
        if !dx.is_empty() {
            product(ViewMut::new(dx, rows, k, k), upper, w.backward(), false);
        }
        let Some(inner) = &inner else { return cpu.store(dx) };
        for (p, (part, b)) in inner.parts.iter().enumerate() {
            let dy = View::new(&dy[part.start..], rows, part.len(), n);
            product(ViewMut::new(&mut dxa[p * inner.rank..], rows, inner.rank, width), dy, b, false);
        }
        cpu.store(dxa);
        if !dx.is_empty() {
            product(ViewMut::new(dx, rows, k, k), View::new(dxa, rows, width, width), &inner.a, true);
        }
        cpu.store(dx);
    });
}

/// An adapter as the products of one direction read it: A, and each part's columns of y with its B.
struct Inner {
    rank: usize,
    a: Packed,
    parts: Vec<(Range<usize>, Packed)>,
}

impl Inner {
    /// Aᵀ (K, P·r) and Bᵀ (r, part).
    fn forward(lora: &Lora<Cpu>, k: usize) -> Inner {
        Inner::new(lora, View::new(&lora.a.buffer, lora.width(), k, k).t(), |b| b.t())
    }

    /// A (P·r, K) and B (part, r).
    fn backward(lora: &Lora<Cpu>, k: usize) -> Inner {
        Inner::new(lora, View::new(&lora.a.buffer, lora.width(), k, k), |b| b)
    }

    fn new(lora: &Lora<Cpu>, a: View, turn: fn(View) -> View) -> Inner {
        let mut end = 0;
        let part = |&part: &usize| {
            let first = end;
            end += part;
            (first..end, turn(View::new(&lora.b.buffer[first * lora.rank..], part, lora.rank, lora.rank)).packed())
        };
        Inner { rank: lora.rank, a: a.packed(), parts: lora.parts.iter().map(part).collect() }
    }

    fn width(&self) -> usize {
        self.parts.len() * self.rank
    }
}

/// Overwrites rows of y with what a product is added to; false where there is no such thing, and they stay as they were.
fn begin(y: &mut [f32], cols: usize, bias: Option<&Tensor<Cpu>>, residual: Option<&[f32]>) -> bool {
    if let Some(residual) = residual {
        y.copy_from_slice(&residual[..y.len()]);
    }
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(cols) {
            match residual {
                Some(_) => add_scaled(row, &bias.buffer, 1.0),
                None => row.copy_from_slice(&bias.buffer[..cols]),
            }
        }
    }
    bias.is_some() || residual.is_some()
}
