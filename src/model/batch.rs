//! Packed batches: sequences one after the other, prompts shared by their answers, no padding anywhere.
//!
//! A *group* is a prompt segment, directly followed by its answer segments. **An answer segment begins with the prompt's last
//! token and the prompt segment ends before it**, so every target row belongs to one sequence and has one label: the prompt's
//! last row would otherwise predict every answer's first token. A row with a prompt is two segments even when alone, and the
//! prompt is the row's own, never a common prefix found in the batch: a sequence's values depend on that sequence alone.

use std::ops::Range;

use crate::backend::{Backend, Indices, Tensor};
use crate::error::Result;
use crate::ops::{Packing, Segment};

/// One answer to a group's prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerTokens<'a> {
    pub tokens: &'a [u32],
    /// The first `context` tokens stand before the answer without being trained on (forced tokens).
    pub context: usize,
}

impl<'a> AnswerTokens<'a> {
    pub fn new(tokens: &'a [u32]) -> Self {
        AnswerTokens { tokens, context: 0 }
    }
}

/// Which rows a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heads {
    /// Every answer token is predicted from the row before it: log-probabilities. The last token's own row is left out.
    Targets,
    /// The last row of each sequence: scores.
    Ends,
}

/// The host's description of a packed batch.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) segments: Vec<Segment>,
    pub groups: Vec<Range<usize>>,
    /// Rows that the head reads, in order of sequences.
    pub rows: Vec<u32>,
    /// What each head row predicts; empty for scores.
    pub targets: Vec<u32>,
    /// Per answer, in order of pushing: its range of `rows`.
    pub sequences: Vec<Range<usize>>,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Packs `items`, each a group by `group`, in order into batches of at most `limit` rows; a larger one stands alone. With
    /// each batch its items.
    pub(crate) fn pack<'a, T>(
        items: &'a [T],
        heads: Heads,
        limit: usize,
        group: impl Fn(&'a T) -> (&'a [u32], Vec<AnswerTokens<'a>>),
    ) -> Vec<(&'a [T], Batch)> {
        let groups: Vec<_> = items.iter().map(group).collect();
        let batch = |range: Range<usize>| {
            let mut batch = Batch::default();
            groups[range].iter().for_each(|(prompt, answers)| batch.push(prompt, answers, heads));
            batch
        };
        let rows: Vec<usize> = (0..groups.len()).map(|at| batch(at..at + 1).len()).collect();
        plan(&rows, limit).into_iter().map(|range| (&items[range.clone()], batch(range))).collect()
    }

    /// Adds a group. Token ids and lengths were checked where they came from.
    pub fn push(&mut self, prompt: &[u32], answers: &[AnswerTokens], heads: Heads) {
        let (shared, last) = match prompt.split_last() {
            Some((last, shared)) => (shared, Some(*last)),
            None => (prompt, None),
        };
        let first_segment = self.segments.len();
        let prompt_rows = self.extend(shared.iter().copied(), 0);
        if !prompt_rows.is_empty() {
            let empty = prompt_rows.start..prompt_rows.start;
            self.segments.push(Segment { rows: prompt_rows.clone(), prompt: empty, seen_until: 0 });
        }
        for answer in answers {
            let own: Vec<u32> = last.iter().chain(answer.tokens).copied().collect();
            let kept = if heads == Heads::Targets { own.len().saturating_sub(1) } else { own.len() };
            let rows = self.extend(own[..kept].iter().copied(), prompt_rows.len());
            let first_head = self.rows.len();
            match heads {
                Heads::Ends => self.rows.extend(rows.clone().last().map(|row| row as u32)),
                Heads::Targets => {
                    // Row i of the segment predicts own[i + 1]. Without a prompt the first token is predicted by nothing.
                    for i in answer.context..kept {
                        self.rows.push((rows.start + i) as u32);
                        self.targets.push(own[i + 1]);
                    }
                }
            }
            self.sequences.push(first_head..self.rows.len());
            if !rows.is_empty() {
                self.segments.push(Segment { seen_until: rows.end, rows, prompt: prompt_rows.clone() });
            }
        }
        if !prompt_rows.is_empty() {
            self.segments[first_segment].seen_until = self.tokens.len();
        }
        if self.segments.len() > first_segment {
            self.groups.push(first_segment..self.segments.len());
        }
    }

    /// The head reads the first row of each sequence, as encoders' do, or `all` of them, instead of the last. Of sequences without a
    /// prompt.
    pub(crate) fn read_from_start(&mut self, all: bool) {
        let read = |rows: &Range<usize>| rows.start as u32..if all { rows.end } else { rows.start + 1 } as u32;
        self.rows = self.segments.iter().flat_map(|segment| read(&segment.rows)).collect();
    }

    fn extend(&mut self, tokens: impl ExactSizeIterator<Item = u32>, first_position: usize) -> Range<usize> {
        let start = self.tokens.len();
        self.positions.extend((0..tokens.len()).map(|i| (first_position + i) as u32));
        self.tokens.extend(tokens);
        start..self.tokens.len()
    }

    /// (row, key) pairs that attention visits: what its cost is counted in.
    pub fn pairs(&self) -> u64 {
        self.segments.iter().map(|segment| segment.pairs(None, true)).sum()
    }
}

/// The tables of a batch on the device.
pub(crate) struct DeviceBatch<B: Backend> {
    pub(crate) packing: Packing<B>,
    pub(crate) tokens: Indices<B>,      // (T, 1)
    pub(crate) rows: Indices<B>,        // (R, 1)
    pub(crate) targets: Tensor<B, u32>, // (R, 1)
}

