//! `tokenizer.json`: text to ids and back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tokenizers::AddedToken;

use super::foreign::contained;
use super::input::read;
use super::specials::Specials;
use crate::error::{Error, Result};
use crate::text::output::sha256;

mod regex;

/// Bytes of an added token's text; the longest in use have some dozens.
const LONGEST_ADDED: usize = 4096;

/// A model's tokenizer. Neither truncates nor pads, whatever its file says.
pub struct Tokenizer {
    file: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Of tokenizer.json, in hex.
    pub(crate) sha256: String,
    /// Highest id + 1.
    pub vocab_size: usize,
    special: BTreeSet<u32>,
    /// The texts that become one id wherever they stand, longest first.
    added: Vec<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`, to which the special tokens that it does not know as such are added, as transformers does.
    /// Fails on a file that the tokenizers library does not read.
    pub(crate) fn open(dir: &Path, specials: &Specials) -> Result<Tokenizer> {
        const EXPECTED: &str = "a tokenizer.json of the tokenizers library";
        const REMEDY: &str = "save it again with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`";
        let file = dir.join("tokenizer.json");
        let bytes = read(&file)?;
        let wrong = |what: String| Error::file(&file, EXPECTED, REMEDY)(what);
        let mut inner = contained(|| parse(&bytes)).and_then(|parsed| parsed).map_err(wrong)?;
        // Before the additions: what the embedding need not have is refused where it is used.
        let highest = inner.get_vocab(true).into_values().max();
        for text in specials.all() {
            if !inner.get_added_tokens_decoder().values().any(|token| token.content == *text) {
                contained(|| inner.add_special_tokens(&[AddedToken::from(text.clone(), true)])).map_err(wrong)?;
            }
        }
        let decoder = inner.get_added_tokens_decoder();
        let special = decoder.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let mut added: Vec<_> = decoder.into_values().map(|token| token.content).filter(|t| !t.is_empty()).collect();
        added.sort_by_key(|text| (std::cmp::Reverse(text.len()), text.clone()));
        let vocab_size = highest.map_or(0, |id| id as usize + 1);
        Ok(Tokenizer { file, inner, sha256: sha256(&bytes), vocab_size, special, added })
    }

    /// Fails unless every id has a row in an embedding of `vocab_size` rows and, where the model's config says which tokenizer
    /// it was trained with, unless this is that one.
    pub(crate) fn check(&self, vocab_size: usize, trained_with: Option<&str>) -> Result<()> {
        let refuse = |expected: &str, found: &str| {
            Err(Error::file(&self.file, expected, "put model and tokenizer of one training together")(found))
        };
        if self.vocab_size > vocab_size {
            let expected = format!("ids below the model's vocab_size ({vocab_size})");
            return refuse(&expected, &format!("ids up to {}", self.vocab_size - 1));
        }
        match trained_with {
            Some(expected) if !expected.eq_ignore_ascii_case(&self.sha256) && !self.was_rewritten(expected) => {
                refuse(&format!("SHA-256 {expected}, as config.json says (ares_tokenizer_sha256)"), &self.sha256)
            }
            _ => Ok(()),
        }
    }

    /// Whether the file is what transformers makes of the one with this hash when it saves it: with a post-processor that adds nothing.
    fn was_rewritten(&self, sha256_before: &str) -> bool {
        let value = read(&self.file).ok().and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
        let Some(mut value) = value else { return false };
        let adds = &value["post_processor"]["special_tokens"];
        if adds.as_object().is_none_or(|tokens| !tokens.is_empty()) {
            return false;
        }
        value["post_processor"] = serde_json::Value::Null;
        serde_json::to_string_pretty(&value)
            .is_ok_and(|text| sha256_before.eq_ignore_ascii_case(&sha256(text.as_bytes())))
    }

    /// Encodes `text` alone, or `around` with what the tokenizer puts around every text (a beginning-of-text token, say). Special
    /// tokens written out in it become their ids. Fails on text that the tokenizer has no ids for.
    pub(crate) fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        let refused = |error| Error::row("text", format!("one that {} can encode", self.file.display()), error);
        let encode = || self.inner.encode_fast(text, around).map(|encoding| encoding.get_ids().to_vec());
        contained(encode).and_then(|ids| ids.map_err(|error| error.to_string())).map_err(refused)
    }

    /// Decodes `ids`; ids without a token count for nothing.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let refused = |error| Error::row("token ids", format!("ones that {} can decode", self.file.display()), error);
        let decode = || self.inner.decode(ids, skip_special);
        contained(decode).and_then(|text| text.map_err(|error| error.to_string())).map_err(refused)
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether the id stands for no text of its own (`<|end|>`, `</s>`, …).
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// `text` in which no added token, and none of `literals`, can be recognised any more: a zero-width space follows each one's
    /// first character. For text that is judged and must not speak as its template speaks.
    pub(crate) fn escape(&self, text: &str, literals: &[String]) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            out.push(first);
            // Tokens that overlap are each broken where they begin.
            if self
                .added
                .iter()
                .chain(literals)
                .any(|token| token.chars().nth(1).is_some() && rest.starts_with(token.as_str()))
            {
                out.push('\u{200b}');
            }
            rest = &rest[first.len_utf8()..];
        }
        out
    }
}

