//! Commands that take rows: killed, resumed, and on input that does not fit into one window.

use std::fs;
use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::support::{Folder, ares, ares_with, command, finish, lines, model};

/// Rows that take the tiny model a while; every hundredth is bad.
fn asked(n: usize) -> String {
    let row = |i: usize| match i % 100 {
        7 => json!({"nothing": i}),
        _ => {
            json!({"i": i, "prompt": format!("w{} w{}", 12 + i % 80, 12 + i / 80 % 80), "response": format!("w{}", 12 + i % 60)})
        }
    };
    lines(&(0..n).map(row).collect::<Vec<_>>())
}

/// Runs `line` until the part of `out` has `rows` lines, then kills it; it may have ended before.
fn kill_at(folder: &Folder, line: &str, out: &str, rows: usize) {
    let mut child = command(line).spawn().unwrap();
    let part = folder.at(&format!("{out}.part"));
    let done = || fs::read(&part).map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count());
    while done() < rows && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn rows_that_were_killed_are_gone_on_with() {
    let folder = Folder::new();
    let (causal, reward) = (model("llama-causal"), model("llama-reward"));
    folder.write("in.jsonl", asked(24_000));
    for (name, what, kind) in [
        ("score", format!("score --reward {reward}"), "jsonl"),
        ("csv", format!("score --reward {reward}"), "csv"),
        ("generate", format!("generate --model {causal} --max-new-tokens 3 --seed 5"), "jsonl"),
    ] {
        let whole = ares(&format!("{what} -i {folder}/in.jsonl -o {folder}/{name}-whole.{kind}"));
        whole.expect(0, &["24000 rows, 240 with an error"]);
        let out = format!("{name}.{kind}");
        let line = format!("{what} -i {folder}/in.jsonl -o {folder}/{out}");
        kill_at(&folder, &line, &out, 500);
        assert!(!folder.at(&out).exists(), "a part must not pass for the whole");
        ares(&line).expect(2, &[&format!("{out}.part"), "go on with --resume, or delete it"]);
        for rows in [2_000, 9_000] {
            kill_at(&folder, &format!("{line} --resume"), &out, rows);
            // What a failing disk leaves: half a line.
            let part = folder.at(&format!("{out}.part"));
            let text = fs::read(&part).unwrap();
            assert!(text.len() > 30);
            fs::write(&part, &text[..text.len() - 30]).unwrap();
        }
        ares(&format!("{line} --resume")).expect(0, &["going on after", "24000 rows, 240 with an error", "a second"]);
        assert!(folder.read(&out) == folder.read(&format!("{name}-whole.{kind}")), "{name} differs");
        assert!(!folder.at(&format!("{out}.part")).exists() && !folder.at(&format!("{out}.part.toml")).exists());
    }
}

#[test]
fn a_part_is_gone_on_with_by_the_same_command_on_the_same_rows_alone() {
    let folder = Folder::new();
    let (causal, other) = (model("llama-causal"), model("qwen2-causal"));
    folder.write("in.jsonl", asked(12_000));
    let line = |model: &str, more: &str| {
        ares(&format!("generate --model {model} --max-new-tokens 3 -i {folder}/in.jsonl -o {folder}/out.jsonl {more}"))
    };
    line(&causal.to_string(), "--resume --max-new-tokens 0").expect(2, &["max-new-tokens"]);
    let begin = format!("generate --model {causal} --max-new-tokens 3 -i {folder}/in.jsonl -o {folder}/out.jsonl");
    kill_at(&folder, &begin, "out.jsonl", 600);
    let causal = causal.to_string();
    line(&causal, "--resume --seed 3").expect(1, &["settings seed: expected nothing, as when the run began, found 3"]);
    line(&causal, "--resume --greedy").expect(1, &["settings greedy", "found yes"]);
    line(&other.to_string(), "--resume").expect(1, &["out.jsonl.part.toml", "as when the run began"]);
    ares(&format!("score --reward {other} -i {folder}/in.jsonl -o {folder}/out.jsonl --resume"))
        .expect(1, &["command: expected generate"]);
    let rows = asked(12_000);
    folder.write("in.jsonl", rows.replacen("w12 w12", "w13 w12", 1));
    line(&causal, "--resume").expect(1, &["--resume: expected the rows that", "another row 1", "the same --input"]);
    folder.write("in.jsonl", rows.lines().take(100).map(|row| format!("{row}\n")).collect::<String>());
    line(&causal, "--resume").expect(1, &["another row 101, or none"]);
    folder.write("in.jsonl", rows);
    line(&causal, "--resume").expect(0, &["12000 rows"]);
    ares(&format!("generate --model {causal} --resume")).expect(2, &["--output"]);
}

