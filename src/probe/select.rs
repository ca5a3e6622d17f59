//! Which of the failures found are repaired.

use super::record::ProbeRecord;
use crate::judge::{Sense, Verdict};
use crate::text::ngrams::Seen;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Up to `n` failures, none a near-duplicate of another, in turn from each verdict × tactic × domain, so that the cell that the search
/// liked best does not outweigh the others. Ambiguous answers and error rows are never trained on. Within a cell the order
/// is by chance; the first records of the result are as balanced as all of it.
pub fn select_failures(records: &[ProbeRecord], sense: Sense, n: usize, seed: u64) -> Vec<&ProbeRecord> {
    let failure = |record| {
        let verdict = ProbeRecord::judged(record).filter(|j| !j.ambiguous)?.verdict(sense);
        (verdict != Verdict::Sound).then_some((verdict, record))
    };
    let mut order: Vec<(Verdict, &ProbeRecord)> = records.iter().filter_map(failure).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    order.shuffle(&mut rng);
    let mut cells: BTreeMap<(Verdict, &str, &str), Vec<&ProbeRecord>> = BTreeMap::new();
    for (verdict, record) in order {
        cells.entry((verdict, &record.tactic, &record.domain)).or_default().push(record);
    }
    let mut cells: Vec<_> = cells.into_values().collect();
    cells.shuffle(&mut rng);
    let (mut seen, mut out) = (Seen::default(), Vec::new());
    while out.len() < n && cells.iter().any(|c| !c.is_empty()) {
        for cell in &mut cells {
            let fresh = std::iter::from_fn(|| cell.pop()).find(|r| seen.find(&r.prompt).is_none());
            if let Some(record) = fresh.filter(|_| out.len() < n) {
                seen.insert(&record.prompt);
                out.push(record);
            }
        }
    }
    out
}
