//! A program that is asked by lines of JSON, in a process of its own, in whatever language: a judge or an attacker.
//!
//! It begins by saying who it is, `{"judge": "name", "version": "1"}` (or `"attacker"`), which is part of a benchmark's identity. Then each
//! question, an object with an `id`, gets one answer with the same `id`, in any order; `{"id": 7, "error": "why"}` where there is none.
//! What it writes to its error stream is passed on.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result, start_thread};

/// Questions that wait for their answers at once.
const IN_FLIGHT: usize = 64;
/// Until it says who it is: it may load a model.
const TO_BEGIN: Duration = Duration::from_secs(600);
/// Until the next answer.
const TO_ANSWER: Duration = Duration::from_secs(120);
/// Bytes of an answer.
const LONGEST: u64 = 1 << 20;

pub(crate) struct Dialogue {
    /// `judge` or `attacker`.
    role: &'static str,
    name: String,
    command: String,
    child: Child,
    questions: Sender<String>,
    lines: Receiver<String>,
    /// Of the next question.
    id: u64,
    interrupt: Arc<AtomicBool>,
}

impl Dialogue {
    /// Starts it and waits for its introduction. Fails where it cannot be started, and where it says something else, nothing, or ends.
    pub(crate) fn open(role: &'static str, words: &[String], interrupt: Arc<AtomicBool>) -> Result<Dialogue> {
        let command = words.join(" ");
        let (program, arguments) = words.split_first().ok_or_else(|| Error::Usage("cmd: expected a program".into()))?;
        let mut child = Command::new(program)
            .args(arguments)
            // Ctrl-C is for the program that asks: it finishes what is in progress.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Error::start(Path::new(program)))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Usage(format!("cmd:{command}: no pipes to it")));
        };
        let (send, lines) = sync_channel(4 * IN_FLIGHT);
        start_thread(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = Vec::new();
                let read = output.by_ref().take(LONGEST).read_until(b'\n', &mut line);
                let ended = !read.is_ok_and(|n| n > 0);
                if ended || send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
            }
        })?;
        // On a thread of its own: while a program does not read its questions, whoever asks must still be able to watch the clock. A
        // program that has ended is noticed by its missing answers.
        let (questions, asked) = channel::<String>();
        start_thread(move || {
            asked.into_iter().try_for_each(|question| writeln!(input, "{question}").and_then(|()| input.flush()))
        })?;
        let mut opened = Dialogue { role, name: String::new(), command, child, questions, lines, id: 0, interrupt };
        let line = opened.line(TO_BEGIN, "to say who it is")?;
        let introduced = serde_json::from_str::<Map<String, Value>>(&line).ok();
        let text = |key| introduced.as_ref()?.get(key)?.as_str();
        let Some(name) = text(role) else {
            let expected = format!(r#"{{"{role}": "name", "version": "1"}} as its first line"#);
            return Err(opened.failed(&expected, &line));
        };
        opened.name = format!("cmd:{name}@{}", text("version").unwrap_or_default());
        Ok(opened)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, expected: &str, found: &str) -> Error {
        Error::Data {
            what: format!("{} cmd:{}", self.role, self.command),
            expected: expected.to_string(),
            found: found.trim().chars().take(200).collect(),
            remedy: "correct the program; what was found before is kept".into(),
        }
    }

    /// The next line. Fails where none comes in time.
    fn line(&mut self, limit: Duration, what: &str) -> Result<String> {
        let begin = Instant::now();
        loop {
            match self.lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                    return Err(self.failed(what, &format!("its end ({ended})")));
                }
                Err(RecvTimeoutError::Timeout) if self.interrupt.load(Ordering::Relaxed) => {
                    return Err(Error::Interrupted(String::new()));
                }
                Err(RecvTimeoutError::Timeout) if begin.elapsed() > limit => {
                    return Err(self.failed(what, &format!("nothing for {} s", limit.as_secs())));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Asks every question, an object, at most so many at once as may wait, and returns what was answered in their order; an inner error is that
    /// question's own. `shape` shows an answer's fields. Fails where the program does not keep to them, and where no answer comes in time.
    pub(crate) fn ask<T: DeserializeOwned>(
        &mut self,
        questions: impl ExactSizeIterator<Item = Value>,
        shape: &str,
    ) -> Result<Vec<Result<T>>> {
        let mut found: Vec<Option<Result<T>>> = (0..questions.len()).map(|_| None).collect();
        let (first, mut answered) = (self.id, 0);
        for mut question in questions {
            question["id"] = self.id.into();
            self.id += 1;
            // The thread has ended only with the program.
            let _ = self.questions.send(question.to_string());
            if self.id - first - answered == IN_FLIGHT as u64 {
                self.answer(first, &mut found, shape)?;
                answered += 1;
            }
        }
        while answered < found.len() as u64 {
            self.answer(first, &mut found, shape)?;
            answered += 1;
        }
        let lost = || Err(Error::row(self.role, "an answer per question", "fewer"));
        Ok(found.into_iter().map(|answer| answer.unwrap_or_else(lost)).collect())
    }

    /// Takes one answer into its place among those to the questions from `first` on.
    fn answer<T: DeserializeOwned>(&mut self, first: u64, found: &mut [Option<Result<T>>], shape: &str) -> Result<()> {
        let line = self.line(TO_ANSWER, "an answer")?;
        let wrong = || {
            let expected = format!(r#"{{"id": …, {shape}}} or {{"id": …, "error": …}} for each question, once"#);
            self.failed(&expected, &line)
        };
        let mut answer: Map<String, Value> = serde_json::from_str(&line).map_err(|_| wrong())?;
        answer.retain(|_, value| !value.is_null());
        let id = answer.remove("id").and_then(|id| id.as_u64());
        let at = id.and_then(|id| id.checked_sub(first)).filter(|at| *at < self.id - first).map(|at| at as usize);
        let place = at.and_then(|at| found.get_mut(at)).filter(|place| place.is_none()).ok_or_else(wrong)?;
        *place = Some(match answer.remove("error") {
            Some(Value::String(error)) if answer.is_empty() => Err(Error::row(self.role, "an answer", error)),
            Some(_) => return Err(wrong()),
            None => Ok(serde_json::from_value(answer.into()).map_err(|_| wrong())?),
        });
        Ok(())
    }
}

impl Drop for Dialogue {
    fn drop(&mut self) {
        // Killed, it can be waited for in every case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