impl<B: Backend> DeviceBatch<B> {
    /// Room for `rows` packed rows, any of which may be read by a head.
    pub(crate) fn with_capacity(backend: &B, rows: usize) -> Result<Self> {
        let column = || Indices::with_capacity(backend, rows);
        Ok(DeviceBatch {
            packing: Packing::with_capacity(backend, rows)?,
            tokens: column()?,
            rows: column()?,
            targets: Tensor::zeros(backend, rows, 1)?,
        })
    }

    pub(crate) fn capacity(&self) -> usize {
        self.tokens.capacity()
    }

    /// Overwrites all tables.
    pub(crate) fn set(&mut self, backend: &B, batch: &Batch) -> Result<()> {
        self.packing.set(backend, batch.segments.clone(), batch.groups.clone(), &batch.positions)?;
        self.tokens.refill(backend, &batch.tokens)?;
        self.rows.refill(backend, &batch.rows)?;
        self.targets.refill(backend, &batch.targets)
    }
}

/// Runs of neighbours that share their prompt, each as long as at most `limit` rows allow; a larger item stands alone. `parts`: an item's
/// prompt, and the tokens of its answer.
pub(crate) fn sharing<T>(items: &[T], limit: usize, parts: impl Fn(&T) -> (&[u32], usize)) -> Vec<&[T]> {
    let (mut runs, mut start, mut rows) = (Vec::new(), 0, 0);
    for (i, item) in items.iter().enumerate() {
        let (prompt, answer) = parts(item);
        let shares = !prompt.is_empty() && prompt == parts(&items[start]).0 && rows + answer < limit;
        if i > start && !shares {
            runs.push(&items[start..i]);
            start = i;
        }
        // Each answer begins with the prompt's last token.
        rows = if i == start { prompt.len() } else { rows } + answer + 1;
    }
    if start < items.len() {
        runs.push(&items[start..]);
    }
    runs
}

/// Cuts items of the given row counts into consecutive runs of at most `limit` rows; a larger item stands alone.
pub(crate) fn plan(costs: &[usize], limit: usize) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut sum) = (Vec::new(), 0, 0);
    for (i, &cost) in costs.iter().enumerate() {
        if i > start && sum + cost > limit {
            runs.push(start..i);
            (start, sum) = (i, 0);
        }
        sum += cost;
    }
    if start < costs.len() {
        runs.push(start..costs.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_a_prompt_as_long_as_they_fit() {
        let (a, b) = ([1u32, 2, 3].as_slice(), [4u32].as_slice());
        let items = [(a, 4), (a, 4), (a, 3), (b, 1), (b, 30), (b, 1), (a, 2), (&[], 1), (&[], 1)];
        let runs = sharing(&items, 14, |(prompt, answer)| (prompt, *answer));
        assert_eq!(runs.iter().map(|run| run.len()).collect::<Vec<_>>(), [2, 1, 1, 1, 1, 1, 1, 1]);
        let all = sharing(&items[..3], 18, |(prompt, answer)| (prompt, *answer));
        assert_eq!((all.len(), all[0].len()), (1, 3), "3 of the prompt, and each answer with one more");
        assert!(sharing(&items[..0], 18, |(prompt, answer)| (prompt, *answer)).is_empty());
        for run in &all {
            let answers: Vec<_> = run.iter().map(|(_, answer)| vec![7; *answer]).collect();
            let answers: Vec<_> = answers.iter().map(|answer| AnswerTokens::new(answer)).collect();
            let mut batch = Batch::default();
            batch.push(run[0].0, &answers, Heads::Ends);
            assert!(batch.len() <= 18);
        }
    }

    #[test]
    fn answers_share_their_prompt_and_own_their_targets() {
        let mut batch = Batch::default();
        let answers = [AnswerTokens::new(&[7, 8, 9]), AnswerTokens { tokens: &[5, 6, 4], context: 1 }];
        batch.push(&[1, 2, 3], &answers, Heads::Targets);
        assert_eq!(batch.tokens, [1, 2, 3, 7, 8, 3, 5, 6]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 2, 3, 4]);
        assert_eq!(batch.rows, [2, 3, 4, 6, 7]);
        assert_eq!(batch.targets, [7, 8, 9, 6, 4]);
        assert_eq!(batch.sequences, [0..3, 3..5]);
        assert_eq!(batch.segments[0], Segment { rows: 0..2, prompt: 0..0, seen_until: 8 });
        assert_eq!(batch.segments[1], Segment { rows: 2..5, prompt: 0..2, seen_until: 5 });
        assert_eq!(batch.groups.as_slice(), std::slice::from_ref(&(0..3)));
        assert_eq!(batch.pairs(), 3 + (6 + 6) * 2);
    }

    #[test]
    fn ends_keep_the_last_token() {
        let mut batch = Batch::default();
        batch.push(&[1, 2], &[AnswerTokens::new(&[7])], Heads::Ends);
        batch.push(&[], &[AnswerTokens::new(&[4, 5])], Heads::Ends);
        batch.push(&[9], &[AnswerTokens::new(&[8])], Heads::Ends);
        assert_eq!(batch.tokens, [1, 2, 7, 4, 5, 9, 8]);
        assert_eq!(batch.rows, [2, 4, 6]);
        assert_eq!(batch.groups, [0..2, 2..3, 3..4]);
    }

    #[test]
    fn a_plan_keeps_order_and_lets_giants_stand_alone() {
        assert_eq!(plan(&[3, 3, 3, 20, 1], 6), [0..2, 2..3, 3..4, 4..5]);
        assert!(plan(&[], 6).is_empty());
    }
}
