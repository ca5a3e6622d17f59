//! Near-duplicates: texts whose word 4-grams have a Jaccard index of at least [`NEAR_DUPLICATE`].
//!
//! One notion of "the same text" serves the overlap check between splits, the search's archive and the choice of repair items.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Two texts at or above this Jaccard index of their word 4-grams count as the same.
pub const NEAR_DUPLICATE: f64 = 0.6;
const WORDS: usize = 4;

/// Splits a text into lower-case words: runs of letters, digits, `_` and `'`.
pub(crate) fn words(text: &str) -> Vec<String> {
    let inside = |c: char| c.is_alphanumeric() || c == '_' || c == '\'';
    text.split(|c| !inside(c)).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

/// Hashes the set of word 4-grams of a text, sorted, never empty: a text of fewer than four words is one gram by itself.
/// Hashes are good within one process only.
pub fn grams(text: &str) -> Vec<u64> {
    let words: Vec<u64> = words(text).iter().map(hash).collect();
    let mut grams: Vec<u64> = match words.len() {
        0..=WORDS => vec![hash(&words[..])],
        _ => words.windows(WORDS).map(hash).collect(),
    };
    grams.sort_unstable();
    grams.dedup();
    grams
}

fn hash<T: Hash + ?Sized>(item: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    item.hash(&mut hasher);
    hasher.finish()
}

/// Computes `shared / (a + b − shared)`: the Jaccard index of two sets of which only the sizes and the intersection's size are
/// known.
fn index_of(shared: usize, a: usize, b: usize) -> f64 {
    shared as f64 / (a + b - shared) as f64
}

/// Computes the Jaccard index of two sets as [`grams`] makes them.
pub fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut shared) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, shared) = (i + 1, j + 1, shared + 1),
        }
    }
    index_of(shared, a.len(), b.len())
}

/// Texts seen so far, asked for near-duplicates in time proportional to the texts that share a gram.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Number of grams per text; 0 = forgotten.
    sizes: Vec<usize>,
    holders: HashMap<u64, Vec<usize>>,
}

impl Seen {
    /// Remembers a text and returns its number: 0 for the first, counting up.
    pub(crate) fn insert(&mut self, text: &str) -> usize {
        let (number, grams) = (self.sizes.len(), grams(text));
        for &gram in &grams {
            self.holders.entry(gram).or_default().push(number);
        }
        self.sizes.push(grams.len());
        number
    }

    /// Forgets the text of this number; its number is not given again.
    pub(crate) fn forget(&mut self, number: usize) {
        if let Some(size) = self.sizes.get_mut(number) {
            *size = 0;
        }
    }

    /// Finds the first remembered text that is a near-duplicate of this one.
    pub(crate) fn find(&self, text: &str) -> Option<usize> {
        self.find_grams(&grams(text))
    }

    /// Does [`find`](Seen::find) for a text of which only the [`grams`] are given.
    pub(crate) fn find_grams(&self, grams: &[u64]) -> Option<usize> {
        let mut holders: Vec<usize> = grams.iter().filter_map(|g| self.holders.get(g)).flatten().copied().collect();
        holders.sort_unstable();
        let near = |same: &&[usize]| {
            let size = self.sizes[same[0]];
            size > 0 && index_of(same.len(), grams.len(), size) >= NEAR_DUPLICATE
        };
        holders.chunk_by(|a, b| a == b).find(near).map(|same| same[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jaccard_counts_shared_four_grams() {
        // a: (one two three four) (two three four five); b: the first of them and (two three four six).
        let (a, b) = (grams("One two, three four five"), grams("one two three four six"));
        assert_eq!(jaccard(&a, &b), 1.0 / 3.0);
        assert_eq!(jaccard(&a, &a), 1.0);
        assert_eq!(jaccard(&grams("two words"), &grams("Two words!")), 1.0);
        assert_eq!(jaccard(&grams(""), &grams("other")), 0.0);
    }

    #[test]
    fn the_index_agrees_with_jaccard_and_forgets() {
        let texts = ["a b c d e f g h", "a b c d e f g x", "a b c d x x x x", "q r s t u v", ""];
        for text in texts {
            let mut seen = Seen::default();
            for other in texts {
                seen.insert(other);
            }
            let expected = texts.iter().position(|o| jaccard(&grams(text), &grams(o)) >= NEAR_DUPLICATE);
            assert_eq!(seen.find(text), expected, "{text}");
        }
        let mut seen = Seen::default();
        let number = seen.insert(texts[0]);
        assert_eq!(seen.find(texts[1]), Some(number), "4 of 6 grams are shared");
        seen.forget(number);
        assert_eq!(seen.find(texts[1]), None);
    }
}
