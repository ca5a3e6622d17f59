//! Running the program.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// The JSON lines on stdout.
    #[track_caller]
    pub fn rows(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }
}

pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ares"));
    command.args(args).stdin(Stdio::null());
    command
}

pub fn ares(args: &[&str]) -> Outcome {
    finish(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// With `input` on stdin.
pub fn ares_with(args: &[&str], input: &str) -> Outcome {
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that refuses its arguments may be gone before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    finish(child)
}

pub fn finish(child: std::process::Child) -> Outcome {
    let output = child.wait_with_output().unwrap();
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A checkpoint of `tests/golden` with a tokenizer of one word per id (`w0`, `w1`, …) and a chat template, as a person would
/// have it in a folder.
pub fn model(golden: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = repository("tests/golden").join(golden);
    for entry in std::fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(source.join("config.json")).unwrap()).unwrap();
    let words: serde_json::Map<_, _> = (0..config["vocab_size"].as_u64().unwrap())
        .map(|id| (if id == 2 { "</s>".into() } else { format!("w{id}") }, id.into()))
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"},
    });
    let template = "{% for m in messages %}{{ 'w10 ' + m.content + ' w11 ' if m.role == 'user' else m.content + ' </s>' }}{% endfor %}";
    let settings = serde_json::json!({"chat_template": template, "eos_token": "</s>"});
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    folder
}

/// What transformers and PEFT computed for a checkpoint of `tests/golden`.
pub fn golden(name: &str) -> serde_json::Value {
    let path = repository("tests/golden").join(name).join("golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Rows as JSON lines.
pub fn lines(rows: &[serde_json::Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}
