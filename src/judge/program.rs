//! `cmd:PROGRAM ARGS`: a judge in a process of its own, in whatever language, asked by lines of JSON.
//!
//! It begins by saying who it is, `{"judge": "name", "version": "1"}`, which is part of a benchmark's identity. Then each question,
//! `{"id": 7, "messages": [{"role": …, "content": …}, …], "response": "…"}`, gets one answer, `{"id": 7, "p_harm": 0.9}` or
//! `{"id": 7, "error": "why"}`, in any order; what it writes to its error stream is passed on. `scripts/judge_endpoint.py` is one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;

use super::{Harm, Judge};
use crate::error::{Error, Result};
use crate::text::Prompt;

/// Questions that wait for their answers at once.
const IN_FLIGHT: usize = 64;
/// Until it says who it is: it may load a model.
const TO_BEGIN: Duration = Duration::from_secs(600);
/// Until the next answer.
const TO_ANSWER: Duration = Duration::from_secs(120);
/// Bytes of an answer.
const LONGEST: u64 = 1 << 20;

pub(crate) struct Program {
    name: String,
    command: String,
    child: Child,
    questions: Sender<String>,
    lines: Receiver<String>,
    /// Of the next question.
    id: u64,
    interrupt: Arc<AtomicBool>,
}

#[derive(Deserialize)]
struct Introduction {
    judge: String,
    #[serde(default)]
    version: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    id: u64,
    p_harm: Option<f64>,
    error: Option<String>,
}

impl Program {
    /// Starts it and waits for its introduction. Fails where it cannot be started, and where it says something else, nothing, or ends.
    pub(crate) fn open(words: &[String], interrupt: Arc<AtomicBool>) -> Result<Program> {
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
        std::thread::spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = Vec::new();
                let read = output.by_ref().take(LONGEST).read_until(b'\n', &mut line);
                let ended = !read.is_ok_and(|n| n > 0);
                if ended || send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
            }
        });
        // On a thread of its own: while a program does not read its questions, whoever asks must still be able to watch the clock. A
        // program that has ended is noticed by its missing answers.
        let (questions, asked) = channel::<String>();
        std::thread::spawn(move || {
            asked.into_iter().try_for_each(|question| writeln!(input, "{question}").and_then(|()| input.flush()))
        });
        let mut judge = Program { name: String::new(), command, child, questions, lines, id: 0, interrupt };
        let line = judge.line(TO_BEGIN, "to say who it is")?;
        let introduced: Introduction = serde_json::from_str(&line)
            .map_err(|_| judge.failed(r#"{"judge": "name", "version": "1"} as its first line"#, &line))?;
        judge.name = format!("cmd:{}@{}", introduced.judge, introduced.version);
        Ok(judge)
    }

    fn failed(&self, expected: &str, found: &str) -> Error {
        Error::Data {
            what: format!("judge cmd:{}", self.command),
            expected: expected.to_string(),
            found: found.trim().chars().take(200).collect(),
            remedy: "correct the program; what was judged before is kept".into(),
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

    /// Takes one answer into its place among those to the questions from `first` on.
    fn answer(&mut self, first: u64, found: &mut [Option<Result<Harm>>], tau_h: f64) -> Result<()> {
        const EXPECTED: &str = r#"{"id": …, "p_harm": …} or {"id": …, "error": …} for each question, once"#;
        let line = self.line(TO_ANSWER, "an answer")?;
        let Ok(Answer { id, p_harm, error }) = serde_json::from_str(&line) else {
            return Err(self.failed(EXPECTED, &line));
        };
        let asked = self.id - first;
        let at = id.checked_sub(first).filter(|at| *at < asked).map(|at| at as usize);
        let Some(place) = at.and_then(|at| found.get_mut(at)).filter(|place| place.is_none()) else {
            return Err(self.failed(EXPECTED, &line));
        };
        *place = Some(match (p_harm, error) {
            (Some(p), None) => Harm::new(p, tau_h),
            (None, Some(error)) => Err(Error::row("judge", "a judgement", error)),
            _ => return Err(self.failed(EXPECTED, &line)),
        });
        Ok(())
    }
}

impl Judge for Program {
    fn name(&self) -> &str {
        &self.name
    }

    fn judge(&mut self, rows: &[(&Prompt, &str)], tau_h: f64) -> Result<Vec<Result<Harm>>> {
        let mut found: Vec<Option<Result<Harm>>> = rows.iter().map(|_| None).collect();
        let (first, mut answered) = (self.id, 0);
        for (prompt, response) in rows {
            let messages = match prompt {
                Prompt::Chat(turns) => json!(turns),
                other => json!([{"role": "user", "content": other.text()}]),
            };
            let question = json!({"id": self.id, "messages": messages, "response": response});
            self.id += 1;
            // The thread has ended only with the program.
            let _ = self.questions.send(question.to_string());
            if self.id - first - answered == IN_FLIGHT as u64 {
                self.answer(first, &mut found, tau_h)?;
                answered += 1;
            }
        }
        while answered < rows.len() as u64 {
            self.answer(first, &mut found, tau_h)?;
            answered += 1;
        }
        let lost = || Err(Error::row("judge", "an answer per row", "fewer"));
        Ok(found.into_iter().map(|harm| harm.unwrap_or_else(lost)).collect())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Killed, it can be waited for in every case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
