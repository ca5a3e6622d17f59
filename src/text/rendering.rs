//! From a prompt and an answer to the ids that a model reads: chat template and tokenizer together, with the model's limits.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::text::fields::Fields;
use crate::text::specials::Specials;
use crate::text::template::{Arguments, Conversation, Template};
use crate::text::tokenizer::Tokenizer;
use crate::text::{Message, Prompt};

#[cfg(test)]
mod tests;

/// More than any tokenizer makes one token of, but where it drops most of a text.
const BYTES_PER_TOKEN: usize = 64;
/// Up to here no text is refused for its bytes.
const LEAST_BYTES: usize = 1 << 20;

/// Rows about which the template is asked at once.
const TOGETHER: usize = 64;

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
    /// A classifier is read at its last token that is not this one.
    pub pad: Option<u32>,
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
    /// See [`IdLimits::pad`].
    pub(crate) pad: Option<u32>,
    /// What ends a text, where the tokenizer or the model names it.
    eos: Option<u32>,
    /// What [`Rendering::fulls`] puts behind raw text.
    appended: Option<u32>,
}

impl Rendering {
    /// Opens tokenizer and chat template (a model without one still reads raw text) of the model in `dir`. Fails on files that
    /// are damaged, or that do not belong to a model with these `limits`.
    pub fn open(dir: &Path, limits: &IdLimits) -> Result<Rendering> {
        Rendering::open_with(dir, limits, &Arguments::new())
    }

    /// [`Rendering::open`]; the chat template is given `arguments` beside each conversation, and what the model's own
    /// generation_config.json has under `chat_template_kwargs` where these do not name it.
    pub(crate) fn open_with(dir: &Path, limits: &IdLimits, arguments: &Arguments) -> Result<Rendering> {
        let arguments = &Arguments::from_iter(own_arguments(dir)?.into_iter().chain(arguments.clone()));
        let specials = Specials::open(dir)?;
        let tokenizer = Tokenizer::open(dir, &specials)?;
        tokenizer.check(limits.vocab_size, limits.tokenizer_sha256)?;
        let named = specials.named.get("eos_token").and_then(|text| tokenizer.token_to_id(text));
        let template = Template::open(dir, specials.named, arguments)?;
        let eos = named.or(limits.eos_token_ids.first().copied());
        let named = named.filter(|_| template.is_some());
        let mut end_tokens = limits.eos_token_ids.to_vec();
        end_tokens.extend(named.filter(|id| !limits.eos_token_ids.contains(id)));
        let IdLimits { vocab_size, context, pad, .. } = *limits;
        let dir = dir.to_path_buf();
        Ok(Rendering { dir, tokenizer, template, vocab_size, context, end_tokens, pad, eos, appended: None })
    }

    /// From now on [`Rendering::full`] ends raw text with the token that ends a turn, where it does not end so already: trainers of
    /// reward models put it there. Fails where the model names none.
    pub fn append_eos(&mut self) -> Result<()> {
        let missing = || {
            let remedy = "leave --append out, or name the token in tokenizer_config.json";
            Error::file(&self.dir, "an eos_token, or an eos_token_id in config.json", remedy)("none")
        };
        self.appended = Some(self.eos.ok_or_else(missing)?);
        Ok(())
    }

