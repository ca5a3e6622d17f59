//! Operands of the plain loops and of backends. Outputs hold NaN before, accumulators noise; past the rows in use every
//! tensor has spare ones of NaN, so that an operation that reads or writes past the end is found out.

use std::ops::Range;

use ares::backend::{Backend, Element, Indices, Tensor};
use ares::ops::lora::naive::{Adapter, Weights};
use ares::ops::{LinearBackward, LinearForward, LinearGradients, LinearWeights, Lora, LoraGrad, Ops, Packing, Segment};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Outputs, ulp};

/// `len` bell-shaped numbers of the given scale, as bf16 holds them.
pub fn random(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one = || (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * scale * 0.87;
    (0..len).map(|_| bf16::from_f32(one()).to_f32()).collect()
}

/// `len` numbers in (-1, 1).
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Rows past those in use.
const SPARE: usize = 3;

/// An output that nobody has written yet.
pub fn unwritten<B: Backend, T: Element>(ops: &B, rows: usize, cols: usize) -> Tensor<B, T> {
    let nan = vec![bytemuck::pod_read_unaligned::<T>(&[0xff; 4][..size_of::<T>()]); (rows + SPARE) * cols];
    let mut tensor = Tensor::from_host(ops, rows + SPARE, cols, &nan).unwrap();
    tensor.set_rows(rows).unwrap();
    tensor
}

/// `values` as activations, in rows of `cols`.
pub fn act<B: Backend>(ops: &B, cols: usize, values: &[f32]) -> Tensor<B> {
    let mut tensor = unwritten(ops, values.len() / cols.max(1), cols);
    tensor.write(ops, &ops.activations(values)).unwrap();
    tensor
}

/// `values` as they are.
pub fn numbers<B: Backend>(ops: &B, cols: usize, values: &[f32]) -> Tensor<B, f32> {
    let mut tensor = unwritten(ops, values.len() / cols, cols);
    tensor.write(ops, values).unwrap();
    tensor
}

/// Ids that index memory, under the least bound that holds.
pub fn indices<B: Backend>(ops: &B, ids: &[u32]) -> Indices<B> {
    Indices::from_host(ops, ids, ids.iter().max().map_or(0, |&id| id as usize + 1)).unwrap()
}

/// All that is in use, as f32. The spare rows must be unwritten, and the columns that pad a row zero: whoever reads it in whole
/// chunks relies on them.
pub fn read<B: Backend, T: Element + Into<f32>>(ops: &B, mut tensor: Tensor<B, T>) -> Vec<f32> {
    let ((rows, cols), stride) = (tensor.shape(), tensor.stride());
    tensor.set_rows(rows + SPARE).unwrap();
    let mut all = vec![T::default(); (rows + SPARE) * stride];
    ops.download(&mut all, tensor.buffer(), 0).unwrap();
    let mut values = Vec::with_capacity(rows * cols);
    for (row, all) in all.chunks_exact(stride.max(1)).enumerate() {
        let (used, padding) = all.split_at(cols);
        assert!(padding.iter().all(|v| *v == T::default()), "row {row} ends in {padding:?}");
        assert!(row < rows || used.iter().all(|&v| v.into().is_nan()), "row {row} past the {rows} in use was written");
        values.extend(used.iter().take(if row < rows { cols } else { 0 }).map(|&v| v.into()));
    }
    values
}

/// The named rows of a matrix of `cols` columns.
pub fn rows_of(values: &[f32], cols: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|r| &values[r * cols..][..cols]).copied().collect()
}

