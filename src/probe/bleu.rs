//! Self-BLEU: how much the failures found resemble each other (Zhu et al., "Texygen", 2018).

use crate::text::ngrams::words;
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// Texts that are compared at most, drawn by seed.
const SAMPLE: usize = 100;
const ORDERS: usize = 4;

/// Mean BLEU-4 of each text with all others as its references; `None` below two texts.
pub(crate) fn self_bleu(texts: &[&str], seed: u64) -> Option<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn: Vec<Vec<String>> = texts.choose_multiple(&mut rng, SAMPLE).map(|t| words(t)).collect();
    if drawn.len() < 2 {
        return None;
    }
    let counted: Vec<_> = drawn.iter().map(|t| (t.len(), std::array::from_fn(|n| count(t, n + 1)))).collect();
    let sum: f64 = (0..counted.len()).map(|i| bleu(i, &counted)).sum();
    Some(sum / counted.len() as f64)
}

type GramCounts<'a> = HashMap<&'a [String], usize>;

fn count(words: &[String], n: usize) -> GramCounts<'_> {
    let mut counts = GramCounts::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_default() += 1;
    }
    counts
}

/// BLEU of text `i`: geometric mean of the clipped precisions, those of orders above 1 smoothed by +1 (Lin and Och, 2004), times
/// the brevity penalty against the reference of the nearest length.
fn bleu(i: usize, texts: &[(usize, [GramCounts; ORDERS])]) -> f64 {
    let (length, grams) = &texts[i];
    let others = || texts.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, t)| t);
    let mut log = 0.0;
    for (n, own) in grams.iter().enumerate() {
        let clipped = |(gram, &c): (&&[String], &usize)| {
            c.min(others().filter_map(|(_, other)| other[n].get(*gram)).max().copied().unwrap_or(0))
        };
        let hits: usize = own.iter().map(clipped).sum();
        let (all, smooth) = (own.values().sum::<usize>(), usize::from(n > 0));
        if hits + smooth == 0 || all + smooth == 0 {
            return 0.0;
        }
        log += ((hits + smooth) as f64 / (all + smooth) as f64).ln() / ORDERS as f64;
    }
    let nearest = others().map(|(l, _)| *l).min_by_key(|l| (l.abs_diff(*length), *l)).unwrap_or(*length);
    let brevity = if length >= &nearest { 1.0 } else { (1.0 - nearest as f64 / *length as f64).exp() };
    brevity * log.exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_score_one_and_strangers_almost_nothing() {
        assert_eq!(self_bleu(&["a b c d e", "a b c d e"], 0), Some(1.0));
        assert_eq!(self_bleu(&["a b c d e", "f g h i j"], 0), Some(0.0));
        assert_eq!(self_bleu(&["a b c d e"], 0), None);
        // Each: 4 of 5 words, (3+1)/(4+1) pairs, (2+1)/(3+1) triples, (1+1)/(2+1) fours.
        let found = self_bleu(&["a b c d e", "a b c d x"], 0).expect("two texts");
        let expected = (0.8f64 * 0.8 * 0.75 * (2.0 / 3.0)).powf(0.25);
        assert!((found - expected).abs() <= 1e-12, "found {found}, expected {expected}");
    }
}