#[test]
fn rows_of_standard_input_are_gone_on_with_too() {
    let (folder, reward) = (Folder::new(), model("llama-reward"));
    let (line, text) = (format!("score --reward {reward} -o {folder}/out.jsonl"), asked(6_000));
    let whole = ares_with(&format!("score --reward {reward}"), &text).expect(0, &["6000 rows"]).stdout;
    let mut child = command(&line).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // Only half of it comes, and then nothing: the program waits, and Ctrl-C ends it all the same.
    input.write_all(&text.as_bytes()[..text.len() / 2]).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    super::support::interrupt(&child);
    let said = finish_with(child, input);
    said.expect(130, &["rows are done, in", "go on with --resume"]);
    ares_with(&format!("{line} --resume"), &text).expect(0, &["going on after"]);
    assert!(folder.read("out.jsonl") == whole);
}

/// Waits with `input` open.
fn finish_with(child: std::process::Child, input: std::process::ChildStdin) -> super::support::Outcome {
    let outcome = finish(child);
    drop(input);
    outcome
}

#[test]
fn what_detect_measures_is_the_same_after_a_resume() {
    let folder = Folder::new();
    let row = |i: usize| {
        json!({
            "prompt": format!("p{i}"), "response": "a", "p_harm": if i.is_multiple_of(3) { 0.9 } else { 0.1 }, "reward": (i % 7) as f64,
            "topic": i % 11, "tactic": "x", "kind": if i.is_multiple_of(5) { "benign" } else { "harmful" },
        })
    };
    let rows: Vec<Value> = (0..60_000)
        .map(row)
        .map(|mut row| {
            row["topic"] = json!(row["topic"].to_string());
            row
        })
        .chain([json!({"prompt": "lacks everything"})])
        .collect();
    folder.write("in.jsonl", lines(&rows));
    let line = |out: &str| format!("detect --tau-r 3 --kind harmful -i {folder}/in.jsonl -o {folder}/{out} --json");
    let whole = ares(&line("whole.jsonl")).expect(0, &["60001 rows, 1 with an error"]).json();
    kill_at(&folder, &line("out.jsonl"), "out.jsonl", 3_000);
    let resumed = ares(&format!("{} --resume", line("out.jsonl"))).expect(0, &["going on after"]).json();
    assert_eq!(resumed, whole);
    assert!(folder.read("out.jsonl") == folder.read("whole.jsonl"));
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_costs_nothing_that_was_done() {
    let (folder, reward) = (Folder::new(), model("llama-reward"));
    folder.write("in.jsonl", asked(20_000));
    let line = format!("score --reward {reward} -i {folder}/in.jsonl -o {folder}/out.jsonl");
    let program = env!("CARGO_BIN_EXE_ares");
    // Files of at most 400 blocks of 1024 bytes; the signal that says so is ignored, as a full disk sends none.
    let limited = format!("trap '' XFSZ; ulimit -f 400; exec {program} {line}");
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &limited]).stdin(std::process::Stdio::null());
    shell.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let failed = finish(shell.spawn().unwrap());
    failed.expect(1, &["out.jsonl.part: cannot write", "free disk space", "rows are done, in", "go on with --resume"]);
    assert!(!folder.at("out.jsonl").exists());
    ares(&format!("{line} --resume")).expect(0, &["going on after", "20000 rows"]);
    let whole = ares(&line.replace("out.jsonl", "whole.jsonl"));
    whole.expect(0, &[]);
    assert!(folder.read("out.jsonl") == folder.read("whole.jsonl"));
}

#[test]
fn strict_ends_at_the_first_bad_row_and_keeps_those_before() {
    let (folder, reward) = (Folder::new(), model("llama-reward"));
    folder.write("in.jsonl", asked(300));
    let line = format!("score --reward {reward} -i {folder}/in.jsonl -o {folder}/out.jsonl");
    ares(&format!("{line} --strict")).expect(1, &["in.jsonl, line 8", "7 rows are done"]);
    assert_eq!(folder.read("out.jsonl.part").lines().count(), 7);
    ares(&format!("{line} --resume")).expect(0, &["300 rows, 3 with an error"]);
}
