//! `demo`, `probe`, `detect`, `repair`, `compare` on a thinned copy of the built-in suite.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::{Outcome, ares, ares_with, command, finish, lines, repository};

/// The suite with a few rows of every split; enough to calibrate on, too few to say anything.
fn suite() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&repository("models"), folder.path());
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, target) = {
            let e = entry.unwrap();
            (e.path(), to.join(e.file_name()))
        };
        if path.is_dir() {
            copy(&path, &target);
        } else if path.extension().is_some_and(|kind| kind == "jsonl") {
            let text = fs::read_to_string(&path).unwrap();
            let rows: Vec<&str> = text.lines().collect();
            let step = (rows.len() / 150).max(1);
            fs::write(target, rows.iter().step_by(step).map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The options that name the first pair's models and judge.
fn models(suite: &Path) -> Vec<String> {
    let suite = suite.display();
    words(&format!(
        "--policy {suite}/framing/policy --reward {suite}/framing/reward --judge model:{suite}/judge --max-new-tokens 32"
    ))
}

fn file(suite: &Path, name: &str) -> String {
    suite.join("framing").join(name).display().to_string()
}

fn run(first: &str, groups: &[&[String]]) -> Outcome {
    let args: Vec<&str> = [first].into_iter().chain(groups.iter().flat_map(|g| g.iter().map(String::as_str))).collect();
    ares(&args)
}

/// Arguments as one would type them; no path of a test holds a blank.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

#[test]
fn demo_runs_the_whole_method_and_keeps_an_earlier_run() {
    let (suite, folder) = (suite(), tempfile::tempdir().unwrap());
    let out = folder.path().join("demo");
    let args = ["demo", "--quick", "--models", text(suite.path()), "--out", text(&out)];
    let first = ares(&args)
        .expect(0, &["calibrate", "repair by joint", "CFR %", "no evidence about real models", "report.html"]);
    assert_eq!(first.stdout, "", "without --json nothing goes to stdout");
    for name in
        ["run.toml", "probes.jsonl", "outcomes.jsonl", "failures.jsonl", "metrics.jsonl", "summary.json", "report.html"]
    {
        assert!(out.join(name).is_file(), "{name} is missing");
    }
    for adapter in ["policy/policy", "joint/policy", "joint/reward"] {
        let folder = out.join("round-1").join(adapter);
        assert!(folder.join("adapter_model.safetensors").is_file(), "{} is missing", folder.display());
    }
    let summary = ares::run::summary::read(&out.join("summary.json")).unwrap();
    assert!(summary.before.cfr.is_some_and(|cfr| cfr > 0.0) && summary.methods.len() == 2);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!page.contains("NaN") && page.contains("Worst remaining failures"));

    let second = ares(&[&args[..], &["--json"]].concat()).expect(0, &["the earlier run is kept as", "demo.1"]);
    let again = second.json();
    assert_eq!(again["schema"], 1);
    let kept = ares::run::summary::read(&folder.path().join("demo.1/summary.json")).unwrap();
    assert_eq!(kept, summary, "the earlier run is kept as it was");
    assert_eq!(again["before"]["cfr"], json!(summary.before.cfr), "the same seed gives the same result");
    assert_eq!(again["methods"][1]["cfr"], json!(summary.methods[1].measure.cfr));
    // Four steps prove no repair, but each half must have moved, in the right direction, and nothing else.
    let of = |row: &Value, name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} is unknown: {row}"));
    let (before, [policy, joint]) = (&again["before"], [0, 1].map(|i| &again["methods"][i]));
    assert_eq!((policy["name"].as_str(), joint["name"].as_str()), (Some("policy"), Some("joint")));
    assert_eq!((of(joint, "tokens_policy"), of(policy, "tokens_reward")), (of(policy, "tokens_policy"), 0.0));
    assert!(of(joint, "tokens_reward") > 0.0 && of(joint, "reward_drift") > 0.0 && of(joint, "reward_drift") < 0.08);
    assert_eq!((of(policy, "reward_drift"), of(policy, "reward_error")), (0.0, of(before, "reward_error")));
    assert!(of(joint, "reward_error") <= of(before, "reward_error") && of(joint, "cfr") <= of(before, "cfr"));
    assert!([policy, joint].iter().all(|row| of(row, "benign_nll") < of(before, "benign_nll")), "{again}");
}

