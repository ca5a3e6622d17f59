//! From a prompt and an answer to the ids that a model reads: chat template and tokenizer together, with the model's limits.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::text::template::Template;
use crate::text::tokenizer::Tokenizer;
use crate::text::{Message, Prompt};

#[cfg(test)]
mod tests;

/// What the model's config says about the ids it takes.
#[derive(Debug, Clone, Copy)]
pub struct IdLimits<'a> {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The longest sequence.
    pub context: usize,
    /// Ids that end a turn.
    pub eos_token_ids: &'a [u32],
    /// Hex hash of the tokenizer.json the model was trained with, if it says so.
    pub tokenizer_sha256: Option<&'a str>,
}

/// A prompt with an answer: `tokens[..prompt_len]` is the prompt as it is rendered for generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
}

impl Rendered {
    /// Returns the answer's ids, its end-of-turn token included.
    pub(crate) fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }
}

/// How one model reads text. Errors of its methods are errors of one row.
pub struct Rendering {
    dir: PathBuf,
    pub tokenizer: Tokenizer,
    template: Option<Template>,
    vocab_size: usize,
    context: usize,
    /// The ids that end an answer: those of the model's configs, and the tokenizer's `eos_token`.
    pub end_tokens: Vec<u32>,
}

impl Rendering {
    /// Opens tokenizer and chat template (a model without one still reads raw text) of the model in `dir`. Fails on files that
    /// are damaged, or that do not belong to a model with these `limits`.
    pub fn open(dir: &Path, limits: &IdLimits) -> Result<Rendering> {
        let tokenizer = Tokenizer::open(dir)?;
        tokenizer.check(limits.vocab_size, limits.tokenizer_sha256)?;
        let template = Template::open(dir)?;
        let mut end_tokens = limits.eos_token_ids.to_vec();
        let named = template.as_ref().and_then(|template| tokenizer.token_to_id(template.special("eos_token")?));
        end_tokens.extend(named.filter(|id| !limits.eos_token_ids.contains(id)));
        let (vocab_size, context) = (limits.vocab_size, limits.context);
        Ok(Rendering { dir: dir.to_path_buf(), tokenizer, template, vocab_size, context, end_tokens })
    }

    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders what the model answers to. Never empty; leaves room for one more id at least.
    pub(crate) fn prompt_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let tokens = match prompt {
            Prompt::Chat(turns) => self.tokenizer.encode(&self.chat(turns, true)?, false)?,
            Prompt::Raw(text) => self.tokenizer.encode(text, true)?,
            Prompt::Tokens(ids) => self.checked(ids)?,
        };
        self.check_length(filled(tokens, "prompt")?, self.context - 1, "prompt")
    }

    /// Renders the prompt, and its answer through the end-of-turn token; what the template puts after that token (ChatML's
    /// newline) is left out. For log-probabilities and training. Raw text has no end of turn of its own.
    pub fn with_answer(&self, prompt: &Prompt, answer: &str) -> Result<Rendered> {
        let mut rendered = match prompt {
            Prompt::Chat(turns) => {
                let (before, full) = (self.chat(turns, true)?, self.chat(&with_turn(turns, answer), false)?);
                let Some(rest) = full.strip_prefix(&before) else {
                    let place = format!("chat template of {}", self.dir.display());
                    let expected = "an answered conversation to begin with the unanswered one";
                    return Err(Error::row(&place, expected, "another beginning: use --raw"));
                };
                let mut rendered = self.join(&before, rest, false)?;
                let end = self.end_of_turn(rendered.answer())?;
                rendered.tokens.truncate(rendered.prompt_len + end);
                rendered
            }
            Prompt::Raw(text) => self.join(text, answer, true)?,
            Prompt::Tokens(ids) => self.append(ids, answer)?,
        };
        if rendered.answer().is_empty() {
            return Err(empty("answer"));
        }
        rendered.tokens = self.check_length(rendered.tokens, self.context, "prompt and answer")?;
        Ok(rendered)
    }

    /// Renders the whole exchange, as a reward model or judge reads it at its last token. `prompt_len` is 0 where the ids of
    /// the prompt are not its beginning.
    pub fn full(&self, prompt: &Prompt, answer: &str) -> Result<Rendered> {
        let whole = |before: &str, full: &str, special| {
            let (before, tokens) = (self.tokenizer.encode(before, special)?, self.tokenizer.encode(full, special)?);
            Ok(Rendered { prompt_len: if tokens.starts_with(&before) { before.len() } else { 0 }, tokens })
        };
        let mut rendered = match prompt {
            Prompt::Chat(turns) => {
                whole(&self.chat(turns, true)?, &self.chat(&with_turn(turns, answer), false)?, false)?
            }
            Prompt::Raw(text) => whole(text, &format!("{text}{answer}"), true)?,
            Prompt::Tokens(ids) => self.append(ids, answer)?,
        };
        rendered.tokens = self.check_length(filled(rendered.tokens, "prompt")?, self.context, "prompt and answer")?;
        Ok(rendered)
    }

    /// Takes ids given whole, of which the first `prompt_len` are the prompt.
    pub(crate) fn given(&self, ids: &[u32], prompt_len: usize) -> Result<Rendered> {
        let tokens = self.check_length(filled(self.checked(ids)?, "tokens")?, self.context, "tokens")?;
        Ok(Rendered { prompt_len: prompt_len.min(tokens.len()), tokens })
    }

    /// Takes the first `k` ids of an answer's text, without its end-of-turn token: what a forced answer begins with.
    pub(crate) fn forced(&self, prompt: &Prompt, answer: &str, k: usize) -> Result<Vec<u32>> {
        let rendered = self.with_answer(prompt, answer)?;
        let ids = rendered.answer();
        let text = ids.iter().position(|id| self.ends(*id)).map_or(ids, |end| &ids[..end]);
        Ok(text[..k.min(text.len())].to_vec())
    }

    /// Decodes an answer as people and judges read it: special tokens left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true)
    }

    fn chat(&self, turns: &[Message], add_generation_prompt: bool) -> Result<String> {
        let Some(template) = &self.template else {
            let expected = "a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)";
            return Err(Error::file(&self.dir, expected, "use --raw to give the model the text as it stands")("none"));
        };
        if turns.iter().all(|turn| turn.content.trim().is_empty()) {
            return Err(empty("prompt"));
        }
        template.render(turns, add_generation_prompt)
    }

    /// Encodes both texts, the first text's ids first. Encoded in one piece where that keeps the border, since some tokenizers
    /// put a space before every text; else one by one, as the answer would follow the prompt in generation.
    fn join(&self, before: &str, rest: &str, special: bool) -> Result<Rendered> {
        let mut tokens = filled(self.tokenizer.encode(before, special)?, "prompt")?;
        let prompt_len = tokens.len();
        let whole = self.tokenizer.encode(&format!("{before}{rest}"), special)?;
        if whole.starts_with(&tokens) {
            return Ok(Rendered { tokens: whole, prompt_len });
        }
        tokens.extend(self.tokenizer.encode(rest, false)?);
        Ok(Rendered { tokens, prompt_len })
    }

    fn append(&self, ids: &[u32], answer: &str) -> Result<Rendered> {
        let mut tokens = filled(self.checked(ids)?, "prompt")?;
        let prompt_len = tokens.len();
        tokens.extend(self.tokenizer.encode(answer, false)?);
        Ok(Rendered { tokens, prompt_len })
    }

    /// Measures the answer through its last special token, if only blanks follow that; else of all of it.
    fn end_of_turn(&self, answer: &[u32]) -> Result<usize> {
        let Some(last) = answer.iter().rposition(|id| self.ends(*id)) else { return Ok(answer.len()) };
        let after = self.tokenizer.decode(&answer[last + 1..], false)?;
        Ok(if after.trim().is_empty() { last + 1 } else { answer.len() })
    }

    fn ends(&self, id: u32) -> bool {
        self.end_tokens.contains(&id) || self.tokenizer.is_special(id)
    }

    /// Checks ids that are given as they are: each must have a row in the embedding.
    fn checked(&self, ids: &[u32]) -> Result<Vec<u32>> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(ids.to_vec()),
            Some(at) => {
                let expected = format!("an id below {}, the model's vocabulary", self.vocab_size);
                Err(Error::row(&format!("token {at}"), expected, ids[at]))
            }
        }
    }

    fn check_length(&self, tokens: Vec<u32>, limit: usize, what: &str) -> Result<Vec<u32>> {
        if tokens.len() <= limit {
            return Ok(tokens);
        }
        let expected = format!("at most {limit} tokens (the model's context is {})", self.context);
        Err(Error::row(what, expected, format!("{} tokens", tokens.len())))
    }
}

fn with_turn(turns: &[Message], answer: &str) -> Vec<Message> {
    let mut turns = turns.to_vec();
    turns.push(Message { role: "assistant".into(), content: answer.to_string() });
    turns
}

fn filled(tokens: Vec<u32>, what: &str) -> Result<Vec<u32>> {
    if tokens.is_empty() { Err(empty(what)) } else { Ok(tokens) }
}

fn empty(what: &str) -> Error {
    Error::row(what, "text", "none")
}
