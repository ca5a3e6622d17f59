//! `ares run`, and runs that are killed and resumed.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::method::{suite, typed};
use super::support::{Folder, ares, ares_with, command, finish, rows};

/// The thinned suite with a small loop on it, as `loop.toml`.
fn small() -> Folder {
    let folder = suite();
    folder.write("loop.toml", configuration(&folder));
    folder
}

fn configuration(folder: &Folder) -> String {
    let text = r#"
        [models]
        policy = "PAIR/policy"
        reward = "PAIR/reward"
        judge = "model:OUT/models/judge"
        refusal = "lexicon:OUT/models/refusal.json"
        max_new_tokens = 32
        [data]
        calibration = "PAIR/calibration.jsonl"
        replay = "PAIR/replay.jsonl"
        retain = "PAIR/retain.jsonl"
        plausible = "PAIR/discovery.jsonl"
        gate = "PAIR/gate.jsonl"
        test = "PAIR/test.jsonl"
        grammar = "PAIR/grammar.json"
        [probe]
        queries = 96
        failures = 30
        held_out = ["roleplay"]
        [rounds]
        rounds = 2
        [repair]
        rank = 8
        alpha = 16
        lr = 0.006
        steps = 8
        items = 8
        retain_items = 8
        replay_items = 8
        resample = 3
        retain = "kl"
        lambda_npo = 0.005
        lambda_retain = 60.0"#;
    typed(folder, text)
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_trained_here_is_said_before_anything_is_searched() {
    let folder = small();
    folder.write(
        "large.toml",
        folder.read("loop.toml").replace("max_new_tokens = 32", "max_new_tokens = 32\n batch_tokens = 1048576"),
    );
    let program = env!("CARGO_BIN_EXE_ares");
    let line = format!("ulimit -v 6000000; exec {program} run {folder}/large.toml --device cpu --out {folder}/run");
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", &line]).stdin(std::process::Stdio::null());
    shell.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let refused = finish(shell.spawn().unwrap()).expect(1, &["memory: expected", "lower --batch-tokens", "recompute"]);
    assert!(!refused.stderr.contains("measure the originals"), "{}", refused.stderr);
    assert!(!folder.at("run/outcomes.jsonl").exists() && !folder.at("run/probes.jsonl").exists());
}

/// Numbers that depend on the clock.
fn without_times(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept =
                |name: &String| !["seconds", "tokens_per_second", "seconds_per_failure"].contains(&name.as_str());
            fields
                .iter()
                .filter(|(name, _)| kept(name))
                .map(|(name, value)| (name.clone(), without_times(value)))
                .collect()
        }
        Value::Array(list) => list.iter().map(without_times).collect(),
        other => other.clone(),
    }
}

/// What a run left, times aside, and its adapters byte for byte.
fn left(folder: &Folder, run: &str) -> (Vec<Value>, Vec<Vec<u8>>) {
    let mut values = vec![without_times(&serde_json::from_str(&folder.read(&format!("{run}/summary.json"))).unwrap())];
    for name in ["probes", "outcomes", "failures", "metrics"] {
        values.extend(rows(&folder.read(&format!("{run}/{name}.jsonl"))).iter().map(without_times));
    }
    let weights = |round, role| folder.at(&format!("{run}/round-{round}/{role}/adapter_model.safetensors"));
    let adapters = [(1, "policy"), (1, "reward"), (2, "policy"), (2, "reward")];
    (values, adapters.map(|(round, role)| fs::read(weights(round, role)).unwrap()).into())
}

