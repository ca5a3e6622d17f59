//! `tokenizer.json`: text to ids and back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::text::output::sha256;

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
    /// Reads `tokenizer.json` in `dir`. Fails on a file that the tokenizers library does not read.
    pub(crate) fn open(dir: &Path) -> Result<Tokenizer> {
        const EXPECTED: &str = "a tokenizer.json of the tokenizers library";
        const REMEDY: &str = "save it again with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`";
        let file = dir.join("tokenizer.json");
        let bytes = std::fs::read(&file).map_err(Error::read(&file))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(Error::file(&file, EXPECTED, REMEDY))?;
        inner.with_padding(None).with_truncation(None).map_err(Error::file(&file, EXPECTED, REMEDY))?;
        let highest = inner.get_vocab(true).into_values().max();
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
            Some(expected) if !expected.eq_ignore_ascii_case(&self.sha256) => {
                refuse(&format!("SHA-256 {expected}, as config.json says (ares_tokenizer_sha256)"), &self.sha256)
            }
            _ => Ok(()),
        }
    }

    /// Encodes `text` alone, or `around` with what the tokenizer puts around every text (a beginning-of-text token, say). Special
    /// tokens written out in it become their ids. Fails on text that the tokenizer has no ids for.
    pub(crate) fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        let refused = |error| Error::row("text", format!("one that {} can encode", self.file.display()), error);
        Ok(self.inner.encode_fast(text, around).map_err(refused)?.get_ids().to_vec())
    }

    /// Decodes `ids`; ids without a token count for nothing.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let refused = |error| Error::row("token ids", format!("ones that {} can decode", self.file.display()), error);
        self.inner.decode(ids, skip_special).map_err(refused)
    }

    pub(crate) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether the id stands for no text of its own (`<|end|>`, `</s>`, …).
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// `text` in which no added token can be recognised any more: a zero-width space follows each one's first character. For
    /// text that is judged and must not speak as its template speaks.
    pub(crate) fn escape(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            out.push(first);
            // Tokens that overlap are each broken where they begin.
            if self.added.iter().any(|token| token.chars().nth(1).is_some() && rest.starts_with(token.as_str())) {
                out.push('\u{200b}');
            }
            rest = &rest[first.len_utf8()..];
        }
        out
    }
}
