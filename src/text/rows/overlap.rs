//! Splits must not share a prompt: neither the same text nor a near-duplicate of it.
//!
//! A pair with a Jaccard index of at least t shares one of the ⌊(1 − t)·n⌋ + 1 rarest grams of either text (n its number of
//! grams): only these are indexed, and only texts that share one of them are compared (prefix filtering; Chaudhuri et al. 2006).

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::text::ngrams::{NEAR_DUPLICATE, grams, jaccard};

/// Fails, naming both rows, if prompts of two different splits are equal or near-duplicates. Within a split they may be. Takes
/// (number of the split, text, what the row is called); rows without a text, whose prompt is ids, are left out.
pub fn overlap<'a, N: Fn() -> String>(texts: impl IntoIterator<Item = (usize, &'a str, N)>) -> Result<()> {
    let texts: Vec<_> = texts.into_iter().filter(|(_, text, _)| !text.trim().is_empty()).collect();
    let grams: Vec<Vec<u64>> = texts.iter().map(|(_, text, _)| grams(text)).collect();
    let mut frequency: HashMap<u64, usize> = HashMap::new();
    grams.iter().flatten().for_each(|gram| *frequency.entry(*gram).or_default() += 1);
    let mut holders: HashMap<u64, Vec<usize>> = HashMap::new();
    for (at, own) in grams.iter().enumerate() {
        let mut rare = own.clone();
        rare.sort_unstable_by_key(|gram| (frequency[gram], *gram));
        // One more than needed where rounding might drop one.
        rare.truncate(own.len() - (NEAR_DUPLICATE * own.len() as f64).floor() as usize + 1);
        for gram in rare {
            let before = holders.entry(gram).or_default();
            for &other in before.iter().filter(|other| texts[**other].0 != texts[at].0) {
                let index = jaccard(own, &grams[other]);
                if index >= NEAR_DUPLICATE {
                    return Err(shared(&texts[other].2(), &texts[at].2(), index));
                }
            }
            before.push(at);
        }
    }
    Ok(())
}

fn shared(first: &str, second: &str, index: f64) -> Error {
    Error::Data {
        what: "splits".into(),
        expected: "no prompt in two of them".into(),
        found: format!("{first} and {second} with {:.0} % of their word 4-grams in common", 100.0 * index),
        remedy: "remove one of the two rows: what is trained on must not be measured on".into(),
    }
}
