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

    fn ragged() -> Vec<Segment> {
        let mut segments = Vec::new();
        group(&mut segments, 130, &[65, 64, 1]);
        group(&mut segments, 0, &[7]);
        group(&mut segments, 70, &[9000]);
        segments
    }

    #[test]
    fn query_tiles_cover_each_row_once_and_stay_in_their_segment() {
        let segments = ragged();
        let tables = Tables::of(&segments);
        let mut covered = vec![0; segments.last().unwrap().rows.end];
        for &[first, end, own, own_end, prompt, prompt_end] in &tables.queries {
            assert!(end - first <= TILE as u32);
            covered[first as usize..end as usize].iter_mut().for_each(|n| *n += 1);
            let segment = segments.iter().find(|s| s.rows.start as u32 == own).unwrap();
            assert_eq!(segment.rows, own as usize..own_end as usize);
            assert_eq!(segment.prompt, prompt as usize..prompt_end as usize);
            assert!(own <= first && end <= own_end && (first - own).is_multiple_of(TILE as u32));
        }
        assert!(covered.iter().all(|&n| n == 1));
        let work: Vec<u32> = tables.queries.iter().map(|q| q[1] - q[2] + q[5] - q[4]).collect();
        assert!(work.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn the_rows_that_see_a_key_tile_are_shared_out() {
        let segments = ragged();
        let tables = Tables::of(&segments);
        let mut slots = vec![0; tables.slots];
        for segment in &segments {
            for first in segment.rows.clone().step_by(TILE) {
                let mut blocks: Vec<_> = tables.keys.iter().filter(|k| k[0] as usize == first).collect();
                blocks.sort_by_key(|k| k[2]);
                assert_eq!((blocks[0][2] as usize, blocks.last().unwrap()[3] as usize), (first, segment.seen_until));
                assert!(blocks.windows(2).all(|b| b[0][3] == b[1][2] && b[0][5] + 1 == b[1][5]));
                assert!(blocks.iter().all(|b| b[4] as usize == segment.rows.start && b[3] - b[2] <= SHARE as u32));
                let shared = tables.shared.iter().find(|s| s[0] as usize == first);
                match shared {
                    Some(s) => assert_eq!((s[1], s[2], s[3] as usize), (blocks[0][1], blocks[0][5], blocks.len())),
                    None => assert_eq!((blocks.len(), blocks[0][5]), (1, WHOLE)),
                }
                blocks.iter().filter(|b| b[5] != WHOLE).for_each(|b| slots[b[5] as usize] += 1);
            }
        }
        assert!(tables.slots > 2 && slots.iter().all(|&n| n == 1));
    }

    #[test]
    fn the_capacity_holds_the_worst_batches() {
        for (prompt, answers) in [(0, vec![40_000]), (20_000, vec![20_000]), (12_345, vec![1; 9_000]), (1, vec![4096])]
        {
            let mut segments = Vec::new();
            group(&mut segments, prompt, &answers);
            let (rows, tables) = (segments.last().unwrap().rows.end, Tables::of(&segments));
            assert!(tables.queries.len() <= rows);
            assert!(tables.keys.len() <= rows + further(rows));
            assert!(tables.shared.len() <= further(rows), "{prompt}, {} answers", answers.len());
        }
    }
}
