//! What needs no model.

use std::time::{Duration, Instant};

use super::support::{Folder, ares, command, finish};
use ares::run::{Earlier, RunDir};

#[test]
fn help_and_version_are_answers() {
    let help = ares("--help").expect(0, &[]);
    for word in ["doctor", "report", "completions", "--device", "--seed", "--json", "Exit codes"] {
        assert!(help.stdout.contains(word), "{word:?} is missing in: {}", help.stdout);
    }
    assert!(ares("--version").expect(0, &[]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_comes_at_once() {
    let once = || {
        let begin = Instant::now();
        ares("--help").expect(0, &[]);
        begin.elapsed()
    };
    // The best of many: what other processes take is not the program's.
    let best = (0..30).map(|_| once()).min().unwrap();
    assert!(best <= Duration::from_millis(20), "{best:?}");
}

/// Wrong usage is code 2, what cannot be read is code 1; both say what is possible.
#[test]
fn what_cannot_be_meant_is_refused() {
    let folder = Folder::new();
    folder.write("thesis.tex", "");
    for (line, code, words) in [
        ("", 2, &["Usage"][..]),
        ("repot", 2, &["report"]),
        ("doctor --sed 1", 2, &["--seed"]),
        ("doctor --device gpu", 2, &["auto, cpu, cuda"]),
        ("doctor --seed -1", 2, &["-1"]),
        ("doctor -q -v", 2, &["cannot be used with"]),
        ("completions csh", 2, &["bash"]),
        ("report /nowhere/run", 2, &["/nowhere/run", "expected a run directory"]),
        ("generate", 2, &["--model"]),
        ("generate --model x --greedy --top-k 3", 2, &["cannot be used with"]),
        ("generate --model x --temperature NaN", 2, &["a number from 0 up"]),
        ("generate --model x --max-new-tokens 0", 2, &["max-new-tokens"]),
        ("generate --model /nowhere/model", 1, &["/nowhere/model", "a model's folder"]),
        (
            "judge --judge oracle:x",
            2,
            &["model:DIR[,LABEL], guard:DIR[+ADAPTER][,FORM], cmd:PROGRAM ARGS, lexicon:FILE or ensemble:SPEC,SPEC"],
        ),
        ("judge --judge lexicon:/nowhere/x.json", 1, &["/nowhere/x.json"]),
        ("detect", 2, &["--calibration FILE or --tau-r"]),
        ("detect --tau-r inf", 2, &["finite"]),
        ("detect --calibration x", 2, &["--reward"]),
        ("demo --models /nowhere/suite --out FOLDER/demo", 1, &["/nowhere/suite", "cannot read"]),
        ("demo --full --quick", 2, &["cannot be used with"]),
        ("demo --quick --out FOLDER", 2, &["other files"]),
        ("bench --repeats 0", 2, &["--repeats"]),
        ("bench --policy /nowhere/x --reward y", 2, &["/nowhere/x", "expected a model's folder", "found nothing"]),
        ("bench --policy README.md --reward y", 2, &["README.md", "expected a model's folder", "found another file"]),
        ("bench --policy /nowhere/config.json --reward /nowhere/config.json", 1, &["/nowhere/config.json"]),
        (
            "bench load --policy tests/golden/qwen2-causal/config.json --reward tests/golden/qwen2-causal/config.json",
            2,
            &["expected a model's folder", "qwen2-causal/config.json", "leave out `load`"],
        ),
        (
            "bench --policy tests/golden/qwen2-causal --reward tests/golden/qwen2-reward --layers 1",
            2,
            &["--layers 1", "expected a config.json", "qwen2-causal", "leave out --layers"],
        ),
    ] {
        println!("ares {line}");
        ares(&line.replace("FOLDER", &folder.to_string())).expect(code, words);
    }
    assert_eq!(folder.count(), 1, "nothing was made, and what lay there stayed");
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = ares(&format!("completions {shell}")).expect(0, &[]).stdout;
        for word in ["completions", "device", "max-new-tokens"] {
            assert!(text.contains(word), "{shell}: {word:?} is missing");
        }
    }
}

#[test]
fn a_reader_that_leaves_hears_nothing_more() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command("completions bash").stdout(writer).spawn().unwrap();
    assert_eq!(finish(child).expect(141, &[]).stderr, "", "as after SIGPIPE");
}

#[test]
fn doctor_says_what_it_found() {
    let table = ares("doctor").expect(0, &[]).stdout;
    for word in ["cores", "memory bandwidth", "matrix rate", "CUDA driver", "NVRTC", "C++ compiler", "cache"] {
        assert!(table.contains(word), "{word:?} is missing in: {table}");
    }
    let found = ares("doctor --json").expect(0, &[]).json();
    for rate in ["bandwidth_gb_s", "matrix_gflop_s", "cores"] {
        assert!(found[rate].as_f64().is_some_and(|value| value > 0.0 && value.is_finite()), "{rate}: {found}");
    }
}

#[test]
fn report_writes_the_page_of_a_run_again() {
    let folder = Folder::new();
    let (path, line) = (folder.at("run"), format!("report {folder}/run"));
    let run = RunDir::create(&path, Earlier::Refuse).unwrap();
    let holder = format!("process {}", std::process::id());
    ares(&line).expect(1, &["another run holds this directory", &holder]);
    drop(run);
    ares(&line).expect(2, &[path.to_str().unwrap(), "found no summary.json"]);
    folder.write("run/summary.json", SUMMARY);
    let done = ares(&line).expect(0, &["wrote", "before", "13.9"]);
    assert_eq!(done.stdout, "", "tables and messages go to stderr");
    let page = folder.read("run/report.html");
    assert!(page.contains("13.9") && page.ends_with("</html>"), "{page}");
    let json = ares(&format!("{line} --json --quiet")).expect(0, &[]);
    assert_eq!((json.json()["report"].as_str(), &*json.stderr), (path.join("report.html").to_str(), ""));
    // Not by permissions, which do not bind everyone: a folder stands where the file should be.
    std::fs::remove_file(path.join("report.html")).unwrap();
    std::fs::create_dir(path.join("report.html")).unwrap();
    ares(&line).expect(2, &["report.html", "found a folder"]);
}

const SUMMARY: &str = r#"{"schema": 1, "version": "0.1.0", "benchmark_id": "ab", "device": "cpu", "seeds": [1], "suite": null,
    "thresholds": {"tau_h": 0.5, "tau_r": 0.3, "mu_0": 0.0, "s": 1.0},
    "decoding": {"max_new_tokens": 40, "temperature": 0, "top_k": 0, "top_p": 1, "seed": 0, "ignore_eos": false},
    "before": {"cfr": 0.1389, "ci95": [0.118, 0.161], "n": 1008}, "a_field_of_later_days": {}}"#;
