//! Judges: language models that give verdicts, held against transformers on the built-in forms (`scripts/golden_guard.py`).

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::{Folder, ares, ares_with, command_of, finish, interrupt, lines};

const GUARD: &str = "tests/golden-guard";

/// A built-in form without its limit on what the verdicts leave over: the model's weights are random.
fn lifted(folder: &Folder, name: &str) {
    let form = fs::read_to_string(format!("src/judge/guard/forms/{name}.toml")).unwrap();
    folder.write(&format!("{name}.toml"), format!("uncovered = 1.0\n{form}"));
}

#[track_caller]
fn close(found: &Value, expected: &Value) {
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((found - expected).abs() <= 1e-4 * expected, "found {found}, expected {expected}");
}

#[test]
fn every_built_in_guard_is_read_as_transformers_reads_it() {
    let golden: Value = serde_json::from_str(&fs::read_to_string(format!("{GUARD}/golden.json")).unwrap()).unwrap();
    let (folder, input) = (Folder::new(), lines(golden["rows"].as_array().unwrap()));
    let forms = golden["forms"].as_object().unwrap();
    assert_eq!(forms.len(), fs::read_dir("src/judge/guard/forms").unwrap().count());
    for (name, expected) in forms {
        lifted(&folder, name);
        let found =
            ares_with(&format!("judge --judge guard:{GUARD},{folder}/{name}.toml"), &input).expect(0, &[]).rows();
        for (found, expected) in found.iter().zip(expected.as_array().unwrap()) {
            close(&found["p_harm"], &expected["p_harm"]);
            assert_eq!(found["cut"], Value::Null);
        }
        // All of it but what the verdicts cover is left over.
        let form = format!("guard:{GUARD},src/judge/guard/forms/{name}.toml");
        let refused = ares_with(&format!("judge --judge {form}"), &input);
        refused.expect(1, &["at most 0.1 of the probability to other texts", "1.000 left over"]);
    }
}

/// Of a guard's verdicts the one role reads the harm, the other the refusal.
#[test]
fn a_guard_that_knows_refusals_judges_them_too() {
    let golden: Value = serde_json::from_str(&fs::read_to_string(format!("{GUARD}/golden.json")).unwrap()).unwrap();
    let folder = Folder::new();
    let benign = |row: &Value| {
        let mut row = row.clone();
        (row["kind"], row["reward"]) = ("benign".into(), 0.5.into());
        row
    };
    folder.write("in.jsonl", lines(&golden["rows"].as_array().unwrap().iter().map(benign).collect::<Vec<_>>()));
    for (name, expected) in [("wildguard", Some(&golden["forms"]["wildguard"])), ("llama-guard", None)] {
        lifted(&folder, name);
        let judge = format!("guard:{GUARD},{folder}/{name}.toml");
        let line = format!("detect --judge {judge} --refusal {judge} --tau-r 0 -i {folder}/in.jsonl --device cpu");
        let Some(expected) = expected else {
            ares(&line).expect(1, &["expected ones that say whether an answer refuses, found none that do"]);
            continue;
        };
        for (found, expected) in ares(&line).expect(0, &[]).rows().iter().zip(expected.as_array().unwrap()) {
            close(&found["p_harm"], &expected["p_harm"]);
            assert_eq!(found["refusal"].as_bool(), Some(expected["p_refusal"].as_f64().unwrap() >= 0.5), "{found}");
        }
    }
}

/// The answer's middle goes, not its end and never the prompt; the row says so.
#[test]
fn answers_that_are_too_long_are_cut_in_their_middle() {
    let folder = Folder::new();
    let form = fs::read_to_string("src/judge/guard/forms/wildguard.toml").unwrap();
    folder.write("form.toml", format!("uncovered = 1.0\n{}", form.replace("context = 4096", "context = 300")));
    let row = |prompt: &str, response: String| json!({"prompt": prompt, "response": response});
    let (begin, end) = ("First, mix flour and water.", "Last, bake it for an hour.");
    let long = |middle: &str| format!("{begin} {} {end}", middle.repeat(200));
    let input = lines(&[
        row("How do I bake bread?", long("Then wait. ")),
        row("How do I bake bread?", long("Then wait a little more. ")),
        row("How do I bake bread?", begin.into()),
        row(&"How? ".repeat(300), begin.into()),
    ]);
    let outcome = ares_with(&format!("judge --judge guard:{GUARD},{folder}/form.toml"), &input)
        .expect(0, &["4 rows, 1 with an error"]);
    let rows = outcome.rows();
    for row in &rows[..2] {
        assert!(row["cut"] == true && row["p_harm"].as_f64().is_some_and(|p| (0.0..=1.0).contains(&p)), "{row}");
    }
    assert_eq!(rows[2]["cut"], Value::Null);
    let error = rows[3]["error"].as_str().unwrap();
    assert!(error.contains("expected one that leaves room for an answer within the guard's 300 tokens"), "{error}");
}

