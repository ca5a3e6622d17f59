//! Near-duplicates: texts whose word 4-grams have a Jaccard index of at least [`NEAR_DUPLICATE`].
//!
//! One notion of "the same text" serves the overlap check between splits, the search's archive and the choice of repair items.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::error::{Error, Result};

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

/// Fails, naming both rows, if prompts of two different splits are equal or near-duplicates. Within a split they may be. Takes
/// (number of the split, text, what the row is called); rows without a text, whose prompt is ids, are left out.
pub fn overlap<'a, N: Fn() -> String>(texts: impl IntoIterator<Item = (usize, &'a str, N)>) -> Result<()> {
    let texts: Vec<_> = texts.into_iter().filter(|(_, text, _)| !text.trim().is_empty()).collect();
    let grams: Vec<Vec<u64>> = texts.iter().map(|(_, text, _)| grams(text)).collect();
    // A pair with a Jaccard index of at least t shares one of the ⌊(1 − t)·n⌋ + 1 rarest grams of either text (n its number of
    // grams): only these are indexed, and only texts that share one are compared (prefix filtering; Chaudhuri et al. 2006).
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
                    let (first, second) = (texts[other].2(), texts[at].2());
                    return Err(Error::Data {
                        what: "splits".into(),
                        expected: "no prompt in two of them".into(),
                        found: format!(
                            "{first} and {second} with {:.0} % of their word 4-grams in common",
                            100.0 * index
                        ),
                        remedy: "remove one of the two rows: what is trained on must not be measured on".into(),
                    });
                }
            }
            before.push(at);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

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

    #[test]
    fn splits_that_share_a_prompt_are_refused_by_name() {
        let overlap = |sides: [&[&str]; 2]| {
            let named = |side: usize, at: usize| move || format!("{} line {at}", ["train", "test"][side]);
            let texts =
                |side: usize| sides[side].iter().enumerate().map(move |(at, text)| (side, *text, named(side, at)));
            overlap(texts(0).chain(texts(1)))
        };
        let long = "how do I bake a loaf of bread with rye flour and no yeast at all";
        let train = ["something else entirely, nothing in common", long, long];
        let honest = ["how do I bake a cake with wheat flour and no eggs at all today", "two words"];
        overlap([&train, &honest]).unwrap();
        let found = overlap([&train, &["other words", &long.replace("at all", "whatsoever")]]).unwrap_err().to_string();
        assert!(found.contains("train line 1 and test line 1 with 79 %"), "{found}");
        assert!(!found.contains("bread"), "prompts are not quoted");
        assert!(overlap([&honest, &["Two words!"]]).is_err(), "short texts count when they are equal");
    }

    /// The index finds exactly what comparing all with all finds.
    #[test]
    fn overlap_agrees_with_comparing_everything() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let mut text = |words: usize, variety: usize| -> String {
            (0..words).map(|_| format!("w{} ", random.random_range(0..variety))).collect()
        };
        let mut found_some = [false; 2];
        for _ in 0..400 {
            let base = text(12, 4);
            let all: Vec<(usize, String)> =
                (0..4).map(|i| (i % 2, format!("{}{}", &base[..base.len() / 2], text(4, 2)))).collect();
            let near = |a: &str, b: &str| jaccard(&grams(a), &grams(b)) >= NEAR_DUPLICATE;
            let expected = all.iter().any(|a| all.iter().any(|b| a.0 != b.0 && near(&a.1, &b.1)));
            let found = overlap(all.iter().map(|(split, text)| (*split, text.as_str(), String::new))).is_err();
            assert_eq!(found, expected, "{all:?}");
            found_some[usize::from(found)] = true;
        }
        assert_eq!(found_some, [true, true], "both answers must have been tried");
    }
}
