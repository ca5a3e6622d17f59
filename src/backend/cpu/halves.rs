//! Weights whose numbers are all bf16, in sixteen bits: one packing for both directions of a product, widened block by block into
//! the caches as it is read. Half of f32's memory for a model that is run, a quarter for one that is trained.

use rayon::prelude::*;

use super::packed::{PANEL, Packed};

/// Numbers from which on a matrix is worth it: what is smaller stays in the caches as it is, and would be widened for nothing.
const LEAST: usize = 1 << 18;

/// A matrix (K, N) in panels as [`Packed`] has them.
pub(crate) struct Halves {
    rows: usize,
    cols: usize,
    values: Vec<u16>,
}

impl Halves {
    /// Packs Wᵀ of `w` (N, K), whose numbers are given row by row; nothing where it is small, or where a number is none of bf16.
    pub(super) fn new(w: &[f32], (rows, cols): (usize, usize)) -> Option<Halves> {
        if w.len() < LEAST || w.par_iter().any(|x| x.to_bits() & 0xFFFF != 0) {
            return None;
        }
        Some(Halves::packed(w, (rows, cols)))
    }

    pub(crate) fn packed(w: &[f32], (rows, cols): (usize, usize)) -> Halves {
        let mut values = vec![0; rows * cols.next_multiple_of(PANEL)];
        values.par_chunks_exact_mut((rows * PANEL).max(1)).enumerate().for_each(|(panel, to)| {
            for (n, row) in w.chunks_exact(rows).skip(panel * PANEL).take(PANEL).enumerate() {
                to.iter_mut().skip(n).step_by(PANEL).zip(row).for_each(|(to, x)| *to = (x.to_bits() >> 16) as u16);
            }
        });
        Halves { rows, cols, values }
    }

    /// (K, N).
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn panel(&self, index: usize) -> &[u16] {
        &self.values[index * self.rows * PANEL..][..self.rows * PANEL]
    }

    /// Overwrites `out` (K) with column n.
    pub(super) fn read_column(&self, n: usize, out: &mut [f32]) {
        let column = self.panel(n / PANEL)[n % PANEL..].iter().step_by(PANEL);
        out.iter_mut().zip(column).for_each(|(out, half)| *out = wide(*half));
    }

    /// Rows `first..` of a panel, as many as `out` has.
    #[inline(always)]
    fn widen(&self, panel: usize, first: usize, out: &mut [f32]) {
        let from = &self.panel(panel)[first * PANEL..][..out.len()];
        out.iter_mut().zip(from).for_each(|(out, half)| *out = wide(*half));
    }

    /// The same of the transpose (N, K): its panel is `PANEL` rows here, its rows are columns here.
    #[inline(always)]
    fn widen_turned(&self, panel: usize, first: usize, out: &mut [f32]) {
        let (k, all) = (panel * PANEL, out.len() / PANEL);
        let count = PANEL.min(self.rows - k);
        let mut done = 0;
        while done < all {
            let n = (first + done) % PANEL;
            let taken = (PANEL - n).min(all - done);
            let block = &self.panel((first + done) / PANEL)[k * PANEL..][..count * PANEL];
            let turned = turned(block);
            for (row, out) in turned[n..].iter().zip(out[done * PANEL..][..taken * PANEL].chunks_exact_mut(PANEL)) {
                let row: &[u16; PANEL] = bytemuck::cast_ref(row);
                out.iter_mut().zip(row).for_each(|(out, half)| *out = wide(*half));
            }
            done += taken;
        }
    }
}

/// Four neighbours at a time.
type Quads = [u64; PANEL / 4];