/// An output of the plain loops that nobody has written yet.
pub fn nans(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

/// One product's adapter, and gradients that already hold something.
#[derive(Clone)]
pub struct Masters {
    pub parts: Vec<usize>,
    pub rank: usize,
    pub a: Vec<f32>,  // (P·r, K)
    pub b: Vec<f32>,  // (N, r)
    pub da: Vec<f32>, // (P·r, K)
    pub db: Vec<f32>, // (N, r)
}

impl Masters {
    const SCALE: f32 = 2.0;

    fn new(parts: &[usize], k: usize, rank: usize) -> Masters {
        let (width, n) = (parts.len() * rank, parts.iter().sum::<usize>());
        let [a, da] = [(6, 0.3), (106, 1.0)].map(|(seed, scale)| random(seed, width * k, scale));
        let [b, db] = [(7, 0.3), (107, 1.0)].map(|(seed, scale)| random(seed, n * rank, scale));
        Masters { parts: parts.to_vec(), rank, a, b, da, db }
    }

    fn width(&self) -> usize {
        self.parts.len() * self.rank
    }

    fn naive(&self) -> Adapter<'_> {
        Adapter { parts: &self.parts, rank: self.rank, scale: Self::SCALE, a: &self.a, b: &self.b }
    }

    /// What a product reads.
    fn lora<B: Backend>(&self, ops: &B) -> Lora<B> {
        let b: Vec<f32> = self.b.iter().map(|b| b * Self::SCALE).collect();
        let (a, b) = (act(ops, self.a.len() / self.width(), &self.a), act(ops, self.rank, &b));
        Lora { parts: self.parts.clone(), rank: self.rank, scale: Self::SCALE, a, b }
    }

    /// What y (T, N) may differ by where xa (T, P·r) lies between two bf16 and rounds the other way: an ulp of each term.
    fn flips_of_y(&self, xa: &[f32]) -> Vec<f32> {
        let part_of = self.parts.iter().enumerate().flat_map(|(part, n)| std::iter::repeat_n(part, *n));
        let columns: Vec<(usize, &[f32])> = part_of.zip(self.b.chunks_exact(self.rank)).collect();
        let of_row = |xa: &[f32]| {
            let of_column = |(part, b): &(usize, &[f32])| {
                let terms = b.iter().zip(&xa[part * self.rank..]).map(|(b, &xa)| (b * Self::SCALE).abs() * ulp(xa));
                terms.sum()
            };
            columns.iter().map(of_column).collect::<Vec<f32>>()
        };
        xa.chunks_exact(self.width()).flat_map(of_row).collect()
    }

    /// The same of dx (T, K) and dxa (T, P·r), and `more`.
    fn flips_of_dx(&self, dxa: &[f32], more: f32) -> Vec<f32> {
        let k = self.a.len() / self.width();
        let of_row = |dxa: &[f32]| {
            let mut sums = vec![more; k];
            for (a, &dxa) in self.a.chunks_exact(k).zip(dxa) {
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += a.abs() * ulp(dxa));
            }
            sums
        };
        dxa.chunks_exact(self.width()).flat_map(of_row).collect()
    }

    fn grad<B: Backend>(&self, ops: &B) -> LoraGrad<B> {
        LoraGrad { da: numbers(ops, self.a.len() / self.width(), &self.da), db: numbers(ops, self.rank, &self.db) }
    }
}

/// A product; qkv and gate_up begin with one.
#[derive(Clone)]
pub struct Product {
    pub k: usize,
    pub x: Vec<f32>,        // (T, K)
    w: Vec<f32>,            // (N, K)
    bias: Option<Vec<f32>>, // (N)
    pub masters: Option<Masters>,
}

/// The outputs of a product's backward in the plain loops: dx, dA and dB, dxa.
pub type Gradients<'a> = (&'a mut [f32], (&'a mut [f32], &'a mut [f32]), &'a mut [f32]);

impl Product {
    /// With an adapter unless `rank` is 0, and a bias of the given scale.
    pub fn new((rows, k): (usize, usize), parts: &[usize], rank: usize, scale: f32, bias: Option<f32>) -> Product {
        let n = parts.iter().sum::<usize>();
        let masters = (rank > 0).then(|| Masters::new(parts, k, rank));
        let (x, bias) = (random(1, rows * k, 1.0), bias.map(|scale| random(3, n, scale)));
        Product { k, x, w: random(2, n * k, scale), bias, masters }
    }

    pub fn rows(&self) -> usize {
        self.x.len() / self.k
    }

    /// Columns of xa.
    pub fn width(&self) -> usize {
        self.masters.as_ref().map_or(0, Masters::width)
    }

    pub fn weights(&self) -> Weights<'_> {
        let lora = self.masters.as_ref().map(Masters::naive);
        Weights { w: &self.w, k: self.k, bias: self.bias.as_deref(), lora }
    }

    /// What `backward` leaves in the plain loops.
    pub fn gradients(&self, backward: impl FnOnce(Gradients)) -> [(&'static str, Vec<f32>); 4] {
        let (mut dx, mut dxa) = (nans(self.x.len()), nans(self.rows() * self.width()));
        let (mut da, mut db) = self.masters.as_ref().map_or_else(Default::default, |m| (m.da.clone(), m.db.clone()));
        backward((&mut dx, (&mut da, &mut db), &mut dxa));
        [("dx", dx), ("dA", da), ("dB", db), ("dxa", dxa)]
    }

    pub fn take(&self, rows: &[usize]) -> Product {
        Product { x: rows_of(&self.x, self.k, rows), ..self.clone() }
    }

    /// `xa` is what the plain loops saved.
    pub fn on<B: Ops>(&self, ops: &B, xa: &[f32]) -> Operands<B> {
        let (n, output) = (self.w.len() / self.k, |cols| unwritten(ops, self.rows(), cols));
        Operands {
            x: act(ops, self.k, &self.x),
            w: ops.weight(n, self.k, self.w.clone()).unwrap(),
            bias: self.bias.as_ref().map(|bias| act(ops, n, bias)),
            lora: self.masters.as_ref().map(|m| m.lora(ops)),
            grad: self.masters.as_ref().map(|m| m.grad(ops)),
            masters: self.masters.clone(),
            y: output(n),
            xa: output(self.width()),
            saved: if xa.is_empty() { output(0) } else { act(ops, self.width(), xa) },
            dx: output(self.k),
            dxa: output(self.width()),
        }
    }
}

