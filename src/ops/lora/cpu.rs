use super::{Linear, LinearBackward, LinearForward, LinearWeights, Lora, LoraGrad, check, check_backward};
use crate::backend::{Backend, Cpu, Matrix, Tensor};
use crate::error::Result;
use crate::ops::expect;
use crate::ops::product::{View, ViewMut, add_scaled, add_transposed, product};

impl Linear for Cpu {
    fn linear_forward(&self, operands: LinearForward<Self>, residual: Option<&Tensor<Self>>) -> Result<()> {
        let LinearForward { y, xa, x, weights } = operands;
        check(y, xa, x, &weights)?;
        let LinearWeights { w, bias, lora } = weights;
        let accumulate = begin(self, y, bias, residual)?;
        let (t, n, k) = (x.rows(), w.rows(), w.cols());
        let input = View::new(&x.buffer, t, k, k);
        product(ViewMut::new(&mut y.buffer, t, n, n), input, w.forward(), accumulate);
        if let Some(lora) = lora {
            let (width, rank) = (lora.width(), lora.rank);
            let a = View::new(&lora.a.buffer, width, k, k).t().packed();
            product(ViewMut::new(&mut xa.buffer, t, width, width), input, &a, false);
            self.store(&mut xa.buffer[..t * width]);
            let mut first = 0;
            for (p, &part) in lora.parts.iter().enumerate() {
                let b = View::new(&lora.b.buffer[first * rank..], part, rank, rank);
                let xa = View::new(&xa.buffer[p * rank..], t, rank, width);
                product(ViewMut::new(&mut y.buffer[first..], t, part, n), xa, &b.t().packed(), true);
                first += part;
            }
        }
        self.store(&mut y.buffer[..t * n]);
        Ok(())
    }

    fn linear_backward(&self, operands: LinearBackward<Self>, dy: &Tensor<Self>) -> Result<()> {
        check_backward(&operands, dy)?;
        let LinearBackward { mut dx, grad, dxa, x, xa, weights: LinearWeights { w, lora, .. } } = operands;
        let (t, n, k) = (x.rows(), w.rows(), w.cols());
        let upper = View::new(&dy.buffer, t, n, n);
        if let Some(dx) = &mut dx {
            product(ViewMut::new(&mut dx.buffer, t, k, k), upper, w.backward(), false);
        }
        if let Some(lora) = lora {
            let (width, rank) = (lora.width(), lora.rank);
            let mut first = 0;
            for (p, &part) in lora.parts.iter().enumerate() {
                let b = View::new(&lora.b.buffer[first * rank..], part, rank, rank);
                let dy = View::new(&dy.buffer[first..], t, part, n);
                product(ViewMut::new(&mut dxa.buffer[p * rank..], t, rank, width), dy, &b.packed(), false);
                first += part;
            }
            self.store(&mut dxa.buffer[..t * width]);
            if let Some(dx) = &mut dx {
                let inner = View::new(&dxa.buffer, t, width, width);
                let a = View::new(&lora.a.buffer, width, k, k).packed();
                product(ViewMut::new(&mut dx.buffer, t, k, k), inner, &a, true);
            }
            if let Some(grad) = grad {
                gradients(grad, dxa, dy, x, xa, lora);
            }
        }
        if let Some(dx) = dx {
            self.store(&mut dx.buffer[..t * k]);
        }
        Ok(())
    }
}

/// Overwrites `y` with what a product is added to; false where there is no such thing, and `y` stays as it was.
fn begin(cpu: &Cpu, y: &mut Tensor<Cpu>, bias: Option<&Tensor<Cpu>>, residual: Option<&Tensor<Cpu>>) -> Result<bool> {
    let (rows, cols) = y.shape();
    if let Some(residual) = residual {
        expect("linear", "residual", residual.shape(), (rows, cols))?;
        cpu.copy(&mut y.buffer, 0, &residual.buffer, 0, rows * cols)?;
    }
    if let Some(bias) = bias {
        for row in y.buffer.chunks_exact_mut(cols).take(rows) {
            match residual {
                Some(_) => add_scaled(row, &bias.buffer, 1.0),
                None => row.copy_from_slice(&bias.buffer[..cols]),
            }
        }
    }
    Ok(bias.is_some() || residual.is_some())
}

/// dA += dxaᵀ·x, dB_p += s·dY_pᵀ·xa_p.
fn gradients(
    grad: &mut LoraGrad<Cpu>,
    dxa: &Tensor<Cpu>,
    dy: &Tensor<Cpu>,
    x: &Tensor<Cpu>,
    xa: &Tensor<Cpu>,
    lora: &Lora<Cpu>,
) {
    let (t, n, k) = (x.rows(), dy.cols(), x.cols());
    let (width, rank) = (lora.width(), lora.rank);
    let inner = View::new(&dxa.buffer, t, width, width);
    add_transposed(ViewMut::new(&mut grad.da.buffer, width, k, k), inner, View::new(&x.buffer, t, k, k), 1.0, false);
    let mut first = 0;
    for (p, &part) in lora.parts.iter().enumerate() {
        let db = ViewMut::new(&mut grad.db.buffer[first * rank..], part, rank, rank);
        let dy = View::new(&dy.buffer[first..], t, part, n);
        add_transposed(db, View::new(&xa.buffer[p * rank..], t, rank, width), dy, lora.scale, true);
        first += part;
    }
}
