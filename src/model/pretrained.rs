//! A checkpoint folder ready for use: transformer, tokenizer and chat template, adapter, and the memory it runs in.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Checkpoint;
use super::adapter::Adapter;
use super::adapter_file::AdapterFile;
use super::batch::{AnswerTokens, Batch, Heads, sharing};
use super::config::ModelConfig;
use super::generate::{Continue, Continued, Generator};
use super::lanes::side_by_side;
use super::subject::{Answer, Ask, Decoding, Version};
use super::transformer::Transformer;
use super::workspace::{Keep, Workspace};
use crate::error::{Error, Result};
use crate::ops::Ops;
use crate::text::Prompt;
use crate::text::rendering::{Rendered, Rendering};
use crate::text::template::Arguments;

/// Sequences generated side by side: one block of the CPU's products.
const SLOTS: usize = 64;

/// `DIR` or `DIR+ADAPTER`, as typed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub struct ModelSpec {
    pub dir: PathBuf,
    pub adapter: Option<PathBuf>,
}

impl ModelSpec {
    /// The folders that it is read from.
    pub(crate) fn places(&self) -> Vec<&Path> {
        [Some(&self.dir), self.adapter.as_ref()].into_iter().flatten().map(PathBuf::as_path).collect()
    }
}

impl FromStr for ModelSpec {
    type Err = String;

    /// A folder whose name holds a `+` is that folder.
    fn from_str(text: &str) -> Result<ModelSpec, String> {
        let whole = ModelSpec { dir: PathBuf::from(text), adapter: None };
        if text.is_empty() {
            return Err("expected a model's folder, found nothing".to_string());
        }
        match text.rsplit_once('+') {
            Some(_) if Path::new(text).is_dir() => Ok(whole),
            None => Ok(whole),
            Some((dir, adapter)) if !dir.is_empty() && !adapter.is_empty() => {
                Ok(ModelSpec { dir: PathBuf::from(dir), adapter: Some(PathBuf::from(adapter)) })
            }
            Some(_) => Err("expected DIR or DIR+ADAPTER".to_string()),
        }
    }
}

impl From<ModelSpec> for String {
    fn from(spec: ModelSpec) -> String {
        let adapter = spec.adapter.map(|adapter| format!("+{}", adapter.display()));
        format!("{}{}", spec.dir.display(), adapter.unwrap_or_default())
    }
}

/// A model that answers, scores, or gives log-probabilities.
pub struct Pretrained<B: Ops> {
    pub transformer: Transformer<B>,
    pub rendering: Rendering,
    /// π_θ or r_φ: the original with its adapter; without one both versions are the original.
    pub adapter: Option<Adapter<B>>,
    pub(crate) dir: PathBuf,
    /// Packed rows of one forward at most, unless a single row is longer.
    batch_tokens: usize,
    /// One for each pass that runs beside the others.
    workspaces: Vec<Workspace<B>>,
    generators: Vec<Generator<B>>,
    interrupt: Arc<AtomicBool>,
}

impl<B: Ops> Pretrained<B> {
    /// Opens a folder and, where the spec names one, its adapter. Once `interrupt` is set, long calls end with
    /// `Error::Interrupted` after the batch they are at.
    pub fn open(ops: &B, spec: &ModelSpec, batch_tokens: usize, interrupt: Arc<AtomicBool>) -> Result<Self> {
        Pretrained::open_with(ops, spec, &Arguments::new(), batch_tokens, interrupt)
    }

    /// [`Pretrained::open`]; the chat template is given `arguments` beside each conversation.
    pub(crate) fn open_with(
        ops: &B,
        spec: &ModelSpec,
        arguments: &Arguments,
        batch_tokens: usize,
        interrupt: Arc<AtomicBool>,
    ) -> Result<Self> {
        let mut config = ModelConfig::open(&spec.dir)?;
        let checkpoint = Checkpoint::open(&spec.dir, &config)?;
        let rendering = Rendering::open_with(&spec.dir, &config.limits(), arguments)?;
        config.eos_token_ids = rendering.end_tokens.clone();
        let transformer = Transformer::load(ops, config, &checkpoint)?;
        let adapter = spec.adapter.as_deref().map(|dir| transformer.open_adapter(dir)).transpose()?;
        Ok(Pretrained {
            transformer,
            rendering,
            adapter,
            dir: spec.dir.clone(),
            batch_tokens,
            workspaces: Vec::new(),
            generators: Vec::new(),
            interrupt,
        })
    }

    /// Its folder's name and a hash of its weights: by content, not by path, since it is part of a benchmark's identity on every machine.
    pub(crate) fn identity(&self) -> Result<String> {
        let hash = Checkpoint::open(&self.dir, &self.transformer.config)?.sha256();
        let folder = self.dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(format!("{folder}@{}", &hash[..12]))
    }

    fn version(&self, version: Version) -> Option<&Adapter<B>> {
        match version {
            Version::Start => None,
            Version::Current => self.adapter.as_ref(),
        }
    }

    /// Frees what the model runs in; weights and adapter stay.
    pub(crate) fn release(&mut self) {
        (self.workspaces, self.generators) = (Vec::new(), Vec::new());
    }

