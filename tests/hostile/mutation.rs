//! Thousands of damaged files, each given to a process of its own with bounds on time and memory. The program may refuse them, or
//! accept them and then give whole, finite results; all else fails the test.
//!
//! `ARES_HOSTILE=100000` tries so many, from the input that `ARES_HOSTILE_FROM=89147` names; `ARES_HOSTILE_SEED=7` others,
//! `ARES_HOSTILE_ONLY=Journal` those of one format; `--nocapture` shows the counts of each. In `ARES_HOSTILE_KEEP=DIR` the models that
//! were accepted stay, for `scripts/hostile_check.py`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::formats::{Format, ROWS, Right, SHARES, format_of};
use super::mutator::Mutator;
use crate::cli::support::{Folder, command};

const INPUTS: usize = 2000;
/// Of computing. The slowest that is accepted takes a tenth; a template may take 2 s in a process of its own, then less.
const SECONDS: u64 = 5;
/// From start to end, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(120);
const MEMORY: u64 = 6 << 30;

/// What the program did with one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Refused,
    Accepted,
    Panic,
    Abort,
    Hang,
    Wrong,
}

impl Ending {
    fn is_fine(self) -> bool {
        matches!(self, Ending::Refused | Ending::Accepted)
    }
}

/// Runs one command within bounds; returns how it ended, and what it wrote to either stream.
fn ending(line: &str, gives_rows: bool, rows: Option<usize>) -> (Ending, String, String) {
    let mut command = command(line);
    command.stdin(Stdio::null());
    let bounds = [(libc::RLIMIT_CPU, SECONDS), (libc::RLIMIT_AS, MEMORY), (libc::RLIMIT_CORE, 0)];
    // SAFETY: between fork and exec only `setrlimit` is called, which may be.
    unsafe {
        command.pre_exec(move || {
            for (resource, most) in bounds {
                libc::setrlimit(resource, &libc::rlimit { rlim_cur: most, rlim_max: most });
            }
            Ok(())
        });
    }
    let (begin, mut child) = (Instant::now(), command.spawn().unwrap());
    // Read while it runs: a full pipe would make it wait.
    let (out, err) = (read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap()));
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if begin.elapsed() > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let (out, err) = (out.join().unwrap(), err.join().unwrap());
    let fault = err.contains("a fault in ares") || err.contains("fault of ares") || err.contains("panicked");
    let ending = match status {
        None => Ending::Hang,
        Some(status) if matches!(status.signal(), Some(libc::SIGXCPU | libc::SIGKILL)) => Ending::Hang,
        Some(_) if fault => Ending::Panic,
        Some(status) if status.signal().is_some() => Ending::Abort,
        Some(status) if status.code() == Some(0) => match gives_rows {
            true if !whole(&out, rows) => Ending::Wrong,
            _ => Ending::Accepted,
        },
        // A refusal says what is wrong.
        Some(_) if err.contains("error: ") && err.trim().len() > 20 => Ending::Refused,
        Some(_) => Ending::Wrong,
    };
    (ending, out, err)
}

/// Copies the input to where it can be looked at, with what was typed and what came out.
fn keep(folder: &Folder, place: &Path, format: Format, line: &str, out: &str) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let to = place.join(format!("{format:?}-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(to.join("adapter")).unwrap();
    for name in [".", "adapter"] {
        for entry in fs::read_dir(folder.at(name)).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), to.join(name).join(entry.file_name())).unwrap();
        }
    }
    fs::write(to.join("line"), line).unwrap();
    fs::write(to.join("out.jsonl"), out).unwrap();
}