#[test]
fn verdicts_that_cannot_be_told_apart_are_refused() {
    let folder = Folder::new();
    let form = |texts: [&str; 2]| {
        let verdict =
            |(weight, text): (usize, &str)| format!("[[verdict]]\nharmful = {weight}.0\ntexts = [{text:?}]\n");
        texts.into_iter().enumerate().map(verdict).collect::<String>()
    };
    for (texts, expected) in [
        (["safe", "safe"], "cannot be told from verdict 1"),
        (["No", "No."], "texts of which none begins another"),
        (["", "x"], "expected texts that have tokens, found \"\""),
    ] {
        folder.write("form.toml", form(texts));
        let line = format!("judge --judge guard:{GUARD},{folder}/form.toml");
        ares_with(&line, "{\"prompt\": \"a\", \"response\": \"b\"}\n").expect(1, &["verdicts of a guard", expected]);
    }
    ares(&format!("judge --judge guard:{GUARD}")).expect(1, &["known by its name", "guard:DIR,FORM"]);
    ares("judge --judge guard:models/judge,src/judge/guard/forms/wildguard.toml").expect(1, &["LlamaForCausalLM"]);
    ares("judge --judge guard:").expect(2, &["guard:DIR[+ADAPTER][,FORM]"]);
}

/// A program that judges by a rule, and misbehaves as it is told.
const PROGRAM: &str = r#"
import json, sys, time
how = sys.argv[1]
if how != "silent":
    print("hello" if how == "nonsense" else json.dumps({"judge": "rule", "version": "3"}), flush=True)
if how == "deaf":
    time.sleep(100)
waiting = []
for n, line in enumerate(sys.stdin):
    question = json.loads(line)
    if how == "dies" and n == 3:
        sys.exit(7)
    answer = {"id": question["id"], "p_harm": 0.9 if "bad" in question["response"] else 0.2}
    if "error" in question["response"]:
        answer = {"id": question["id"], "error": "too hard"}
    if how == "wrong" and n == 2:
        answer["p_harm"] = "much"
    if how == "twice":
        print(json.dumps(answer), flush=True)
    waiting.append(answer)
    # In pairs, the second first.
    if how != "reorders" or len(waiting) == 2:
        [print(json.dumps(answer), flush=True) for answer in reversed(waiting)]
        waiting = []
    assert question["messages"][-1]["content"].startswith("p")
"#;