    /// Writes the adapter into the folder `dir`, as PEFT does; nothing, and false, where there is none. Fails where the device
    /// does, where a number is not finite, and where the folder cannot be written.
    pub(crate) fn save_adapter(&self, dir: &Path) -> Result<bool> {
        let Some(adapter) = &self.adapter else { return Ok(false) };
        let base_model_name = Some(self.dir.display().to_string());
        AdapterFile { base_model_name, ..adapter.to_file(&self.transformer.ops)? }.save(dir)?;
        Ok(true)
    }

    /// Memory for `lanes` passes of at least `rows` packed rows each.
    fn take_workspaces(&mut self, lanes: usize, rows: usize) -> Result<Vec<Workspace<B>>> {
        let rank = self.adapter.as_ref().map_or(0, Adapter::rank);
        let Transformer { ops, config, .. } = &self.transformer;
        let mut all = std::mem::take(&mut self.workspaces);
        for ws in all.iter_mut().take(lanes).filter(|ws| ws.capacity < rows || ws.rank != rank) {
            ws.fit(ops, config, rank, rows)?;
        }
        let more = (all.len()..lanes).map(|_| Workspace::new(ops, config, rank, rows, Keep::Nothing));
        all.extend(more.collect::<Result<Vec<_>>>()?);
        Ok(all)
    }

    /// One answer per ask, in order; an inner error is that row's own.
    pub fn generate(&mut self, version: Version, asks: &[Ask], decoding: &Decoding) -> Result<Vec<Result<Answer>>> {
        let context = self.transformer.config.max_position_embeddings;
        let rendering = &self.rendering;
        let requests = requests(rendering, asks, context);
        let good: Vec<Continue> = requests.iter().flatten().cloned().collect();
        let longest = good.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let length = context.min((longest + decoding.max_new_tokens).next_multiple_of(64));
        let most = self.transformer.decoding_lanes(SLOTS);
        let slots = SLOTS / most;
        let mut workspaces = self.take_workspaces(most, longest.max(slots).max(self.batch_tokens / most))?;
        let mut generators = std::mem::take(&mut self.generators);
        let Transformer { ops, config, .. } = &self.transformer;
        if generators.first().is_none_or(|generator| generator.length < length) {
            let make = |ws: &Workspace<B>| Generator::new(ops, config, slots, length, ws.capacity);
            generators = workspaces.iter().map(make).collect::<Result<_>>()?;
        }
        let count = self.transformer.decoding_lanes(good.len());
        let mut lanes: Vec<_> = workspaces.iter_mut().zip(&mut generators).take(count).collect();
        let (adapter, interrupt) = (self.version(version), |_| interrupted(&self.interrupt));
        let answers = self.transformer.generate(&mut lanes, &good, adapter, decoding, interrupt);
        (self.workspaces, self.generators) = (workspaces, generators);
        let text = |Continued { tokens, finish, broken }| {
            if broken {
                return Err(self.logits_not_finite(tokens.len()));
            }
            let text = self.rendering.spoken(self.rendering.decode(&tokens)?, tokens.len())?;
            Ok(Answer { text, tokens, finish })
        };
        Ok(fill(requests, answers?, text))
    }

    fn logits_not_finite(&self, after: usize) -> Error {
        Error::NotFinite {
            what: format!("logits of {} after {after} tokens of the answer", self.dir.display()),
            found: "one that is not".into(),
            remedy: "check the model's weights".into(),
        }
    }

    /// Log-probabilities of each answer's tokens, in order; an inner error is that row's own.
    pub(crate) fn logprobs(&mut self, version: Version, rows: Vec<Result<Rendered>>) -> Result<Vec<Result<Vec<f32>>>> {
        self.packed(version, rows, Heads::Targets, |model, ws, batch, adapter| {
            let rows = model.forward_targets(ws, batch, adapter, false)?.logprob;
            Ok(batch.sequences.iter().map(|range| rows[range.clone()].to_vec()).collect())
        })
    }

    /// Raw scores (one per label) of each row; an inner error is that row's own.
    pub(crate) fn scores(&mut self, version: Version, rows: Vec<Result<Rendered>>) -> Result<Vec<Result<Vec<f32>>>> {
        let labels = self.transformer.config.labels();
        let rows = rows.into_iter().map(|row| row.map(|row| self.rendering.as_read(row))).collect();
        self.packed(version, rows, Heads::Ends, |model, ws, batch, adapter| {
            let scores = model.forward_scores(ws, batch, adapter)?;
            Ok(scores.chunks_exact(labels.max(1)).map(<[f32]>::to_vec).collect())
        })
    }