/// As the Python package reads it, but without truncation and padding.
fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    #[derive(serde::Deserialize)]
    struct Added {
        added_tokens: Option<Vec<Token>>,
    }
    #[derive(serde::Deserialize)]
    struct Token {
        content: String,
    }
    // Looked at before: the library spends minutes on a token of a hundred thousand bytes.
    let Added { added_tokens } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if let Some(Token { content }) = added_tokens.iter().flatten().find(|token| token.content.len() > LONGEST_ADDED) {
        return Err(format!("an added token of {} bytes, where {LONGEST_ADDED} are the most", content.len()));
    }
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
    inner.with_padding(None).with_truncation(None).map_err(|error| error.to_string())?;
    if let Some(part) = regex::translated(inner.get_normalizer())? {
        inner.with_normalizer(Some(part));
    }
    if let Some(part) = regex::translated(inner.get_pre_tokenizer())? {
        inner.with_pre_tokenizer(Some(part));
    }
    if let Some(part) = regex::translated(inner.get_decoder())? {
        inner.with_decoder(Some(part));
    }
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// With the folder that its file lies in, which goes when it is dropped.
    fn open(definition: &str) -> (tempfile::TempDir, Tokenizer) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), definition).unwrap();
        let tokenizer = Tokenizer::open(dir.path(), &Specials::default()).unwrap();
        (dir, tokenizer)
    }

    /// What the Python package makes of patterns in which lines matter: `scripts/golden_tokenizers.py`.
    #[test]
    fn patterns_are_read_as_python_reads_them() {
        let golden: Value = serde_json::from_str(include_str!("../../tests/golden-tokenizers.json")).unwrap();
        let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        for case in golden["cases"].as_array().unwrap() {
            let (_dir, tokenizer) = open(&case["tokenizer"].to_string());
            for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
                let found = serde_json::json!(tokenizer.encode(text, false).unwrap());
                let part = [&case["tokenizer"]["normalizer"], &case["tokenizer"]["pre_tokenizer"]];
                assert_eq!(&found, ids, "{text:?} by {part:?}");
            }
        }
    }

    #[test]
    fn a_tokenizer_that_transformers_saved_again_is_the_same() {
        let before = include_str!("../../models/framing/policy/tokenizer.json");
        let mut saved: Value = serde_json::from_str(before).unwrap();
        saved["post_processor"] = serde_json::json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}});
        let (_dir, tokenizer) = open(&serde_json::to_string_pretty(&saved).unwrap());
        let hash = sha256(before.as_bytes());
        assert_ne!(tokenizer.sha256, hash);
        tokenizer.check(1024, Some(&hash)).unwrap();
        saved["model"]["vocab"]["zzz"] = 1023.into();
        let (_dir, other) = open(&serde_json::to_string_pretty(&saved).unwrap());
        assert!(other.check(1024, Some(&hash)).is_err());
    }
}