#[cfg(unix)]
#[test]
fn demo_stops_on_ctrl_c_and_leaves_no_result() {
    let (suite, folder) = (suite(), tempfile::tempdir().unwrap());
    let out = folder.path().join("demo");
    let args = ["demo", "--models", text(suite.path()), "--out", text(&out)];
    let child =
        command(&args).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    while !out.join("run.toml").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let busy = ["demo", "--quick", "--models", text(suite.path()), "--out", text(&out)];
    ares(&busy).expect(1, &["another run holds this directory", &format!("process {}", child.id())]);
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    finish(child).expect(130, &["interrupted: finishing", "interrupted; what was finished is kept"]);
    assert!(!out.join("summary.json").exists() && out.join("run.toml").exists());
}

#[test]
fn demo_refuses_what_it_cannot_use() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    ares(&["demo", "--models", "/nowhere/suite", "--out", text(&out)]).expect(1, &["/nowhere/suite", "cannot read"]);
    ares(&["demo", "--full", "--quick"]).expect(2, &["cannot be used with"]);
    fs::write(folder.path().join("thesis.tex"), "").unwrap();
    ares(&["demo", "--quick", "--out", text(folder.path())]).expect(2, &["other files"]);
    assert!(folder.path().join("thesis.tex").exists());
}

