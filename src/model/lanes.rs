//! Passes side by side. On a processor a small model's pass is over sooner than its threads have met ten times; so each thread runs
//! passes of its own, from end to end, and meets the others when all is done. A sequence's bits do not depend on its company.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::block::Block;
use super::transformer::Transformer;
use crate::backend::Matrix;
use crate::error::Result;
use crate::ops::Ops;

/// Packed rows, and sequences that decode, for which one thread's way through the weights is worth it.
const ROWS: usize = 256;
const SEQUENCES: usize = 16;

impl<B: Ops> Transformer<B> {
    /// Into how many passes a forward of `rows` packed rows is cut.
    pub(crate) fn lanes(&self, rows: usize) -> usize {
        self.threads().min(rows / ROWS).max(1)
    }

    /// Over how many lanes the `sequences` that decode at a time are spread.
    pub(crate) fn decoding_lanes(&self, sequences: usize) -> usize {
        self.threads().min(sequences / SEQUENCES).max(1)
    }

    fn threads(&self) -> usize {
        if self.in_lanes() { rayon::current_num_threads() } else { 1 }
    }

    /// Whether its passes may run side by side at all.
    pub(super) fn in_lanes(&self) -> bool {
        let weights = |Block { qkv, o, gate_up, down, .. }: &Block<B>| {
            [qkv, o, gate_up, down].map(|w| w.rows() * w.cols()).iter().sum()
        };
        self.blocks.first().is_some_and(|block| B::in_lanes(weights(block)))
    }
}

/// Runs `work` on every item, each lane on the next that is left; results in order. Fails as the first that fails does, and then the
/// other lanes end after the item they are at. One lane runs on the thread that calls.
pub(crate) fn side_by_side<L: Send, T: Sync, R: Send>(
    lanes: &mut [L],
    items: &[T],
    work: impl Fn(&mut L, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if let [lane] = lanes {
        return items.iter().map(|item| work(lane, item)).collect();
    }
    let next = AtomicUsize::new(0);
    let run = |lane: &mut L| -> Result<Vec<(usize, R)>> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(done) };
            done.push((at, work(lane, item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?));
        }
    };
    let done: Vec<Vec<(usize, R)>> = lanes.par_iter_mut().map(run).collect::<Result<_>>()?;
    let mut done: Vec<(usize, R)> = done.into_iter().flatten().collect();
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::error::Error;

    /// Items 0 and 2 wait for those after them, so that of two threads each takes some of the first four out of turn.
    #[test]
    fn results_come_in_order_and_an_error_ends_all() {
        let items: Vec<usize> = (0..100).collect();
        for lanes in [1, 3] {
            let mut lanes = vec![0usize; lanes];
            let (crowd, over) = (lanes.len() > 1, items.iter().map(|_| AtomicBool::new(false)).collect::<Vec<_>>());
            let work = |lane: &mut usize, item: &usize| {
                let begin = Instant::now();
                while crowd && matches!(item, 0 | 2) && !over[item + 1].load(Ordering::SeqCst) {
                    // A pool of one thread would wait for ever.
                    if begin.elapsed() > Duration::from_secs(1) {
                        break;
                    }
                    std::thread::yield_now();
                }
                *lane += 1;
                over[*item].store(true, Ordering::SeqCst);
                Ok(item * item)
            };
            let found = side_by_side(&mut lanes, &items, work).unwrap();
            assert_eq!(found, items.iter().map(|i| i * i).collect::<Vec<_>>());
            assert_eq!(lanes.iter().sum::<usize>(), 100);
            let fail = |_: &mut usize, item: &usize| if *item == 7 { Err(Error::Usage("no".into())) } else { Ok(()) };
            assert!(side_by_side(&mut lanes, &items, fail).is_err());
        }
    }
}
