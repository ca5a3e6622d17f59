//! What needs no model.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::support::{ares, command};
use ares::run::{Earlier, RunDir};

#[test]
fn help_and_version_are_answers() {
    let help = ares(&["--help"]).expect(0, &[]);
    for word in ["doctor", "report", "completions", "--device", "--seed", "--json", "Exit codes"] {
        assert!(help.stdout.contains(word), "{word:?} is missing in: {}", help.stdout);
    }
    assert!(ares(&["--version"]).expect(0, &[]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_comes_at_once() {
    let once = || {
        let begin = Instant::now();
        assert!(command(&["--help"]).stdout(Stdio::null()).status().unwrap().success());
        begin.elapsed()
    };
    // The best of many: what other processes take is not the program's.
    let best = (0..30).map(|_| once()).min().unwrap();
    assert!(best <= Duration::from_millis(20), "{best:?}");
}

#[test]
fn wrong_usage_is_code_2_and_says_what_is_possible() {
    ares(&[]).expect(2, &["Usage"]);
    ares(&["repot"]).expect(2, &["report"]);
    ares(&["doctor", "--sed", "1"]).expect(2, &["--seed"]);
    ares(&["doctor", "--device", "gpu"]).expect(2, &["auto, cpu, cuda"]);
    ares(&["doctor", "--seed", "-1"]).expect(2, &["-1"]);
    ares(&["completions", "csh"]).expect(2, &["bash"]);
    ares(&["doctor", "-q", "-v"]).expect(2, &["cannot be used with"]);
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = ares(&["completions", shell]).expect(0, &[]).stdout;
        for word in ["completions", "device", "max-new-tokens"] {
            assert!(text.contains(word), "{shell}: {word:?} is missing");
        }
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = command(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn doctor_says_what_it_found() {
    let table = ares(&["doctor"]).expect(0, &[]).stdout;
    for word in ["cores", "memory bandwidth", "matrix rate", "CUDA driver", "NVRTC", "C++ compiler", "cache"] {
        assert!(table.contains(word), "{word:?} is missing in: {table}");
    }
    let found = ares(&["doctor", "--json"]).expect(0, &[]).json();
    for rate in ["bandwidth_gb_s", "matrix_gflop_s", "cores"] {
        assert!(found[rate].as_f64().is_some_and(|value| value > 0.0 && value.is_finite()), "{rate}: {found}");
    }
}

#[test]
fn report_writes_the_page_of_a_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    let path = run.to_str().unwrap();
    ares(&["report", path]).expect(2, &[path, "found no summary.json"]);
    ares(&["report", "/nowhere/run"]).expect(2, &["/nowhere/run", "expected a run directory"]);
    fs::write(run.join("summary.json"), SUMMARY).unwrap();
    let done = ares(&["report", path]).expect(0, &["wrote", "before", "13.9"]);
    assert_eq!(done.stdout, "", "tables and messages go to stderr");
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("13.9") && page.ends_with("</html>"), "{page}");
    let json = ares(&["report", path, "--json", "--quiet"]).expect(0, &[]);
    assert_eq!((json.json()["report"].as_str(), json.stderr.as_str()), (run.join("report.html").to_str(), ""));
}

#[test]
fn a_run_that_another_process_holds_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let run = RunDir::create(&path, Earlier::Refuse).unwrap();
    fs::write(run.file("summary.json"), SUMMARY).unwrap();
    let holder = format!("process {}", std::process::id());
    ares(&["report", path.to_str().unwrap()]).expect(1, &["another run holds this directory", &holder]);
    assert!(!run.file("report.html").exists());
    drop(run);
    ares(&["report", path.to_str().unwrap()]).expect(0, &[]);
}

#[cfg(unix)]
#[test]
fn an_unwritable_place_is_an_error_with_a_remedy() {
    // Not by permissions, which do not bind everyone: a folder stands where the file should be.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("summary.json"), SUMMARY).unwrap();
    fs::create_dir(folder.path().join("report.html")).unwrap();
    let run: &Path = folder.path();
    ares(&["report", run.to_str().unwrap()]).expect(2, &["report.html", "found a folder"]);
}

const SUMMARY: &str = r#"{"schema": 1, "version": "0.1.0", "benchmark_id": "ab", "device": "cpu", "seeds": [1], "suite": null,
    "thresholds": {"tau_h": 0.5, "tau_r": 0.3, "mu_0": 0.0, "s": 1.0},
    "decoding": {"max_new_tokens": 40, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0, "ignore_eos": false},
    "before": {"cfr": 0.1389, "ci95": [0.118, 0.161], "n": 1008}, "a_field_of_later_days": {}}"#;