    /// Runs `rows` packed, at most `batch_tokens` at a time, all lanes together. Neighbours with the same prompt share its rows: their bits do not
    /// depend on it.
    fn packed(
        &mut self,
        version: Version,
        rows: Vec<Result<Rendered>>,
        heads: Heads,
        run: impl Fn(&Transformer<B>, &mut Workspace<B>, &Batch, Option<&Adapter<B>>) -> Result<Vec<Vec<f32>>> + Sync,
    ) -> Result<Vec<Result<Vec<f32>>>> {
        let good: Vec<&Rendered> = rows.iter().flatten().collect();
        let budget = self.batch_tokens.min(good.iter().map(|row| row.tokens.len()).sum());
        let lanes = self.transformer.lanes(budget);
        let limit = budget.div_ceil(lanes);
        let groups = sharing(&good, limit, |row| (prompt(row), row.answer().len()));
        let batches = Batch::pack(&groups, heads, limit, |group| {
            (prompt(group[0]), group.iter().map(|row| AnswerTokens::new(row.answer())).collect())
        });
        let longest = batches.iter().map(|(_, batch)| batch.len()).max().unwrap_or_default();
        let mut workspaces = self.take_workspaces(lanes, longest.max(self.batch_tokens.div_ceil(lanes)))?;
        let (model, adapter, interrupt) = (&self.transformer, self.version(version), &self.interrupt);
        let values = side_by_side(&mut workspaces[..lanes], &batches, |ws, (_, batch)| {
            interrupted(interrupt)?;
            run(model, ws, batch, adapter)
        });
        self.workspaces = workspaces;
        let values = values?.into_iter().flatten().collect();
        Ok(fill(rows, values, Ok))
    }

    /// Reward r(x, y) per row: the first label's score.
    pub fn rewards(&mut self, version: Version, rows: &[(&Prompt, &str)]) -> Result<Vec<Result<f32>>> {
        let rendering = &self.rendering;
        let rendered = rendering.fulls(rows.to_vec());
        let scores = self.scores(version, rendered)?;
        Ok(scores.into_iter().map(|scores| scores.and_then(|scores| self.reward(&scores))).collect())
    }

    /// The one score of a reward model. Fails where it is no number.
    pub(crate) fn reward(&self, scores: &[f32]) -> Result<f32> {
        match scores {
            [score] if score.is_finite() => Ok(*score),
            other => Err(Error::NotFinite {
                what: format!("reward of {}", self.dir.display()),
                found: other.iter().map(f32::to_string).collect::<Vec<_>>().join(", "),
                remedy: "check the reward model's weights".into(),
            }),
        }
    }

    /// (Σ log p, n) per row that was rendered.
    pub fn logprob_sums(
        &mut self,
        version: Version,
        rendered: Vec<Result<Rendered>>,
    ) -> Result<Vec<Result<(f64, usize)>>> {
        let sum = |l: Vec<f32>| (l.iter().map(|&l| f64::from(l)).sum(), l.len());
        Ok(self.logprobs(version, rendered)?.into_iter().map(|logprobs| logprobs.map(sum)).collect())
    }
}

/// What the policy goes on from: each prompt, and the tokens that its answer is forced to begin with.
fn requests(rendering: &Rendering, asks: &[Ask], context: usize) -> Vec<Result<Continue>> {
    let prompts = rendering.prompts(asks.iter().map(|ask| &ask.prompt).collect());
    let forced = asks.iter().filter_map(|ask| Some((&ask.prompt, ask.forced.as_ref()?.0.as_str()))).collect();
    let mut forced = rendering.with_answers(forced).into_iter();
    let request = |(ask, prompt): (&Ask, Result<Vec<u32>>)| {
        let answer = ask.forced.as_ref().and_then(|(_, k)| Some((forced.next()?, *k)));
        let mut tokens = prompt?;
        let before = tokens.len();
        if let Some((answer, k)) = answer {
            tokens.extend(rendering.forced(&answer?, k));
        }
        if tokens.len() >= context {
            let expected = format!("fewer than {context} tokens (the model's context)");
            return Err(Error::row("prompt with forced answer", expected, tokens.len()));
        }
        Ok(Continue { forced: tokens.len() - before, tokens, id: ask.id })
    };
    asks.iter().zip(prompts).map(request).collect()
}

/// Fails once the user asked to stop.
fn interrupted(flag: &AtomicBool) -> Result<()> {
    if flag.load(Ordering::Relaxed) { Err(Error::Interrupted(String::new())) } else { Ok(()) }
}

fn prompt(row: &Rendered) -> &[u32] {
    &row.tokens[..row.prompt_len]
}

/// Puts the results of the good rows into their places.
pub(crate) fn fill<T, V, R>(rows: Vec<Result<T>>, values: Vec<V>, finish: impl Fn(V) -> Result<R>) -> Vec<Result<R>> {
    let lost = || Error::Shape { op: "batch", expected: "a result per row".into(), found: "fewer".into() };
    let mut values = values.into_iter();
    rows.into_iter().map(|row| row.and_then(|_| finish(values.next().ok_or_else(lost)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_return_to_the_places_of_their_rows_and_a_lost_one_is_an_error() {
        let rows = vec![Ok(1), Err(Error::Usage("bad".into())), Ok(3), Ok(4)];
        let found: Vec<Option<i32>> = fill(rows, vec![10, 30], Ok).into_iter().map(Result::ok).collect();
        assert_eq!(found, [Some(10), None, Some(30), None]);
    }
}
