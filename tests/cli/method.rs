//! `demo`, `probe`, `detect`, `repair`, `compare` on a thinned copy of the built-in suite.

use std::fs;
use std::path::Path;

use ares::run::summary;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::support::{Folder, ares, ares_with, command, finish, interrupt, lines, rows};

/// The suite with a few rows of every split; enough to calibrate on, too few to say anything.
pub fn suite() -> Folder {
    let folder = Folder::new();
    copy(Path::new("models"), &folder.at("models"));
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else if path.extension().is_some_and(|kind| kind == "jsonl") {
            let text = fs::read_to_string(&path).unwrap();
            let step = (text.lines().count() / 150).max(1);
            fs::write(target, text.lines().step_by(step).map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// `line` with MODELS for the options that name the first pair's models and judge, CALIBRATED for these and its calibration,
/// PAIR for its folder, OUT for the test's.
pub fn typed(folder: &Folder, line: &str) -> String {
    let models = "--policy PAIR/policy --reward PAIR/reward JUDGED";
    line.replace("CALIBRATED", "MODELS --calibration PAIR/calibration.jsonl")
        .replace("MODELS", models)
        .replace("JUDGED", "--judge model:OUT/models/judge --max-new-tokens 32")
        .replace("DATA", "--retain PAIR/retain.jsonl --replay PAIR/replay.jsonl")
        .replace("PAIR", "OUT/models/framing")
        .replace("OUT", &folder.to_string())
}

#[test]
fn demo_runs_the_whole_method_and_keeps_an_earlier_run() {
    let folder = suite();
    let line = typed(&folder, "demo --quick --models OUT/models --out OUT/demo");
    let said = ["calibrate", "repair by joint", "CFR %", "no evidence about real models", "report.html"];
    assert_eq!(ares(&line).expect(0, &said).stdout, "", "without --json nothing goes to stdout");
    for name in ["run.toml", "probes.jsonl", "outcomes.jsonl", "failures.jsonl", "metrics.jsonl"] {
        assert!(folder.at("demo").join(name).is_file(), "{name} is missing");
    }
    for adapter in ["policy/policy", "joint/policy", "joint/reward"] {
        let file = folder.at("demo/round-1").join(adapter).join("adapter_model.safetensors");
        assert!(file.is_file(), "{} is missing", file.display());
    }
    let first = summary::read(&folder.at("demo/summary.json")).unwrap();
    assert!(first.before.cfr.is_some_and(|cfr| cfr > 0.0) && first.methods.len() == 2);
    let page = folder.read("demo/report.html");
    assert!(!page.contains("NaN") && page.contains("Worst remaining failures"));

    let again = ares(&format!("{line} --json")).expect(0, &["the earlier run is kept as", "demo.1"]).json();
    assert_eq!(again["schema"], 1);
    let kept = summary::read(&folder.at("demo.1/summary.json")).unwrap();
    assert_eq!(kept, first, "the earlier run is kept as it was");
    assert_eq!(again["before"]["cfr"], json!(first.before.cfr), "the same seed gives the same result");
    assert_eq!(again["methods"][1]["cfr"], json!(first.methods[1].measure.cfr));
    // Four steps prove no repair, but each half must have moved, in the right direction, and nothing else.
    let of = |row: &Value, name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} is unknown: {row}"));
    let (before, [policy, joint]) = (&again["before"], [0, 1].map(|i| &again["methods"][i]));
    assert_eq!((policy["name"].as_str(), joint["name"].as_str()), (Some("policy"), Some("joint")));
    assert_eq!((of(joint, "tokens_policy"), of(policy, "tokens_reward")), (of(policy, "tokens_policy"), 0.0));
    assert!(of(joint, "tokens_reward") > 0.0 && of(joint, "reward_drift") > 0.0 && of(joint, "reward_drift") < 0.08);
    assert_eq!((of(policy, "reward_drift"), of(policy, "reward_error")), (0.0, of(before, "reward_error")));
    assert!(of(joint, "reward_error") <= of(before, "reward_error") && of(joint, "cfr") <= of(before, "cfr"));
    assert!([policy, joint].iter().all(|row| of(row, "benign_nll") != of(before, "benign_nll")), "{again}");
    for row in [before, policy, joint] {
        assert!((row["best_of"]["n"].as_u64(), row["relapse"]["n"].as_u64()) == (Some(8), Some(8)), "{row}");
    }
    audited_by_truth(&folder, &again);
}

/// What a run measured by its judge, with labels of some answers that are known to be right.
fn audited_by_truth(folder: &Folder, run: &Value) {
    let draw = typed(folder, "audit OUT/demo --pick 25 --out OUT/labels.jsonl");
    ares(&draw).expect(0, &["fill in `label`"]);
    ares(&draw).expect(2, &["labels.jsonl", "labels in it would be lost"]);
    ares(&typed(folder, "audit OUT/demo --labels OUT/labels.jsonl")).expect(1, &["found none", "--pick N"]);
    let outcomes = rows(&folder.read("demo/outcomes.jsonl"));
    let truth = |row: &Value| {
        let same = |o: &&Value| (&o["prompt"], &o["response"]) == (&row["prompt"], &row["response"]);
        outcomes.iter().find(same).unwrap()["truth"].clone()
    };
    let labelled = |mut row: Value| {
        row["label"] = truth(&row);
        row
    };
    let drawn = rows(&folder.read("labels.jsonl")).into_iter().map(labelled).collect::<Vec<_>>();
    folder.write("labels.jsonl", lines(&drawn));
    let line = typed(folder, "audit OUT/demo --labels OUT/labels.jsonl");
    let table = ares(&line).expect(0, &[]).stdout;
    assert!(["before", "policy", "joint", "25 of 38"].iter().all(|word| table.contains(word)), "{table}");
    let found = ares(&format!("{line} --json")).expect(0, &[]).json();
    let measured = [&run["before"], &run["methods"][0], &run["methods"][1]];
    for (found, measured) in found["methods"].as_array().unwrap().iter().zip(measured) {
        assert_eq!(
            (&found["harmful"]["by_judge"], &found["cfr"]["by_judge"]),
            (&measured["harmful_rate"], &measured["cfr"])
        );
        let (ends, truth) = (&found["harmful"]["ci95"], measured["harmful_truth"]["rate"].as_f64().unwrap());
        assert!(
            ends[0].as_f64().unwrap() <= truth && truth <= ends[1].as_f64().unwrap(),
            "{found} does not hold {truth}"
        );
    }
}

#[cfg(unix)]
#[test]
fn the_suites_guard_judges_in_its_classifiers_place() {
    let folder = suite();
    let line = typed(&folder, "demo --quick --models OUT/models --judge guard --out OUT/demo --json");
    let found = ares(&line).expect(0, &[]).json();
    let manifest = folder.read("demo/run.toml");
    assert!(manifest.contains("judge = \"guard:") && manifest.contains("second_judge = \"model:"), "{manifest}");
    let agreement = found["before"]["judge_truth"]["agreement"].as_f64().unwrap();
    assert!(agreement >= 0.85 && found["before"]["cfr_second_judge"].is_number(), "{agreement}: {}", found["before"]);
    ares(&typed(&folder, "demo --quick --models OUT/models --judge guards")).expect(2, &["model:DIR", "guard:DIR"]);
}

#[test]
fn demo_stops_on_ctrl_c_and_leaves_no_result() {
    let folder = suite();
    let line = typed(&folder, "demo --models OUT/models --out OUT/demo");
    let child = command(&line).spawn().unwrap();
    while !folder.at("demo/run.toml").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    ares(&line).expect(1, &["another run holds this directory", &format!("process {}", child.id())]);
    interrupt(&child);
    finish(child)
        .expect(130, &["interrupted: finishing", "interrupted; what was done is kept: go on with `ares demo --resume"]);
    assert!(!folder.at("demo/summary.json").exists());
}

/// Rates of harmful answers, of coupled failures and of the reward model's errors that `detect` measures of `models` on prompts
/// that no repair has seen; the first two as its rows have them.
fn measured(folder: &Folder, models: &str) -> [f64; 3] {
    let line =
        "detect --calibration PAIR/calibration.jsonl JUDGED -i PAIR/check.jsonl -o OUT/rows.jsonl --json --quiet";
    let found = ares(&typed(folder, &format!("{line} {models}"))).expect(0, &[]).json();
    let rows = rows(&folder.read("rows.jsonl"));
    let asked: Vec<&Value> = rows.iter().filter(|row| row["kind"] == "harmful").collect();
    assert!(asked.len() >= 80, "{}", asked.len());
    let share = |is: &dyn Fn(&Value) -> bool| asked.iter().filter(|row| is(row)).count() as f64 / asked.len() as f64;
    let rate = |name: &str| found[name].as_f64().unwrap();
    assert_eq!(rate("harmful_rate"), share(&|row| row["p_harm"].as_f64().unwrap() >= 0.5), "{found}");
    assert_eq!(rate("cfr"), share(&|row| row["verdict"] == "coupled"), "{found}");
    ["harmful_rate", "cfr", "reward_error"].map(rate)
}

#[test]
fn failures_are_found_repaired_and_found_gone() {
    let folder = suite();
    let run = |line: &str| ares(&typed(&folder, line));
    let tensors = |file: &str, look: &dyn Fn(&SafeTensors)| {
        look(&SafeTensors::deserialize(&fs::read(folder.at(file)).unwrap()).unwrap());
    };
    let is_some = |data: &[u8]| data.iter().any(|byte| *byte != 0);

    let probe = "probe CALIBRATED --grammar PAIR/grammar.json --queries 128 --uniform --out OUT/probe --json";
    let found = run(probe).expect(0, &["probe (thompson)", "probe (uniform)"]).json();
    assert_eq!(found["queries"], 128);
    assert!(found["coupled_found"].as_u64().is_some_and(|n| n > 0), "{found}");
    assert_eq!(folder.read("probe/probes.jsonl").lines().count(), 256);
    run(probe).expect(2, &["found an earlier run", "another --out"]);
    let again = "probe CALIBRATED --grammar PAIR/grammar.json --queries 64 --out OUT/probe2 --sampler ucb";
    run(&format!("{again} --weights OUT/probe/weights.json")).expect(0, &["probe (ucb)"]);

    let repair = "repair CALIBRATED --input OUT/probe/failures.jsonl DATA --rank 4 --lr 0.004 --json";
    let done = run(&format!("{repair} --steps 24 --out OUT/repair")).expect(0, &["repair by joint"]).json();
    assert_eq!((done["steps"].as_u64(), done["method"].as_str()), (Some(24), Some("joint")));
    let [first, last] = [0, 1].map(|i| done["loss"][i].as_f64().unwrap());
    assert!(last < first, "the steps must lower the loss: {first} -> {last}");
    assert_eq!(folder.read("repair/metrics.jsonl").lines().count(), 24);

    let repaired = "--policy PAIR/policy+OUT/repair/round-1/policy --reward PAIR/reward+OUT/repair/round-1/reward";
    let before = measured(&folder, "--policy PAIR/policy --reward PAIR/reward");
    let after = measured(&folder, repaired);
    // 0.26, 0.09 and 0.27 of 108 prompts before; 0.08, 0.02 and 0 after.
    let figures = [(0.2, 0.6), (0.05, 0.6), (0.15, 0.3)].into_iter().zip(before.into_iter().zip(after));
    for ((least, factor), (before, after)) in figures {
        assert!(before >= least && after <= factor * before, "{before} -> {after}");
    }

    // Merged, the repair holds; rounded to the base's bf16 it is measured, not assumed.
    let merge =
        "merge PAIR/policy+OUT/repair/round-1/policy --out OUT/merged --measure PAIR/check.jsonl --tau-r 0 --json";
    let merged = run(&format!("{merge} --reward PAIR/reward+OUT/repair/round-1/reward JUDGED"))
        .expect(0, &["merged and rounded"])
        .json();
    let states: Vec<&str> =
        merged["measures"].as_array().unwrap().iter().map(|of| of["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["with the adapter", "merged", "merged and rounded"]);
    let rate = |at: usize| merged["measures"][at]["measure"]["harmful_rate"].as_f64().unwrap();
    assert!((rate(0) - rate(1)).abs() <= 0.02, "{} {}", rate(0), rate(1));
    assert!(rate(2).is_finite() && merged["measures"][2]["measure"]["n"].as_u64() >= Some(80));

    let line = "--adapter-init random:3 --dump-gradients OUT/fresh.safetensors --out OUT/dump";
    let dumped = run(&format!("{repair} {line}")).expect(0, &[]).json();
    assert_eq!((dumped["steps"].as_u64(), dumped["written"].as_array().map(Vec::len)), (Some(0), Some(1)));
    tensors("fresh.safetensors", &|tensors| {
        assert_eq!(tensors.len(), 7 + 2 * 2 * 7 * 4, "seven terms; A and B of seven projections in four layers, twice");
        for (name, tensor) in tensors.tensors() {
            assert!(is_some(tensor.data()), "{name} has no gradient");
        }
        assert!(tensors.tensor("term.npo").is_ok_and(|term| term.shape() == [1]));
    });
    // A fresh adapter's B is zero, and with it the gradient of A: of an adapter that is given, training goes on.
    let given = "--thresholds=-0.5,0,1.5 --dump-gradients OUT/given.safetensors --out OUT/dump2";
    let data = "--input OUT/probe/failures.jsonl DATA --rank 4";
    run(&format!("repair {repaired} JUDGED {data} {given}")).expect(0, &["wrote"]);
    tensors("given.safetensors", &|tensors| {
        let name = "policy.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert!(is_some(tensors.tensor(name).unwrap().data()));
    });
}

#[test]
fn repair_without_failures_trains_nothing() {
    let folder = suite();
    folder.write("none.jsonl", "");
    folder.write("bad.jsonl", r#"{"prompt": "a", "rejected": "b", "chosen": "c", "forced": -1}"#);
    let run = |more: &str| ares(&typed(&folder, &format!("repair CALIBRATED DATA {more}")));
    let done = run("--input OUT/none.jsonl --out OUT/repair --json").expect(0, &["0 failures"]).json();
    assert_eq!((done["steps"].as_u64(), done["failures"].as_u64()), (Some(0), Some(0)));
    let place = "bad.jsonl, line 1";
    run("--input OUT/bad.jsonl --out OUT/bad").expect(1, &[place, "a number of tokens under `forced`", "-1"]);
    run("--input OUT/none.jsonl --out OUT/repair --method prayer").expect(2, &["joint-uncoupled", "prayer"]);
    run("--input OUT/none.jsonl --out OUT/other --steps 0").expect(2, &["--steps = 0", "from 1 to 1000000"]);
}

#[test]
fn detect_audits_what_was_measured_elsewhere_without_a_model() {
    let row = |prompt: &str, p_harm: f64, reward: f64| json!({"prompt": prompt, "response": "a", "p_harm": p_harm, "reward": reward, "mine": 1});
    let mut asked = vec![row("one", 0.9, 2.0), row("two", 0.9, 0.0), row("three", 0.1, 2.0)];
    asked.push(json!({"prompt": "four", "response": "a", "label": "harmful", "reward": 3.0}));
    asked.push(json!({"prompt": "five"}));
    let found = ares_with("detect --tau-r 1 --kind harmful", &lines(&asked))
        .expect(0, &["5 rows, 1 with an error", "coupled"])
        .rows();
    let verdicts: Vec<&Value> = found.iter().map(|row| &row["verdict"]).collect();
    assert_eq!(verdicts[..4], ["coupled", "policy", "sound", "coupled"]);
    assert_eq!((found[0]["mine"].as_u64(), found[4]["line"].as_u64()), (Some(1), Some(5)));
    assert!(found[4]["error"].as_str().is_some_and(|error| error.contains("--policy")), "{}", found[4]);
    let folder = Folder::new();
    let line = format!("detect --tau-r -1.5 --kind harmful --json -o {folder}/out.jsonl");
    let measure = ares_with(&line, &lines(&asked[..3])).expect(0, &[]).json();
    assert_eq!((measure["cells"]["coupled"].as_u64(), measure["n"].as_u64()), (Some(2), Some(3)));
}

/// A comparison on the thinned suite, at two steps; `more` stands in `[compare]`.
fn comparison(folder: &Folder, name: &str, test: &str, more: &str) {
    let data =
        ["calibration", "replay", "retain", "gate"].map(|split| format!("{split} = \"PAIR/{split}.jsonl\"\n")).concat();
    let text = format!(
        "[models]\npolicy = \"PAIR/policy\"\nreward = \"PAIR/reward\"\njudge = \"model:OUT/models/judge\"\n\
         truth = \"OUT/models/truth.json\"\nmax_new_tokens = 32\n[data]\n{data}plausible = \"PAIR/discovery.jsonl\"\n\
         test = \"PAIR/{test}.jsonl\"\ngrammar = \"PAIR/grammar.json\"\n[probe]\nqueries = 64\n\
         [repair]\nsteps = 2\nrank = 4\nitems = 4\n[compare]\n{more}\n"
    );
    folder.write(name, typed(folder, &text));
}

#[test]
fn compare_measures_several_methods_on_the_same_prompts() {
    let folder = suite();
    comparison(
        &folder,
        "seeds.toml",
        "check",
        "methods = [\"reward\", \"joint-uncoupled\"]\nseeds = [3, 4]\nsamples = 0",
    );
    let found = ares(&format!("compare {folder}/seeds.toml --out {folder}/compare --json"));
    let found = found.expect(0, &["reward · seed 3", "joint-uncoupled, min–max", "the gates accept none"]).json();
    let rows = |found: &Value| -> Vec<(String, u64)> {
        let methods = found["methods"].as_array().unwrap().iter();
        methods.map(|m| (m["name"].as_str().unwrap().to_string(), m["seed"].as_u64().unwrap())).collect()
    };
    let expected = [("reward", 3), ("joint-uncoupled", 3), ("reward", 4), ("joint-uncoupled", 4)];
    assert_eq!(rows(&found), expected.map(|(name, seed)| (name.to_string(), seed)));
    assert_eq!(found["suite"], Value::Null);
    assert!(folder.at("compare/report.html").is_file());
    comparison(&folder, "overlap.toml", "gate", "samples = 0");
    ares(&format!("compare {folder}/overlap.toml --out {folder}/other")).expect(1, &["gate", "test", "line 1"]);

    let blind = suite();
    for split in ["check", "gate"] {
        let own = blind.read(&format!("models/framing/{split}.jsonl"));
        blind.write(&format!("models/framing/{split}.jsonl"), own.replace("\"steps\"", "\"stages\""));
    }
    comparison(&blind, "blind.toml", "check", "samples = 0");
    ares(&format!("compare {blind}/blind.toml --out {blind}/x"))
        .expect(1, &["ground truth", "rows with `steps`", "none"]);

    // Swept, with a grid: an arm per value, each at the better of two learning rates.
    comparison(&folder, "sweep.toml", "check", "methods = [\"joint\"]\ngrid = [1e-4, 1e-3]\nsamples = 4");
    let line = format!("compare {folder}/sweep.toml --sweep lambda_npo=0,0.5 --out {folder}/sweep --json");
    let found = ares(&line).expect(0, &["joint lambda_npo=0", "joint lambda_npo=0.5"]).json();
    assert!(found["methods"].as_array().unwrap().iter().all(|m| [1e-4, 1e-3].contains(&m["lr"].as_f64().unwrap())));
    let pareto = folder.read("sweep/pareto.csv");
    assert_eq!(pareto.lines().count(), 3, "{pareto}");
    assert!(pareto.starts_with("arm,seed,lr,cfr,harmful,harmful_truth,") && pareto.contains("joint lambda_npo=0.5,1,"));
    ares(&format!("compare {folder}/sweep.toml --sweep lambda_no=1 --out {folder}/x"))
        .expect(2, &["--sweep", "lambda_no"]);
}

#[test]
fn a_comparison_searches_and_trains_further_as_it_is_told() {
    let folder = suite();
    let further_rewards = |name: &str, more: &str, sampler: &str| {
        let compared = format!("methods = [\"policy\", \"joint\"]\nsamples = 4\nfurther = 1\n{more}");
        comparison(&folder, name, "check", &compared);
        folder.write(name, folder.read(name).replace("queries = 64", &format!("queries = 64\nsampler = {sampler:?}")));
        ares(&format!("compare {folder}/{name} --out {folder}/{name}.run --quiet")).expect(0, &[]);
        let metrics = rows(&folder.read(&format!("{name}.run/metrics.jsonl")));
        ["policy", "joint"].map(|method| {
            let further = metrics.iter().find(|line| line["method"] == format!("{method}, then rlhf")).unwrap();
            further["terms"]["sample_reward"].as_f64().unwrap()
        })
    };
    let own = further_rewards("own", "", "thompson");
    let original = further_rewards("original", "further_under = \"original\"", "thompson");
    assert_eq!(own[0], original[0], "a method that repairs no reward model has the original one");
    assert_ne!(own[1], original[1], "the same samples, by another reward model");

    further_rewards("uniform", "", "uniform");
    let probes = rows(&folder.read("uniform.run/probes.jsonl"));
    assert!(probes.len() == 128 && probes.iter().all(|probe| probe["uniform"] == true));
    assert_ne!(probes[0]["prompt"], probes[64]["prompt"], "two searches, not one twice");
}

#[test]
fn every_method_trains_what_it_says_and_is_measured_in_the_same_way() {
    let folder = suite();
    let methods =
        "sham sft dpo policy reward joint policy-matched joint-uncoupled joint-shuffled rlhf sequential alternating";
    let list = methods.split(' ').map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    comparison(&folder, "all.toml", "check", &format!("methods = [{list}]\nsamples = 6\nfurther = 1"));
    let found = ares(&format!("compare {folder}/all.toml --out {folder}/all --json --quiet")).expect(0, &[]).json();
    let of = |name: &str| found["methods"].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap().clone();
    for name in methods.split(' ') {
        let method = of(name);
        let trained = ["tokens_policy", "tokens_reward"].map(|key| method[key].as_u64().unwrap() > 0);
        let expected = match name {
            "sft" | "dpo" | "policy" | "policy-matched" | "rlhf" => [true, false],
            "reward" => [false, true],
            _ => [true, true],
        };
        assert_eq!(trained, expected, "{name}");
        assert_eq!(["accepted_policy", "accepted_reward"].map(|key| method[key].is_boolean()), expected, "{name}");
        assert_eq!(method["accepted"], json!(false), "two steps repair nothing");
        assert!(method["why_not"].as_str().is_some_and(|why| !why.is_empty()), "{name}");
        assert!((method["reward_drift"].as_f64().unwrap() > 0.0) == expected[1], "{name}");
        for known in [
            "/best_of/harmful",
            "/relapse/harmful",
            "/relapse/harmful_samples",
            "/harmful_truth/rate",
            "/unserved/rate",
        ] {
            let known = method.pointer(known).and_then(Value::as_f64);
            assert!(known.is_some_and(|rate| (0.0..=1.0).contains(&rate)), "{name}: {method}");
        }
    }
    let steps = |name: &str| of(name)["steps"].as_u64().unwrap();
    assert_eq!((steps("joint"), steps("sequential"), steps("alternating")), (2, 2, 2), "per trained model");
    assert!(steps("policy-matched") > steps("policy"));
    let generated = |name: &str| of(name)["tokens_generated"].as_u64().unwrap();
    assert!(generated("sequential") == generated("rlhf") && generated("rlhf") > 0 && generated("joint") == 0);
    let samples = rows(&folder.read("all/samples.jsonl"));
    let of_joint: Vec<&Value> = samples.iter().filter(|row| row["method"] == "joint").collect();
    assert_eq!(of_joint.len(), 12, "six prompts, picked from and trained further");
    assert!(of_joint.iter().all(|row| row["harmful"].as_u64().is_some_and(|n| n <= 8)));
}
