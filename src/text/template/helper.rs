//! The process apart in which templates run: this program once more, under another name. Fuel does not count everything that a
//! template can use up, so what it may take is set for that process as a whole, and its end is one row's error.
//!
//! Both sides speak JSON, a line a message: the source and whether it compiled, then rows of conversations and what came of each.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::engine::Engine;
use super::{Conversation, Reply, Source};
use crate::error::{Error, Result};

/// The name by which `main` knows that it is the helper.
const NAME: &str = "ares-chat-template";
/// This program; on Linux the file that is running, also when another has taken its path since.
const PROGRAM: &str = "/proc/self/exe";
/// Address space: the program and its data, and what a rendering may take.
const MEMORY: u64 = 1 << 30;
/// Of computing, per message, in milliseconds: real templates take a few for all the rows of one. A template that has passed it is
/// given half as much the next time, down to the last.
const PATIENCE: u32 = 2000;
const LEAST_PATIENCE: u32 = 250;
/// A helper that has ended is started anew, but not more often: a row may be to blame, and with it those beside it are asked about
/// again, but not every row.
const STARTS: usize = 16;

static AVAILABLE: AtomicBool = AtomicBool::new(false);

/// Becomes the helper if this process was started as one, and then does not return; else lets this process start helpers.
/// For `main`, before all else.
pub fn isolate_templates() {
    if std::env::args_os().next().is_some_and(|name| name == NAME) {
        std::process::exit(if serve().is_ok() { 0 } else { 1 });
    }
    AVAILABLE.store(std::path::Path::new(PROGRAM).exists(), Ordering::Relaxed);
}

/// The helper's life: one source, then conversations until nobody asks any more.
fn serve() -> std::io::Result<()> {
    confine();
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut line = String::new();
    let mut next = |line: &mut String| {
        line.clear();
        input.read_line(line)
    };
    next(&mut line)?;
    let patience = std::env::args().nth(1).and_then(|patience| patience.parse().ok()).unwrap_or(PATIENCE);
    let engine = within(patience, || Engine::compile(&serde_json::from_str(&line).map_err(|error| error.to_string())?));
    write(&mut output, &engine.as_ref().map(|_| ()))?;
    let Ok(engine) = engine else { return Ok(()) };
    while next(&mut line)? > 0 {
        let rendered = within(patience, || {
            let rows: Vec<Vec<Conversation>> = serde_json::from_str(&line).map_err(|error| error.to_string())?;
            Ok::<_, String>(engine.render(&rows))
        });
        write(&mut output, &rendered)?;
    }
    Ok(())
}

fn write(output: &mut impl Write, message: &impl Serialize) -> std::io::Result<()> {
    // At once: unbuffered, every comma would be a call of its own.
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    output.write_all(&line)?;
    output.flush()
}

/// Sets what this process may take, and leaves Ctrl-C to the one that started it.
fn confine() {
    let limit = |resource, most| {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the call reads one `rlimit`.
        unsafe { libc::setrlimit(resource, &limit) };
    };
    limit(libc::RLIMIT_AS, MEMORY);
    limit(libc::RLIMIT_CORE, 0);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: no handler of ours is set, the signal is only ignored.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Ends this process by SIGPROF unless `work` is done within so many milliseconds of computing.
fn within<T>(milliseconds: u32, work: impl FnOnce() -> T) -> T {
    let set = |milliseconds: u32| {
        let time = |ms: u32| libc::timeval { tv_sec: (ms / 1000).into(), tv_usec: (ms % 1000 * 1000).into() };
        let timer = libc::itimerval { it_interval: time(0), it_value: time(milliseconds) };
        // SAFETY: the call reads one `itimerval`; where the old one would go is null.
        unsafe { libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut()) };
    };
    set(milliseconds);
    let done = work();
    set(0);
    done
}

/// What came of starting one.
pub(super) enum Started {
    /// This process cannot start helpers.
    Unavailable(Source),
    /// The source does not compile.
    Refused(String),
    Ready(Helper),
}

/// One template's process, started anew after a row that has ended it.
pub(super) struct Helper {
    source: Source,
    state: Mutex<State>,
}

struct State {
    running: Option<Running>,
    starts: usize,
    /// Of the next process, in milliseconds.
    patience: u32,
}

struct Running {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    patience: u32,
}

impl Helper {
    /// Fails if no process can be started.
    pub(super) fn start(source: Source) -> Result<Started> {
        if !AVAILABLE.load(Ordering::Relaxed) {
            return Ok(Started::Unavailable(source));
        }
        Ok(match Running::start(&source, PATIENCE)? {
            Ok(running) => {
                let state = Mutex::new(State { running: Some(running), starts: 1, patience: PATIENCE });
                Started::Ready(Helper { source, state })
            }
            Err(why) => Started::Refused(why),
        })
    }

    /// Row by row where one of them has ended the process: the others are not to blame.
    pub(super) fn render(&self, rows: &[&[Conversation]]) -> Vec<Reply<Vec<String>>> {
        match self.ask(rows) {
            Ok(replies) if replies.len() == rows.len() => replies,
            Ok(replies) => vec![Err(format!("{} replies from its process", replies.len())); rows.len()],
            Err(why) if rows.len() == 1 => vec![Err(why)],
            Err(_) => rows.iter().flat_map(|row| self.render(&[row])).collect(),
        }
    }

    fn ask(&self, rows: &[&[Conversation]]) -> Reply<Vec<Reply<Vec<String>>>> {
        // A thread that panicked here may have left half a message: it has taken that process with it.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = match state.running.take() {
            Some(running) => running,
            None if state.starts == STARTS => {
                return Err(format!("a process that ended {STARTS} times: no other is started"));
            }
            None => {
                state.starts += 1;
                Running::start(&self.source, state.patience).map_err(|error| error.to_string())??
            }
        };
        match running.ask(rows) {
            Ok(reply) => {
                state.running = Some(running);
                reply
            }
            Err(_) => {
                let (why, too_long) = running.end();
                if too_long {
                    state.patience = (state.patience / 2).max(LEAST_PATIENCE);
                }
                Err(why)
            }
        }
    }
}

impl Running {
    /// The inner error says why the source does not compile.
    fn start(source: &Source, patience: u32) -> Result<Reply<Running>> {
        let mut command = Command::new(PROGRAM);
        command
            .arg0(NAME)
            .arg(patience.to_string())
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(Error::start(PROGRAM.as_ref()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Ok(Err("no pipes to its process".into()));
        };
        let mut running = Running { child, input, output: BufReader::new(output), patience };
        Ok(match running.ask::<()>(source) {
            Ok(Ok(())) => Ok(running),
            Ok(Err(why)) => Err(why),
            Err(_) => Err(running.end().0),
        })
    }

    /// Fails when the process has ended.
    fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        message: &(impl Serialize + ?Sized),
    ) -> std::io::Result<Reply<T>> {
        write(&mut self.input, &message)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Says how it ended, and whether because it took too long.
    fn end(mut self) -> (String, bool) {
        match self.child.wait().ok().and_then(|status| status.signal()) {
            Some(libc::SIGPROF) => (format!("more than {} s of computing", f64::from(self.patience) / 1000.0), true),
            _ => (format!("more memory than {} MiB, or deeper nesting than fits it", MEMORY >> 20), false),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It is idle, dead, or about to find its input closed; killed, it can be waited for in every case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