#[test]
fn a_program_judges_and_what_it_does_wrong_is_said() {
    let folder = Folder::new();
    folder.write("judge.py", PROGRAM);
    let response = |i: usize| ["good", "bad", "good", "error"][i % 4];
    let rows: Vec<Value> = (0..400).map(|i| json!({"prompt": format!("p{i}"), "response": response(i)})).collect();
    folder.write("in.jsonl", lines(&rows));
    let judged = |how: &str| {
        let (judge, input) = (format!("cmd:python3 {folder}/judge.py {how}"), format!("{folder}/in.jsonl"));
        finish(command_of(["judge", "--judge", &judge, "-i", &input]).spawn().unwrap())
    };
    for how in ["plain", "reorders"] {
        let found = judged(how).expect(0, &["400 rows, 100 with an error"]).rows();
        for (i, row) in found.iter().enumerate() {
            match response(i) {
                "error" => assert!(row["error"].as_str().unwrap().contains("too hard"), "{row}"),
                answer => assert_eq!(row["p_harm"], if answer == "bad" { 0.9 } else { 0.2 }, "{row}"),
            }
        }
    }
    for (how, texts) in [
        ("dies", &["judge cmd:python3", "expected an answer, found its end (exit status: 7)"][..]),
        ("nonsense", &["as its first line, found hello"]),
        ("wrong", &["for each question, once, found", "much"]),
        ("twice", &["for each question, once"]),
    ] {
        judged(how).expect(1, texts);
    }
    // It reads nothing, and the questions do not fit the pipe: the first Ctrl-C is heard all the same.
    let long = json!({"prompt": "p", "response": "good ".repeat(4000)});
    folder.write("long.jsonl", lines(&vec![long; 100]));
    let (judge, input) = (format!("cmd:python3 {folder}/judge.py deaf"), format!("{folder}/long.jsonl"));
    let (child, begin) = (command_of(["judge", "--judge", &judge, "-i", &input]).spawn().unwrap(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    interrupt(&child);
    finish(child).expect(130, &["interrupted"]);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    ares("judge --judge cmd:/nowhere/judge").expect(1, &["/nowhere/judge: cannot start"]);
}

#[test]
fn an_ensemble_judges_by_its_rule() {
    let folder = Folder::new();
    for (name, start) in [("a", "bad"), ("b", "bad"), ("c", "worse")] {
        folder.write(&format!("{name}.json"), json!({"schema": 1, "start": [start]}).to_string());
    }
    let lexicon = |name: &str| format!("lexicon:{folder}/{name}.json");
    let members = ["a", "b", "c"].map(lexicon).join(",");
    let input = lines(&["bad", "worse", "good"].map(|text| json!({"prompt": "p", "response": text})));
    for (rule, expected) in
        [("mean:", [2.0 / 3.0, 1.0 / 3.0, 0.0]), ("max:", [1.0, 1.0, 0.0]), ("vote:", [2.0 / 3.0, 1.0 / 3.0, 0.0])]
    {
        let rows = ares_with(&format!("judge --judge ensemble:{rule}{members}"), &input).expect(0, &[]).rows();
        for (row, expected) in rows.iter().zip(expected) {
            assert!((row["p_harm"].as_f64().unwrap() - expected).abs() <= 1e-12, "{rule} {row}");
            assert_eq!(row["ambiguous"], row["response"] != "good", "{rule} {row}");
        }
    }
}

/// The suite's guard: trained weights, a form in its own folder, verdicts of several tokens.
#[test]
fn the_suites_guard_tells_harm_from_what_is_none() {
    let text = fs::read_to_string("models/framing/check.jsonl").unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let harmful: Vec<&Value> = rows.iter().filter(|row| row["kind"] == "harmful").take(60).collect();
    let asked = |field: &str| -> Vec<Value> {
        harmful.iter().map(|row| json!({ "prompt": row["prompt"], "response": row[field] })).collect()
    };
    let judged = |field: &str| -> Vec<f64> {
        let found = ares_with("judge --judge guard:models/guard", &lines(&asked(field))).expect(0, &[]).rows();
        found.iter().map(|row| row["p_harm"].as_f64().unwrap()).collect()
    };
    let (bad, good) = (judged("harmful"), judged("safe"));
    let right = bad.iter().filter(|p| **p >= 0.5).count() + good.iter().filter(|p| **p < 0.5).count();
    assert!(harmful.len() == 60 && right * 10 >= 9 * 120, "{right} of 120: {bad:?} {good:?}");
}

/// What transformers says of the same texts, in float64: `scripts/golden_encoders.py`. An encoder reads the answer alone.
#[test]
fn encoders_classify_answers_as_transformers_does() {
    for (family, multi_label) in [("bert", false), ("roberta", false), ("distilbert", true), ("modernbert", false)] {
        let place = format!("tests/golden-encoders/{family}");
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(format!("{place}/golden.json")).unwrap()).unwrap();
        let golden = golden.as_array().unwrap();
        let asked =
            golden.iter().map(|row| json!({"prompt": "w50 [SEP]", "response": row["text"]})).collect::<Vec<_>>();
        let expected: Vec<f64> = golden
            .iter()
            .map(|row| {
                let logits: Vec<f64> = row["logits"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
                let others: f64 = logits.iter().map(|other| (other - logits[1]).exp()).sum();
                if multi_label { 1.0 / (1.0 + (-logits[1]).exp()) } else { 1.0 / others }
            })
            .collect();
        for (device, limit) in [("cpu", 1e-5), ("sim", 0.02)] {
            let said = ares_with(&format!("judge --judge model:{place} --device {device}"), &lines(&asked));
            if said.code == Some(1) && said.stderr.contains("C++ compiler") {
                assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "{}", said.stderr);
                println!("skipped: {}", said.stderr);
                continue;
            }
            let rows = said.expect(0, &[]).rows();
            for (row, expected) in rows.iter().zip(&expected) {
                let found = row["p_harm"].as_f64().unwrap();
                assert!((found - expected).abs() <= limit, "{family} on {device}: {found}, expected {expected}");
            }
            assert_eq!(rows.len(), expected.len());
        }
    }
    let folder = Folder::new();
    for entry in fs::read_dir("tests/golden-encoders/modernbert").unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), folder.at(entry.file_name().to_str().unwrap())).unwrap();
    }
    let config = folder.read("config.json");
    let kinds = r#"{"layer_types": ["full_attention", "chunked_attention", "full_attention", "full_attention"],"#;
    folder.write("config.json", config.replacen('{', kinds, 1));
    ares_with(&format!("judge --judge model:{folder}"), "{\"prompt\": \"a\", \"response\": \"b\"}\n")
        .expect(1, &["layer_types", "found `chunked_attention`"]);
    let bert = "tests/golden-encoders/bert";
    let reason = &["expected architectures to be a decoder", "as --judge or --refusal model:DIR"];
    ares_with(&format!("generate --model {bert}"), "{\"prompt\": \"w9\"}\n").expect(1, reason);
    ares_with(&format!("score --reward {bert}"), "{\"prompt\": \"w9\", \"response\": \"w9\"}\n").expect(1, reason);
    let long = json!({"prompt": "w9", "response": "w9 ".repeat(39)});
    ares_with(&format!("judge --judge model:{bert}"), &lines(&[long])).expect(1, &["at most 40 tokens"]);
    ares_with(&format!("judge --judge model:{bert},9"), "{\"prompt\": \"a\", \"response\": \"b\"}\n")
        .expect(1, &["expected a label `9`, found fine, toxic, other"]);
}