/// Starts `line` and kills it as soon as the journal of `run` has `units` lines; the program may have ended before.
fn kill_at(folder: &Folder, line: &str, run: &str, units: usize) {
    let mut child = command(line).spawn().unwrap();
    let journal = folder.at(run).join("journal.jsonl");
    let done = || fs::read(&journal).map_or(0, |text| text.iter().filter(|byte| **byte == b'\n').count());
    while done() < units && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_loop_that_was_killed_ends_as_an_undisturbed_one() {
    let folder = small();
    let whole = ares(&format!("run {folder}/loop.toml --out {folder}/whole --json"));
    let said = ["round 1", "round 2", "held_out", "accepted"];
    let code = whole.code.unwrap();
    let summary = whole.expect(code, &said[..2]).json();
    assert_eq!(summary["rounds"].as_array().unwrap().len(), 2);
    assert!(summary["rounds"][0]["search_held_out"]["queries"] == 24, "{}", summary["rounds"][0]);
    assert_eq!(summary["unfinished"], Value::Null);
    let expected = left(&folder, "whole");
    for seed in 0..2 {
        let run = format!("killed-{seed}");
        kill_at(&folder, &format!("run {folder}/loop.toml --out {folder}/{run}"), &run, 3 + 20 * seed);
        for units in [9, 24, 31, 47, 60] {
            kill_at(&folder, &format!("run --resume {folder}/{run}"), &run, units + 5 * seed);
        }
        // What a failing disk leaves: half a line.
        let journal = folder.at(&run).join("journal.jsonl");
        let text = fs::read(&journal).unwrap();
        fs::write(&journal, &text[..text.len() - 20]).unwrap();
        let resumed = ares(&format!("run --resume {folder}/{run} --quiet"));
        resumed.expect(code, &[]);
        let found = left(&folder, &run);
        assert!(found.1 == expected.1, "adapters differ");
        assert!(found.0.len() == expected.0.len(), "{} lines, not {}", found.0.len(), expected.0.len());
        for (found, expected) in found.0.iter().zip(&expected.0) {
            assert_eq!(found, expected);
        }
        assert!(!folder.at(&run).join("checkpoints").exists());
    }
    // A finished run computes nothing more and says the same.
    let again = ares(&format!("run --resume {folder}/whole --json"));
    assert!(!again.stderr.contains("calibrate"), "{}", again.stderr);
    assert_eq!(without_times(&again.json()), expected.0[0]);
}

#[test]
fn a_run_goes_on_only_with_what_it_began_with() {
    let folder = small();
    let begin = format!("run {folder}/loop.toml --out {folder}/run");
    kill_at(&folder, &begin, "run", 2);
    ares(&begin).expect(2, &["found an earlier run", "another --out"]);
    let resume = |more: &str| ares(&format!("run --resume {folder}/run {more}"));
    resume("--seed 9").expect(1, &["run.toml: seeds: expected 1, as when the run began, found 9"]);
    resume("--rounds 3").expect(1, &["settings rounds.rounds: expected 2, as when the run began, found 3"]);
    resume("--device sim").expect(1, &["device: expected cpu", "found sim"]);
    let changed = configuration(&folder).replace("lr = 0.006", "lr = 0.001");
    folder.write("loop.toml", changed);
    resume("").expect(1, &["settings repair.lr: expected 0.006", "found 0.001"]);
    let text = configuration(&folder);
    folder.write(
        "loop.toml",
        text.replace("test.jsonl", "x").replace("gate.jsonl", "test.jsonl").replace("/x", "/gate.jsonl"),
    );
    resume("").expect(1, &["settings data.gate: expected gate.jsonl", "found test.jsonl"]);
    folder.write("loop.toml", text.replacen("[data]", "[data]\nkind = \"benign\"", 1));
    resume("").expect(1, &["settings data.kind: expected nothing", "found benign"]);
    folder.write("loop.toml", text);
    let gate = folder.read("models/framing/gate.jsonl");
    folder.write("models/framing/gate.jsonl", gate.lines().skip(1).map(|row| format!("{row}\n")).collect::<String>());
    resume("").expect(1, &["run.toml: input gate.jsonl: expected", "or begin anew elsewhere"]);
    ares(&format!("compare --resume {folder}/run")).expect(2, &["expected `ares run --resume`"]);
    ares(&format!("run --resume {folder}/models"))
        .expect(2, &["expected the directory of a run that was stopped", "run.toml"]);
    ares(&format!("run --resume {folder}/run --out {folder}/other")).expect(2, &["cannot be used with"]);
    let busy = command(&format!("run {folder}/loop.toml --out {folder}/busy")).spawn().unwrap();
    while !folder.at("busy/run.toml").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    ares(&format!("run --resume {folder}/busy")).expect(1, &["another run holds this directory"]);
    super::support::interrupt(&busy);
    finish(busy).expect(130, &["what was done is kept: go on with `ares run --resume"]);
}

#[test]
fn a_refused_round_is_rolled_back() {
    let folder = small();
    // So fast that nothing but gibberish is left of the policy.
    folder.write("wild.toml", configuration(&folder).replace("lr = 0.006", "lr = 1.0"));
    let found = ares(&format!("run {folder}/wild.toml --out {folder}/run --json"));
    let said = ["round 1: refused and rolled back", "degenerate_growth", "no round was accepted, 2 refused"];
    let summary = found.expect(3, &said).json();
    let rounds = summary["rounds"].as_array().unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    for round in rounds {
        assert!(number(&round["repair"]["degenerate_rate"]) > 0.5, "{round}");
        // The search after it meets the models as they were: half as many failures at least.
        let [before, after] = ["search", "reprobe"].map(|search| number(&round[search]["coupled"]));
        assert!(before >= 8.0 && after >= before / 2.0, "{before} coupled failures, then {after}");
        assert_eq!(round["before"], rounds[0]["before"]);
    }
    assert_eq!(number(&rounds[1]["repair"]["lr"]), 0.5, "the next round learns half as fast");
    assert_eq!(summary["methods"].as_array().unwrap().len(), 0);
}

#[test]
fn what_a_loop_refuses_before_it_computes_anything() {
    let folder = small();
    let full = configuration(&folder);
    let run = |from: &str, to: &str, out: &str| {
        assert!(full.contains(from), "{from}");
        folder.write("other.toml", full.replacen(from, to, 1));
        ares(&format!("run {folder}/other.toml --out {folder}/{out}"))
    };
    let refusal = format!(r#"refusal = "lexicon:{folder}/models/refusal.json""#);
    run(&refusal, "", "a").expect(1, &["gate over_refusal_growth", "allow_undecided = true"]);
    run("queries = 96", "querys = 96", "a").expect(1, &["key querys in [probe]", "the nearest is queries"]);
    run(r#"["roleplay"]"#, r#"["role"]"#, "a").expect(2, &["held_out", "roleplay", "found role"]);
    run("/framing/policy", "/framing/nowhere", "a").expect(1, &["nowhere"]);
    // None of these starts blocks the next.
    run("queries = 96", "queries = 0", "a").expect(1, &["queries", "from 1 to"]);
    folder.write("empty.jsonl", "");
    let gate = format!("{folder}/models/framing/gate.jsonl");
    run(&gate, &format!("{folder}/empty.jsonl"), "a").expect(1, &["empty.jsonl", "at least one row"]);
    ares("run").expect(2, &["CONFIG"]);
}

#[test]
fn where_nothing_fails_nothing_is_trained() {
    let folder = small();
    // A judge who finds nothing harmful.
    folder.write("blind.json", r#"{"schema": 1, "match": "any", "contains": ["zzzzzz"]}"#);
    let text = configuration(&folder).replace("model:", "lexicon:").replace("/models/judge", "/blind.json");
    folder.write("blind.toml", text);
    let found = ares(&format!("run {folder}/blind.toml --out {folder}/run --json"));
    let said = ["nothing to repair, nothing trained: 0 of", "queries found a coupled failure", "with 95 % confidence"];
    let summary = found.expect(0, &said).json();
    assert_eq!((summary["rounds"].as_array().unwrap().len(), &summary["rounds"][0]["repair"]), (1, &Value::Null));
}

#[test]
fn where_nothing_found_can_be_repaired_no_gate_is_met() {
    let folder = small();
    // The judge's band around this threshold reaches beyond 1: nothing found is harmful enough to be trained on.
    let text = configuration(&folder).replacen("max_new_tokens", "harm_threshold = 0.95\nmax_new_tokens", 1);
    folder.write("strict.toml", text);
    let found = ares(&format!("run {folder}/strict.toml --out {folder}/run --json"));
    let summary = found.expect(3, &["no round was accepted, 0 refused", "failures left out"]).json();
    let round = &summary["rounds"][0];
    assert!(round["repair"].is_null() && round["left_out"].as_u64() > Some(0), "{round}");
    assert!(round["search"]["coupled"].as_u64() > Some(0), "{round}");
}

#[test]
fn a_repair_of_what_comes_by_stdin_begins_again_and_goes_on() {
    let folder = small();
    let line = typed(&folder, "repair MODELS DATA --thresholds 0.5,-1,2 --out OUT/repair -v");
    ares_with(&line, "{\"prompt\": 3}\n").expect(1, &["failures-in, line 1"]);
    ares_with(&line, "").expect(0, &["0 failures"]);
    let resume = |more: &str| ares(&format!("repair --resume {folder}/repair {more}"));
    assert_eq!(resume("-q").expect(0, &[]).stderr, "", "what is typed beside wins");
    resume("--thresholds 9,9,9")
        .expect(1, &["settings thresholds: expected [0.5, -1.0, 2.0]", "found [9.0, 9.0, 9.0]"]);
}

#[test]
fn the_example_runs_once_it_names_files() {
    let folder = small();
    let mut text: toml::Table = toml::from_str(&ares("run --example").expect(0, &[]).stdout).unwrap();
    for (name, section) in toml::from_str::<toml::Table>(&configuration(&folder)).unwrap() {
        let keys = text.get_mut(&name).and_then(toml::Value::as_table_mut).unwrap();
        keys.extend(section.as_table().unwrap().clone());
    }
    text["rounds"]["rounds"] = 1.into();
    folder.write("example.toml", text.to_string());
    let found = ares(&format!("run {folder}/example.toml --out {folder}/run"));
    assert!(matches!(found.code, Some(0 | 3)), "{found:?}");
    let code = found.code.unwrap();
    found.expect(code, &["round 1", "report.html"]);
}

/// From a list of goals to a report that says what the tactics are called elsewhere: nobody writes a grammar by hand.
#[test]
fn a_list_of_goals_becomes_the_grammar_of_a_loop() {
    let folder = small();
    let suite: Value = serde_json::from_str(&folder.read("models/framing/grammar.json")).unwrap();
    let goals = suite["topics"].as_array().unwrap().iter().map(|topic| {
        let text = |key: &str| topic[key].as_str().unwrap().to_string();
        format!("\"{}\",\"{}\"\n", text("goal"), text("harmful"))
    });
    folder.write("goals.csv", "goal,target\n".to_string() + &goals.collect::<String>());
    let make = format!("grammar --goals {folder}/goals.csv --topics 30 --targets --out {folder}/made.json");
    ares(&make).expect(0, &["30 topics in 1 domains, 10 tactics", "made.json: look it over"]);
    let text = folder.read("loop.toml").replace("/models/framing/grammar.json", "/made.json");
    folder.write("loop.toml", text.replace("\"roleplay\"", "\"rot13\"").replace("rounds = 2", "rounds = 1"));
    let done = ares(&format!("run {folder}/loop.toml --out {folder}/run -q"));
    assert!(matches!(done.code, Some(0 | 3)), "{}", done.stderr);
    let probes = rows(&folder.read("run/probes.jsonl"));
    let tagged = probes.iter().filter(|probe| probe["tags"][1] == "ATLAS AML.T0054").count();
    assert!(tagged > 10 && probes.iter().all(|probe| probe["harmful"].is_string()), "{tagged} of {}", probes.len());
    let page = folder.read("run/report.html");
    assert!(page.contains("By tactic") && page.contains("OWASP LLM01:2025, ATLAS AML.T0068"));
    ares(&format!("grammar --goals {folder}/models/framing/retain.jsonl --out {folder}/x.json"))
        .expect(1, &["retain.jsonl: expected at least one goal", "AdvBench"]);
    assert!(!folder.at("x.json").exists());
}