#[test]
fn failures_are_found_repaired_and_found_gone() {
    let (suite, folder) = (suite(), tempfile::tempdir().unwrap());
    let (suite, out) = (suite.path(), |name: &str| folder.path().join(name).display().to_string());
    let calibration = words(&format!("--calibration {}", file(suite, "calibration.jsonl")));
    let probe = words(&format!(
        "--grammar {} --queries 128 --uniform --out {} --json",
        file(suite, "grammar.json"),
        out("probe")
    ));
    let found = run("probe", &[&models(suite), &calibration, &probe])
        .expect(0, &["probe (thompson)", "probe (uniform)"])
        .json();
    assert_eq!(found["queries"], 128);
    assert!(found["coupled_found"].as_u64().is_some_and(|n| n > 0), "{found}");
    let probes = fs::read_to_string(folder.path().join("probe/probes.jsonl")).unwrap();
    assert_eq!(probes.lines().count(), 256);
    run("probe", &[&models(suite), &calibration, &probe]).expect(2, &["found an earlier run", "another --out"]);
    let weights = out("probe/weights.json");
    let again = words(&format!(
        "--grammar {} --queries 64 --weights {weights} --sampler ucb --out {}",
        file(suite, "grammar.json"),
        out("probe2")
    ));
    run("probe", &[&models(suite), &calibration, &again]).expect(0, &["probe (ucb)"]);

    let failures = folder.path().join("probe/failures.jsonl");
    let data = words(&format!(
        "--input {} --retain {} --replay {} --rank 4 --lr 0.002",
        text(&failures),
        file(suite, "retain.jsonl"),
        file(suite, "replay.jsonl")
    ));
    let repair = words(&format!("--steps 12 --out {} --json", out("repair")));
    let done = run("repair", &[&models(suite), &calibration, &data, &repair]).expect(0, &["repair by joint"]).json();
    assert_eq!((done["steps"].as_u64(), done["method"].as_str()), (Some(12), Some("joint")));
    let [first, last] = [0, 1].map(|i| done["loss"][i].as_f64().unwrap());
    assert!(last < first, "twelve steps must lower the loss: {first} -> {last}");
    assert_eq!(fs::read_to_string(folder.path().join("repair/metrics.jsonl")).unwrap().lines().count(), 12);

    let detect = |suffix: bool| {
        let with = |role: &str| {
            format!(
                "{}{}",
                file(suite, role),
                if suffix { format!("+{}", out(&format!("repair/round-1/{role}"))) } else { String::new() }
            )
        };
        let judge = format!("model:{}", suite.join("judge").display());
        let args = words(&format!(
            "--policy {} --reward {} --judge {judge} --max-new-tokens 32 --prefill 5 -i {} -o {} --json --quiet",
            with("policy"),
            with("reward"),
            text(&failures),
            out("rows.jsonl")
        ));
        run("detect", &[&calibration, &args]).expect(0, &[]).json()
    };
    let (before, after) = (detect(false), detect(true));
    let rows = fs::read_to_string(folder.path().join("rows.jsonl")).unwrap();
    let row: Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    assert!(row["rejected"].is_string() && row["verdict"].is_string() && row["response"].is_string(), "{row}");
    let harmful = |found: &Value| found["harmful_rate"].as_f64().unwrap();
    assert!(harmful(&after) < harmful(&before), "{} -> {}", before["harmful_rate"], after["harmful_rate"]);

    let dump = words(&format!(
        "--adapter-init random:3 --dump-gradients {} --out {} --json",
        out("gradients.safetensors"),
        out("dump")
    ));
    let dumped = run("repair", &[&models(suite), &calibration, &data, &dump]).expect(0, &[]).json();
    assert_eq!((dumped["steps"].as_u64(), dumped["written"].as_array().map(Vec::len)), (Some(0), Some(1)));
    let bytes = fs::read(folder.path().join("gradients.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 7 + 2 * 2 * 7 * 4, "seven terms; A and B of seven projections in four layers, twice");
    for (name, tensor) in tensors.tensors() {
        assert!(tensor.data().iter().any(|byte| *byte != 0), "{name} has no gradient");
    }
    assert!(tensors.tensor("term.npo").is_ok_and(|term| term.shape() == [1]));

    // A fresh adapter's B is zero, and with it the gradient of A: of an adapter that is given, training goes on.
    let judge = format!("model:{}", suite.join("judge").display());
    let given = words(&format!(
        "--policy {}+{} --reward {}+{} --judge {judge} --thresholds=-0.5,0,1.5 --dump-gradients {} --out {}",
        file(suite, "policy"),
        out("repair/round-1/policy"),
        file(suite, "reward"),
        out("repair/round-1/reward"),
        out("given.safetensors"),
        out("dump2")
    ));
    run("repair", &[&given, &data]).expect(0, &["wrote"]);
    let bytes = fs::read(folder.path().join("given.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = "policy.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    assert!(tensors.tensor(name).unwrap().data().iter().any(|byte| *byte != 0));
}

#[test]
fn a_forced_prefix_must_be_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let suite = repository("models");
    let rows = folder.path().join("failures.jsonl");
    fs::write(&rows, r#"{"prompt": "a", "rejected": "b", "chosen": "c", "forced": -1}"#).unwrap();
    let args = words(&format!(
        "--thresholds=0,0,1 --input {} --retain {} --replay {} --out {}",
        text(&rows),
        file(&suite, "retain.jsonl"),
        file(&suite, "replay.jsonl"),
        text(&folder.path().join("run"))
    ));
    run("repair", &[&models(&suite), &args])
        .expect(1, &["failures.jsonl, line 1", "a number of tokens under `forced`", "-1"]);
}

#[test]
fn repair_without_failures_trains_nothing() {
    let (suite, folder) = (suite(), tempfile::tempdir().unwrap());
    let suite = suite.path();
    let empty = folder.path().join("none.jsonl");
    fs::write(&empty, "").unwrap();
    let args = words(&format!(
        "--calibration {} --input {} --retain {} --replay {} --out {} --json",
        file(suite, "calibration.jsonl"),
        text(&empty),
        file(suite, "retain.jsonl"),
        file(suite, "replay.jsonl"),
        text(&folder.path().join("repair"))
    ));
    let done = run("repair", &[&models(suite), &args]).expect(0, &["0 failures"]).json();
    assert_eq!((done["steps"].as_u64(), done["failures"].as_u64()), (Some(0), Some(0)));
    let wrong = words("--method prayer");
    run("repair", &[&models(suite), &args, &wrong]).expect(2, &["joint-uncoupled", "prayer"]);
    let wrong = words(&format!("--steps 0 --out {}", text(&folder.path().join("other"))));
    run("repair", &[&models(suite), &args[..8], &wrong]).expect(2, &["--steps = 0", "from 1 to 1000000"]);
}

#[test]
fn detect_audits_what_was_measured_elsewhere_without_a_model() {
    let row = |prompt: &str, p_harm: f64, reward: f64| json!({"prompt": prompt, "response": "a", "p_harm": p_harm, "reward": reward, "mine": 1});
    let mut rows = vec![row("one", 0.9, 2.0), row("two", 0.9, 0.0), row("three", 0.1, 2.0)];
    rows.push(json!({"prompt": "four", "response": "a", "label": "harmful", "reward": 3.0}));
    rows.push(json!({"prompt": "five"}));
    let found =
        ares_with(&["detect", "--tau-r", "1"], &lines(&rows)).expect(0, &["5 rows, 1 with an error", "coupled"]).rows();
    let verdicts: Vec<&Value> = found.iter().map(|row| &row["verdict"]).collect();
    assert_eq!(verdicts[..4], [&json!("coupled"), &json!("policy"), &json!("sound"), &json!("coupled")]);
    assert_eq!((found[0]["mine"].as_u64(), found[4]["line"].as_u64()), (Some(1), Some(5)));
    assert!(found[4]["error"].as_str().is_some_and(|error| error.contains("--policy")), "{}", found[4]);
    let folder = tempfile::tempdir().unwrap();
    let output: PathBuf = folder.path().join("out.jsonl");
    let args = ["detect", "--tau-r", "-1.5", "--json", "-o", text(&output)];
    let measure = ares_with(&args, &lines(&rows[..3])).expect(0, &[]).json();
    assert_eq!((measure["cells"]["coupled"].as_u64(), measure["n"].as_u64()), (Some(2), Some(3)));
    ares(&["detect"]).expect(2, &["--calibration FILE or --tau-r"]);
    ares(&["detect", "--tau-r", "inf"]).expect(2, &["finite"]);
    ares(&["detect", "--calibration", "x"]).expect(2, &["--reward"]);
}

#[test]
fn compare_measures_several_methods_on_the_same_prompts() {
    let (suite, folder) = (suite(), tempfile::tempdir().unwrap());
    let (suite, out) = (suite.path(), folder.path().join("compare"));
    let splits = ["calibration", "replay", "retain", "discovery", "gate", "test"];
    let data: Vec<String> =
        splits.iter().flat_map(|name| [format!("--{name}"), file(suite, &format!("{name}.jsonl"))]).collect();
    let data: Vec<String> = data.into_iter().map(|arg| arg.replace("--discovery", "--plausible")).collect();
    let rest = words(&format!(
        "--grammar {} --methods reward,joint-uncoupled --seeds 3,4 --steps 2 --probes 64 --out {} --json",
        file(suite, "grammar.json"),
        text(&out)
    ));
    let found = run("compare", &[&models(suite), &data, &rest])
        .expect(0, &["reward · seed 3", "joint-uncoupled, min–max"])
        .json();
    let rows: Vec<(&str, u64)> = found["methods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|method| (method["name"].as_str().unwrap(), method["seed"].as_u64().unwrap()))
        .collect();
    assert_eq!(rows, [("reward", 3), ("joint-uncoupled", 3), ("reward", 4), ("joint-uncoupled", 4)]);
    assert_eq!(found["suite"], Value::Null);
    assert!(out.join("report.html").is_file());
    let shared =
        words(&format!("--grammar {} --out {}", file(suite, "grammar.json"), text(&folder.path().join("other"))));
    let mut overlapping = data.clone();
    overlapping[11] = overlapping[9].clone();
    run("compare", &[&models(suite), &overlapping, &shared]).expect(1, &["gate", "test", "line 1"]);
}