/// Transposes a block of at most `PANEL` rows, `PANEL` numbers each; zeros stand for the rows that it lacks. Four rows at a time, as
/// words of four numbers that whole vectors of words exchange among each other: number by number this costs as much as ten
/// rows of the product.
#[inline(always)]
fn turned(block: &[u16]) -> [Quads; PANEL] {
    const ODD: u64 = 0xFFFF_0000_FFFF_0000;
    const HIGH: u64 = 0xFFFF_FFFF_0000_0000;
    let mut out = [[0; PANEL / 4]; PANEL];
    let rows = block.chunks_exact(PANEL).len();
    for quad in 0..rows.div_ceil(4) {
        let row = |i: usize| -> Quads {
            let at = (4 * quad + i) * PANEL;
            block
                .get(at..at + PANEL)
                .map_or([0; PANEL / 4], |row| bytemuck::pod_read_unaligned(bytemuck::cast_slice(row)))
        };
        let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
        let mut o = [[0; PANEL / 4]; 4];
        for j in 0..PANEL / 4 {
            let [even, odd] = [(a[j] & !ODD) | (b[j] << 16 & ODD), (a[j] >> 16 & !ODD) | (b[j] & ODD)];
            let [even2, odd2] = [(c[j] & !ODD) | (d[j] << 16 & ODD), (c[j] >> 16 & !ODD) | (d[j] & ODD)];
            o[0][j] = (even & !HIGH) | (even2 << 32);
            o[1][j] = (odd & !HIGH) | (odd2 << 32);
            o[2][j] = (even >> 32) | (even2 & HIGH);
            o[3][j] = (odd >> 32) | (odd2 & HIGH);
        }
        for (n, out) in out.iter_mut().enumerate() {
            out[quad] = o[n % 4][n / 4];
        }
    }
    out
}

#[inline(always)]
fn wide(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// The right operand of a product, as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    /// f32, read where it lies.
    Whole(&'a Packed),
    Halves(&'a Halves),
    /// The transpose of one.
    Turned(&'a Halves),
}

impl<'a> From<&'a Packed> for Right<'a> {
    fn from(packed: &'a Packed) -> Right<'a> {
        Right::Whole(packed)
    }
}

impl<'a> Right<'a> {
    /// (K, N).
    pub(crate) fn shape(self) -> (usize, usize) {
        match self {
            Right::Whole(packed) => packed.shape(),
            Right::Halves(halves) => halves.shape(),
            Right::Turned(halves) => (halves.cols, halves.rows),
        }
    }

    /// Whether blocks are written to `space` before they are read.
    pub(crate) fn is_widened(self) -> bool {
        !matches!(self, Right::Whole(_))
    }

    /// `count` × `PANEL` numbers of a panel, from row `first` on; those that must be widened are written to `space`.
    #[inline(always)]
    pub(crate) fn write_block(self, panel: usize, first: usize, space: &mut [f32]) {
        match self {
            Right::Whole(_) => {}
            Right::Halves(halves) => halves.widen(panel, first, space),
            Right::Turned(halves) => halves.widen_turned(panel, first, space),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_the_packed_ones() {
        for (n, k) in [(1, 1), (49, 5), (48, 48), (7, 50), (130, 97), (131, 700)] {
            let w: Vec<f32> = (0..n * k).map(|i| wide((i as u16).wrapping_mul(7))).collect();
            let halves = Halves::packed(&w, (k, n));
            let forward = Packed::new(&w, (k, n), (1, k));
            for (right, whole) in [(Right::Halves(&halves), &forward), (Right::Turned(&halves), &forward.transposed())]
            {
                assert_eq!(right.shape(), whole.shape());
                let (rows, cols) = right.shape();
                for panel in 0..cols.div_ceil(PANEL) {
                    for (first, count) in [(0, rows), (rows / 2, rows - rows / 2), (rows - 1, 1)] {
                        let mut space = vec![f32::NAN; count * PANEL];
                        right.write_block(panel, first, &mut space);
                        let expected = &whole.panel(panel)[first * PANEL..][..count * PANEL];
                        assert!(space.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{n} x {k}");
                    }
                }
            }
            let mut row = vec![f32::NAN; k];
            halves.read_column(n - 1, &mut row);
            assert!(row.iter().zip(&w[(n - 1) * k..]).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }

    #[test]
    fn what_sixteen_bits_do_not_hold_stays_whole() {
        let mut w = vec![1.5f32; LEAST];
        assert!(Halves::new(&w, (512, LEAST / 512)).is_some());
        w[LEAST - 1] = 1.001;
        assert!(Halves::new(&w, (512, LEAST / 512)).is_none());
        assert!(Halves::new(&w[..512], (512, 1)).is_none(), "too small");
    }
}