fn read(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Whether each line is a row with a finite number or an error, and, where that is known, there are as many as were asked for.
fn whole(out: &str, rows: Option<usize>) -> bool {
    let good = |line: &str| {
        let Ok(row) = serde_json::from_str::<Value>(line) else { return false };
        let number = ["reward", "p_harm"].iter().any(|key| row[key].as_f64().is_some_and(f64::is_finite));
        number != row["error"].is_string()
    };
    out.lines().all(good) && rows.is_none_or(|rows| out.lines().count() == rows)
}

/// What came of one input.
fn attempt(right: &Right, format: Format, mut mutator: Mutator) -> (Ending, String) {
    let folder = Folder::new();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        fs::copy(right.reward.at(name), folder.at(name)).unwrap();
    }
    fs::create_dir(folder.at("adapter")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = format!("tests/golden/llama-reward/adapter/{name}");
        fs::copy(from, folder.at(&format!("adapter/{name}"))).unwrap();
    }
    folder.write("rows.jsonl", ROWS);
    let line = right.damage(format, &mut mutator, &folder);
    let gives_rows = line.starts_with("score") || line.starts_with("judge");
    let rows = (!matches!(format, Format::Rows | Format::Csv)).then(|| ROWS.lines().count());
    let (ending, out, err) = ending(&line, gives_rows, rows);
    if let Some(place) =
        std::env::var_os("ARES_HOSTILE_KEEP").filter(|_| ending == Ending::Accepted && line.starts_with("score"))
    {
        keep(&folder, &PathBuf::from(place), format, &line, &out);
    }
    (ending, format!("ares {line}\n{err}\n{out}"))
}

/// Else nothing would be known of damage: the experiment alone names models that are not there.
#[test]
fn undamaged_files_are_read() {
    let right = Right::new();
    for (format, _) in SHARES {
        // Each of the tokenizers.
        for _ in 0..4 {
            let (ending, said) = attempt(&right, *format, Mutator::idle());
            match format {
                Format::Experiment => assert!(said.contains("error: grammar.json: cannot read"), "{said}"),
                _ => assert_eq!(ending, Ending::Accepted, "{format:?}: {said}"),
            }
        }
    }
}

#[test]
fn damaged_files_are_refused_or_read_right() {
    let set = |name: &str, default: usize| std::env::var(name).map_or(default, |text| text.parse().expect(name));
    let (from, inputs) = (set("ARES_HOSTILE_FROM", 0), set("ARES_HOSTILE", INPUTS));
    let seed = set("ARES_HOSTILE_SEED", 1) as u64;
    let only = std::env::var("ARES_HOSTILE_ONLY").ok();
    let right = Right::new();
    let (next, done) = (AtomicUsize::new(from), Mutex::new((BTreeMap::<_, usize>::new(), Vec::new())));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    // A stride that is prime to a hundred mixes the formats.
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= inputs {
                        return;
                    }
                    let (number, format) = (number * 37, format_of(number * 37));
                    if only.as_ref().is_some_and(|only| *only != format!("{format:?}")) {
                        continue;
                    }
                    let (ending, said) = attempt(&right, format, Mutator::new(seed << 32 | number as u64));
                    let mut done = done.lock().unwrap();
                    *done.0.entry((format, ending)).or_default() += 1;
                    if !ending.is_fine() {
                        done.1.push(format!("{ending:?} of {format:?}, input {}: {said}", number / 37));
                    }
                }
            });
        }
    });
    let (counts, faults) = done.into_inner().unwrap();
    for ((format, ending), n) in &counts {
        println!("{format:?} {ending:?}: {n}");
    }
    let shown: Vec<&str> = faults.iter().take(20).map(|fault| &fault[..fault.floor_char_boundary(1500)]).collect();
    assert!(faults.is_empty(), "{} of {inputs} inputs (seed {seed}):\n{}", faults.len(), shown.join("\n\n"));
    // That most are refused for another reason, or none is accepted, would say that nothing was tried.
    let total = |ending| counts.iter().filter(|((_, found), _)| *found == ending).map(|(_, n)| n).sum::<usize>();
    let enough = total(Ending::Accepted) > inputs / 10 && total(Ending::Refused) > inputs / 10;
    assert!(enough || only.is_some() || from > 0, "{counts:?}");
}