/// A product's operands on a backend.
pub struct Operands<B: Ops> {
    x: Tensor<B>,
    w: B::Weight,
    bias: Option<Tensor<B>>,
    lora: Option<Lora<B>>,
    grad: Option<LoraGrad<B>>,
    masters: Option<Masters>,
    pub y: Tensor<B>,
    xa: Tensor<B>,
    saved: Tensor<B>,
    dx: Tensor<B>,
    dxa: Tensor<B>,
}

impl<B: Ops> Operands<B> {
    pub fn forward(&mut self) -> LinearForward<'_, B> {
        let weights = LinearWeights { w: &self.w, bias: self.bias.as_ref(), lora: self.lora.as_ref() };
        LinearForward { y: &mut self.y, xa: &mut self.xa, x: &self.x, weights }
    }

    pub fn backward(&mut self) -> LinearBackward<'_, B> {
        let weights = LinearWeights { w: &self.w, bias: self.bias.as_ref(), lora: self.lora.as_ref() };
        LinearBackward { dx: Some(&mut self.dx), dxa: &mut self.dxa, weights }
    }

    /// After backward, where there is an adapter.
    pub fn gradients(&mut self, ops: &B, dy: &Tensor<B>) {
        let (Some(grad), Some(lora)) = (&mut self.grad, &self.lora) else { return };
        let (dxa, x, xa) = (&self.dxa, &self.x, &self.saved);
        ops.linear_gradients(LinearGradients { grad, dxa, x, xa, lora }, dy).unwrap();
    }

    /// All but y: dx, and what an adapter adds, each within its own. Returns y, and what it may differ by for xa's sake.
    pub fn outputs(
        self,
        ops: &B,
        out: &mut Outputs,
        [dx, xa, dxa]: [f32; 3],
        [da, db]: [(f32, f32); 2],
    ) -> (Tensor<B>, Vec<f32>) {
        let (Some(grad), Some(masters)) = (self.grad, self.masters) else {
            out.act(ops, "dx", self.dx, 1.0, dx);
            return (self.y, vec![0.0]);
        };
        out.act(ops, "xa", self.xa, 1.0, xa);
        out.act(ops, "dxa", self.dxa, 1.0, dxa);
        out.f32(ops, "dA", grad.da, da.0, da.1).sum();
        out.f32(ops, "dB", grad.db, db.0, db.1).sum();
        out.each(ops, "dx", self.dx, 1.0, masters.flips_of_dx(out.named("dxa"), dx));
        let flips = masters.flips_of_y(out.named("xa"));
        (self.y, flips)
    }
}

/// Lengths of a prompt segment and of the answer segments that follow it.
pub type Group<'a> = (usize, &'a [usize]);

/// A packed batch; positions run on from the prompt into each answer.
#[derive(Clone, Default)]
pub struct Pack {
    pub segments: Vec<Segment>,
    groups: Vec<Range<usize>>,
    positions: Vec<u32>,
}

impl Pack {
    pub fn new(groups: &[Group]) -> Pack {
        let mut pack = Pack::default();
        for (prompt, answers) in groups {
            let (first, at) = (pack.segments.len(), pack.rows());
            let (prompt, end) = (at..at + prompt, at + prompt + answers.iter().sum::<usize>());
            if !prompt.is_empty() {
                pack.push(prompt.clone(), at..at, end);
            }
            for answer in *answers {
                let at = pack.rows();
                pack.push(at..at + answer, prompt.clone(), at + answer);
            }
            pack.groups.push(first..pack.segments.len());
        }
        pack
    }

    fn push(&mut self, rows: Range<usize>, prompt: Range<usize>, seen_until: usize) {
        self.positions.extend((0..rows.len()).map(|row| (prompt.len() + row) as u32));
        self.segments.push(Segment { rows, prompt, seen_until });
    }

    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    pub fn on<B: Backend>(&self, ops: &B) -> Packing<B> {
        let mut packing = Packing::with_capacity(ops, self.rows()).unwrap();
        packing.set(ops, self.segments.clone(), self.groups.clone(), &self.positions).unwrap();
        packing
    }
}