    /// Leaves off what a classifier does not look at: it is read at its last token that is no padding, and no token sees a later one.
    pub(crate) fn as_read(&self, mut rendered: Rendered) -> Rendered {
        if let Some(last) = rendered.tokens.iter().rposition(|id| Some(*id) != self.pad) {
            rendered.tokens.truncate(last + 1);
        } else {
            rendered.tokens.truncate(1); // as transformers has it, where all of it is padding
        }
        rendered.prompt_len = rendered.prompt_len.min(rendered.tokens.len());
        rendered
    }

    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders what the model answers to. Never empty; leaves room for one more id at least.
    pub(crate) fn prompt_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        only(self.prompts(vec![prompt]))
    }

    /// Renders the prompt, and its answer through the end-of-turn token; what the template puts after that token (ChatML's
    /// newline) is left out. For log-probabilities and training. Raw text has no end of turn of its own.
    pub fn with_answer(&self, prompt: &Prompt, answer: &str) -> Result<Rendered> {
        only(self.with_answers(vec![(prompt, answer)]))
    }

    /// Renders the whole exchange, up to the token at which a reward model or judge reads it. `prompt_len` is 0 where the ids of
    /// the prompt are not its beginning.
    pub fn full(&self, prompt: &Prompt, answer: &str) -> Result<Rendered> {
        only(self.fulls(vec![(prompt, answer)]))
    }

    /// [`Rendering::prompt_tokens`] of many.
    pub(crate) fn prompts(&self, prompts: Vec<&Prompt>) -> Vec<Result<Vec<u32>>> {
        self.together(prompts, &|prompt| Some([(chat(prompt)?.into(), true)]), &|prompt, texts| {
            let tokens = match (prompt, texts) {
                (_, Some(texts)) => self.encode(&texts?[0], false)?,
                (Prompt::Tokens(ids), None) => self.checked(ids.to_vec())?,
                (other, None) => self.encode(other.text(), true)?,
            };
            self.check_length(filled(tokens, "prompt")?, self.context - 1, "prompt")
        })
    }

    /// [`Rendering::with_answer`] of many.
    pub(crate) fn with_answers<'a>(&self, rows: Vec<(&'a Prompt, &'a str)>) -> Vec<Result<Rendered>> {
        self.together(rows, &answered, &|(prompt, answer), texts| {
            let mut rendered = match (prompt, texts) {
                (_, Some(texts)) => {
                    let [before, full] = texts?;
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
                (Prompt::Tokens(ids), None) => self.append(ids, answer)?,
                (other, None) => self.join(other.text(), answer, true)?,
            };
            if rendered.answer().is_empty() {
                return Err(empty("answer"));
            }
            rendered.tokens = self.check_length(rendered.tokens, self.context, "prompt and answer")?;
            Ok(rendered)
        })
    }

    /// [`Rendering::full`] of many.
    pub(crate) fn fulls<'a>(&self, rows: Vec<(&'a Prompt, &'a str)>) -> Vec<Result<Rendered>> {
        let whole = |before: &str, full: &str, special| {
            let (before, tokens) = (self.encode(before, special)?, self.encode(full, special)?);
            Ok(Rendered { prompt_len: if tokens.starts_with(&before) { before.len() } else { 0 }, tokens })
        };
        self.together(rows, &answered, &|(prompt, answer), texts| {
            let mut rendered = match (prompt, texts) {
                (_, Some(texts)) => {
                    let [before, full] = texts?;
                    whole(&before, &full, false)?
                }
                (Prompt::Tokens(ids), None) => self.append(ids, answer)?,
                (other, None) => {
                    let mut rendered = whole(other.text(), &format!("{}{answer}", other.text()), true)?;
                    rendered.tokens.extend(self.appended.filter(|eos| rendered.tokens.last() != Some(eos)));
                    rendered
                }
            };
            rendered.tokens =
                self.check_length(filled(rendered.tokens, "prompt")?, self.context, "prompt and answer")?;
            Ok(self.as_read(rendered))
        })
    }

    /// Renders conversations as they are, with the beginning of a next turn when `generation_prompt`.
    pub(crate) fn conversations(&self, rows: Vec<Vec<Message>>, generation_prompt: bool) -> Vec<Result<String>> {
        let text = |_, texts: Option<Result<[String; 1]>>| {
            let [text] = texts.unwrap_or_else(|| Err(empty("conversation")))?;
            Ok(text)
        };
        self.together(rows, &|turns| Some([(turns.clone().into(), generation_prompt)]), &text)
    }

    /// The chat template as it was written; empty where there is none.
    pub(crate) fn template_text(&self) -> &str {
        self.template.as_ref().map_or("", Template::text)
    }

    /// Takes ids given whole, of which the first `prompt_len` are the prompt.
    pub(crate) fn given(&self, ids: &[u32], prompt_len: usize) -> Result<Rendered> {
        let tokens = self.check_length(filled(self.checked(ids.to_vec())?, "tokens")?, self.context, "tokens")?;
        Ok(Rendered { prompt_len: prompt_len.min(tokens.len()), tokens })
    }

    /// Takes the first `k` ids of a rendered answer's text, without its end-of-turn token: what a forced answer begins with.
    pub(crate) fn forced<'a>(&self, rendered: &'a Rendered, k: usize) -> &'a [u32] {
        let ids = rendered.answer();
        let text = ids.iter().position(|id| self.ends(*id)).map_or(ids, |end| &ids[..end]);
        &text[..k.min(text.len())]
    }

    /// Decodes an answer as people and judges read it: special tokens left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true)
    }

    /// What stands behind the thought with which the answers of some models begin; `tokens` is how long the answer is, for the error
    /// where the thought does not end. Only of models whose template knows thoughts.
    pub(crate) fn spoken(&self, answer: String, tokens: usize) -> Result<String> {
        if !self.thinks() {
            return Ok(answer);
        }
        match answer.rsplit_once("</think>") {
            Some((_, spoken)) => Ok(spoken.trim_start().to_string()),
            None if answer.trim_start().starts_with("<think>") => {
                let expected = "an answer behind the thought: more tokens, or --template-arg enable_thinking=false";
                Err(Error::row("answer", expected, format!("a thought of {tokens} tokens without end")))
            }
            None => Ok(answer),
        }
    }

    /// Whether the model was trained to think aloud before it answers.
    pub(crate) fn thinks(&self) -> bool {
        self.template_text().contains("</think>")
    }

    /// Gives each row to `finish`, those that are conversations with what the template makes of them. It is asked about many rows at
    /// a time: asking costs more than its work.
    fn together<'a, R: Send, T: Send, const N: usize>(
        &self,
        rows: Vec<R>,
        conversations: &(dyn Fn(&R) -> Option<[Conversation<'a>; N]> + Sync),
        finish: &(dyn Fn(R, Option<Result<[String; N]>>) -> Result<T> + Sync),
    ) -> Vec<Result<T>> {
        let finish_all = |rows: Vec<R>| {
            let chats: Vec<Option<[Conversation; N]>> = rows.iter().map(conversations).collect();
            let mut texts = self.chats(chats.iter().flatten().map(|chat| chat.as_slice()).collect()).into_iter();
            let lost = || Error::row("chat template", "a text per conversation", "fewer");
            let mut next = || texts.next().unwrap_or_else(|| Err(lost()))?.try_into().map_err(|_| lost());
            let texts: Vec<_> = chats.iter().map(|chat| chat.as_ref().map(|_| next())).collect();
            rows.into_iter().zip(texts).map(|(row, texts)| finish(row, texts)).collect::<Vec<_>>()
        };
        rows.into_par_iter().chunks(TOGETHER).flat_map_iter(finish_all).collect()
    }

    /// Renders conversations, one row's in each of `rows`.
    fn chats(&self, rows: Vec<&[Conversation]>) -> Vec<Result<Vec<String>>> {
        let blank = |row: &&[Conversation]| row[0].0.iter().all(|turn| turn.content.trim().is_empty());
        let Some(template) = &self.template else {
            let expected = "a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)";
            let missing =
                || Error::file(&self.dir, expected, "use --raw to give the model the text as it stands")("none");
            return rows.iter().map(|_| Err(missing())).collect();
        };
        let (spoken, blanks): (Vec<_>, Vec<_>) =
            (rows.iter().copied().filter(|row| !blank(row)).collect(), rows.iter().map(blank).collect());
        let mut rendered = template.render(&spoken).into_iter();
        let next = |blank: bool| if blank { None } else { rendered.next() };
        blanks.into_iter().map(next).map(|texts| texts.unwrap_or_else(|| Err(empty("prompt")))).collect()
    }

    /// Encodes both texts, the first text's ids first. Encoded in one piece where that keeps the border, since some tokenizers
    /// put a space before every text; else one by one, as the answer would follow the prompt in generation.
    fn join(&self, before: &str, rest: &str, special: bool) -> Result<Rendered> {
        let mut tokens = filled(self.encode(before, special)?, "prompt")?;
        let prompt_len = tokens.len();
        let whole = self.encode(&format!("{before}{rest}"), special)?;
        if whole.starts_with(&tokens) {
            return Ok(Rendered { tokens: whole, prompt_len });
        }
        tokens.extend(self.encode(rest, false)?);
        Ok(Rendered { tokens, prompt_len })
    }

    fn append(&self, ids: &[u32], answer: &str) -> Result<Rendered> {
        let mut tokens = filled(self.checked(ids.to_vec())?, "prompt")?;
        let prompt_len = tokens.len();
        tokens.extend(self.encode(answer, false)?);
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

    /// Tokenises a text, alone or with what the tokenizer puts around every text. One that is far too long for the context is
    /// refused before it costs minutes.
    pub(crate) fn encode(&self, text: &str, around: bool) -> Result<Vec<u32>> {
        let most = (self.context * BYTES_PER_TOKEN).max(LEAST_BYTES);
        if text.len() > most {
            let expected = format!("at most {most} bytes for the model's context of {} tokens", self.context);
            return Err(Error::row("text", expected, format!("{} bytes", text.len())));
        }
        // What a tokenizer puts around a text need not be of its vocabulary.
        self.checked(self.tokenizer.encode(text, around)?)
    }

    /// Fails unless each id has a row in the embedding.
    fn checked(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(ids),
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

/// The turns of a conversation.
fn chat(prompt: &Prompt) -> Option<&[Message]> {
    if let Prompt::Chat(turns) = prompt { Some(turns) } else { None }
}

/// What the model answers to, and the same with the answer.
fn answered<'a>(&(prompt, answer): &(&'a Prompt, &'a str)) -> Option<[Conversation<'a>; 2]> {
    let turns = chat(prompt)?;
    let mut with_answer = turns.to_vec();
    with_answer.push(Message { role: "assistant".into(), content: answer.to_string() });
    Some([(turns.into(), true), (with_answer.into(), false)])
}

/// What the model's maker gives its chat template.
fn own_arguments(dir: &Path) -> Result<Arguments> {
    let file = dir.join("generation_config.json");
    if !file.exists() {
        return Ok(Arguments::new());
    }
    let fields = Fields::open(&file)?;
    let object = fields.object("chat_template_kwargs")?;
    let own = |(name, value): (&String, &serde_json::Value)| (name.clone(), value.clone());
    Ok(object.iter().flat_map(|object| object.iter()).map(own).collect())
}

fn only<T>(mut rows: Vec<Result<T>>) -> Result<T> {
    rows.pop().unwrap_or_else(|| Err(empty("row")))
}

fn filled(tokens: Vec<u32>, what: &str) -> Result<Vec<u32>> {
    if tokens.is_empty() { Err(empty(what)) } else { Ok(tokens) }
}

fn empty(what: &str) -> Error {
    Error::row(what, "text", "none")
}
