//! Tables of a packed batch for devices that work tile by tile: no tile straddles a segment, the longest work comes first.

use crate::backend::{Backend, Tensor};
use crate::error::Result;

use super::Segment;

/// Rows of a tile.
pub(crate) const TILE: usize = 64;
/// Rows that one block walks along for a tile of keys; further blocks take the rest.
const SHARE: usize = 4096;
/// In place of a slot: the tile's sums are not shared.
pub(crate) const WHOLE: u32 = u32::MAX;

/// The tables in device memory.
pub(crate) struct Tiles<B: Backend> {
    /// Query tiles: first row, end row, own start, own end, prompt start, prompt end.
    pub(crate) queries: Tensor<B, u32>, // (n, 6)
    /// Key tiles, each with rows that see it: first key, end key, first row, end row, own start, slot of its sums or `WHOLE`.
    pub(crate) keys: Tensor<B, u32>, // (n, 6)
    /// Key tiles whose rows were shared out: first key, end key, first slot, slots.
    pub(crate) shared: Tensor<B, u32>, // (n, 4)
    /// Slots of partial sums in all.
    pub(crate) slots: usize,
}

impl<B: Backend> Tiles<B> {
    /// Room for the tables of any batch of `rows` rows.
    pub(crate) fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        let further = further(rows);
        Ok(Tiles {
            queries: Tensor::zeros(backend, rows, 6)?,
            keys: Tensor::zeros(backend, rows + further, 6)?,
            shared: Tensor::zeros(backend, further, 4)?,
            slots: 0,
        })
    }

    /// Overwrites all tables.
    pub(crate) fn set(&mut self, backend: &B, segments: &[Segment]) -> Result<()> {
        let tables = Tables::of(segments);
        self.queries.refill(backend, tables.queries.as_flattened())?;
        self.keys.refill(backend, tables.keys.as_flattened())?;
        self.shared.refill(backend, tables.shared.as_flattened())?;
        self.slots = tables.slots;
        Ok(())
    }
}

/// Blocks beyond each tile's first, at most. A group of g rows has at most g/64 tiles (and one per segment) that g rows see.
fn further(rows: usize) -> usize {
    rows * (rows / TILE + 3) / SHARE
}

#[derive(Debug, Default, PartialEq)]
struct Tables {
    queries: Vec<[u32; 6]>,
    keys: Vec<[u32; 6]>,
    shared: Vec<[u32; 4]>,
    slots: usize,
}

impl Tables {
    fn of(segments: &[Segment]) -> Tables {
        let mut tables = Tables::default();
        for segment in segments {
            for first in segment.rows.clone().step_by(TILE) {
                tables.push(segment, first, (first + TILE).min(segment.rows.end));
            }
        }
        tables.queries.sort_by_key(|&[_, end, own, _, from, to]| std::cmp::Reverse(end - own + to - from));
        tables.keys.sort_by_key(|&[_, _, row, end, ..]| std::cmp::Reverse(end - row));
        tables
    }

    fn push(&mut self, segment: &Segment, first: usize, end: usize) {
        let Segment { rows, prompt, seen_until } = segment;
        self.queries.push([first, end, rows.start, rows.end, prompt.start, prompt.end].map(|n| n as u32));
        let blocks = (seen_until - first).div_ceil(SHARE);
        if blocks > 1 {
            self.shared.push([first, end, self.slots, blocks].map(|n| n as u32));
        }
        for row in (first..*seen_until).step_by(SHARE) {
            let numbers = [first, end, row, (row + SHARE).min(*seen_until), rows.start].map(|n| n as u32);
            let slot = if blocks > 1 { self.slots as u32 } else { WHOLE };
            self.slots += usize::from(blocks > 1);
            let [a, b, c, d, e] = numbers;
            self.keys.push([a, b, c, d, e, slot]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt and its answers, from row `at` on.
    fn group(segments: &mut Vec<Segment>, prompt: usize, answers: &[usize]) {
        let at = segments.last().map_or(0, |s| s.rows.end);
        let end = at + prompt + answers.iter().sum::<usize>();
        if prompt > 0 {
            segments.push(Segment { rows: at..at + prompt, prompt: at..at, seen_until: end });
        }
        let mut row = at + prompt;
        for answer in answers {
            segments.push(Segment { rows: row..row + answer, prompt: at..at + prompt, seen_until: row + answer });
            row += answer;
        }
    }

    #[test]
    fn the_capacity_holds_the_worst_batches_whose_longest_work_comes_first() {
        for (prompt, answers) in [(0, vec![40_000]), (20_000, vec![20_000]), (12_345, vec![1; 9_000]), (1, vec![4096])]
        {
            let mut segments = Vec::new();
            group(&mut segments, prompt, &answers);
            let (rows, tables) = (segments.last().unwrap().rows.end, Tables::of(&segments));
            let work = |q: &[u32; 6]| q[1] - q[2] + q[5] - q[4];
            assert!(tables.queries.len() <= rows && tables.queries.is_sorted_by(|a, b| work(a) >= work(b)));
            assert!(tables.keys.len() <= rows + further(rows));
            assert!(tables.shared.len() <= further(rows), "{prompt}, {} answers", answers.len());
        }
    }
}
