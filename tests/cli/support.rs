//! Running the program.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

/// What a finished command left.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Fails unless the command ended with `code` and its messages hold every one of `texts`.
    #[track_caller]
    pub fn expect(self, code: i32, texts: &[&str]) -> Outcome {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        for text in texts {
            assert!(self.stderr.contains(text), "{text:?} is not said in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("fault of ares") && !self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// The one JSON object on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// The JSON lines on stdout.
    #[track_caller]
    pub fn rows(&self) -> Vec<Value> {
        rows(&self.stdout)
    }
}

/// `line` as one would type it after `ares`, from the repository's root; no path of a test holds a blank.
pub fn command(line: &str) -> Command {
    command_of(line.split_whitespace())
}

/// The same of words, in which blanks may stand.
pub fn command_of<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ares"));
    command.args(words).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn ares(line: &str) -> Outcome {
    ares_with(line, "")
}

/// With `input` on stdin.
pub fn ares_with(line: &str, input: &str) -> Outcome {
    let mut child = command(line).spawn().unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_string());
    // It answers while it is still asked; a command that refuses its arguments may be gone before it reads.
    let asking = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let outcome = finish(child);
    asking.join().unwrap();
    outcome
}

pub fn finish(child: Child) -> Outcome {
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// As Ctrl-C does.
#[cfg(unix)]
pub fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// A folder that goes with the test; shown as one would type it.
pub struct Folder(tempfile::TempDir);

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.path().display().fmt(f)
    }
}

impl Folder {
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.at(name), bytes).unwrap();
    }

    #[track_caller]
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }

    /// How many files and folders lie in it.
    pub fn count(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

/// A checkpoint of `tests/golden` with a tokenizer of one word per id (`w0`, `w1`, …) and a chat template, as a person would
/// have it in a folder.
pub fn model(golden: &str) -> Folder {
    let folder = Folder::new();
    for entry in fs::read_dir(format!("tests/golden/{golden}")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, folder.at(path.file_name().unwrap().to_str().unwrap())).unwrap();
        }
    }
    let config: Value = serde_json::from_str(&folder.read("config.json")).unwrap();
    let words: serde_json::Map<_, _> = (0..config["vocab_size"].as_u64().unwrap())
        .map(|id| (if id == 2 { "</s>".into() } else { format!("w{id}") }, id.into()))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"},
    });
    let template = "{% for m in messages %}{{ 'w10 ' + m.content + ' w11 ' if m.role == 'user' else m.content + ' </s>' }}{% endfor %}";
    folder.write("tokenizer.json", tokenizer.to_string());
    folder.write("tokenizer_config.json", json!({"chat_template": template, "eos_token": "</s>"}).to_string());
    folder
}

/// What transformers and PEFT computed for a checkpoint of `tests/golden`.
pub fn golden(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(format!("tests/golden/{name}/golden.json")).unwrap()).unwrap()
}

/// Rows as JSON lines.
pub fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// JSON lines as rows.
#[track_caller]
pub fn rows(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}
