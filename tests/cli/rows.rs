//! `generate`, `score`, `logprob`, `judge`, `inspect`: rows in, rows out.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use super::support::{ares, ares_with, command, golden, lines, model, repository};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `DIR` and `DIR+ADAPTER` of a golden checkpoint, with the values that belong to them.
fn versions<'a>(folder: &Path, name: &str, golden: &'a Value) -> [(String, &'a Vec<Value>); 2] {
    let adapter = repository("tests/golden").join(name).join("adapter");
    [
        (text(folder).to_string(), golden["base"].as_array().unwrap()),
        (format!("{}+{}", text(folder), adapter.display()), golden["adapted"].as_array().unwrap()),
    ]
}

fn token_rows(golden: &Value) -> Vec<Value> {
    let row = |s: &Value| json!({"tokens": s["tokens"], "prompt_tokens": s["prompt_tokens"], "mine": [1, {"a": null}]});
    golden["sequences"].as_array().unwrap().iter().map(row).collect()
}

#[track_caller]
fn close(found: &Value, expected: &Value) {
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((found - expected).abs() <= 1e-4, "found {found}, transformers has {expected}");
}

#[test]
fn log_probabilities_are_those_of_transformers() {
    for name in ["llama-causal", "qwen2-causal", "qwen3-causal", "mistral-causal"] {
        let (folder, golden) = (model(name), golden(name));
        let rows = token_rows(&golden);
        for (spec, expected) in versions(folder.path(), name, &golden) {
            let found = ares_with(&["logprob", "--model", &spec, "--per-token"], &lines(&rows)).expect(0, &[]).rows();
            assert_eq!(found.len(), rows.len());
            for ((found, row), expected) in found.iter().zip(&rows).zip(expected) {
                let logprobs = expected["logprobs"].as_array().unwrap();
                assert_eq!(found["mine"], row["mine"], "unknown fields are carried through");
                assert_eq!(found["n"], logprobs.len());
                found["logprobs"].as_array().unwrap().iter().zip(logprobs).for_each(|(f, e)| close(f, e));
                close(&found["logprob"], &json!(logprobs.iter().map(|l| l.as_f64().unwrap()).sum::<f64>()));
            }
        }
    }
}

#[test]
fn rewards_are_those_of_transformers() {
    for name in ["llama-reward", "qwen3-reward", "mistral-reward", "llama3-reward"] {
        let (folder, golden) = (model(name), golden(name));
        for (spec, expected) in versions(folder.path(), name, &golden) {
            let found = ares_with(&["score", "--reward", &spec], &lines(&token_rows(&golden))).expect(0, &[]).rows();
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).for_each(|(found, expected)| close(&found["reward"], &expected["reward"][0]));
        }
    }
}

#[test]
fn greedy_answers_are_those_of_transformers_likeliest_tokens() {
    let (folder, golden) = (model("llama-causal"), golden("llama-causal"));
    for (sequence, expected) in golden["sequences"].as_array().unwrap().iter().zip(golden["base"].as_array().unwrap()) {
        let prompt =
            sequence["tokens"].as_array().unwrap()[..sequence["prompt_tokens"].as_u64().unwrap() as usize].to_vec();
        let position = expected["positions"].as_array().unwrap().iter().position(|p| *p == prompt.len() - 1).unwrap();
        let logits: Vec<f64> =
            expected["logits"][position].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
        let likeliest = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        let row = json!({ "tokens": prompt }).to_string();
        let args = ["generate", "--model", text(folder.path()), "--greedy", "--max-new-tokens", "1", "--ignore-eos"];
        let found = ares_with(&args, &row).expect(0, &[]).rows();
        assert_eq!(found[0]["tokens_out"], json!([likeliest]));
    }
}

#[test]
fn a_sampled_answer_depends_on_its_seed_and_its_row_alone() {
    let folder = model("llama-causal");
    let rows: Vec<Value> = (0..90)
        .map(|i| json!({"id": format!("r{i}"), "prompt": format!("w{} w{}", 20 + i % 50, 30 + i % 7)}))
        .collect();
    let generate = |rows: &[Value], seed: &str| {
        let args = ["generate", "--model", text(folder.path()), "--max-new-tokens", "12", "--seed", seed];
        ares_with(&args, &lines(rows)).expect(0, &[]).rows()
    };
    let all = generate(&rows, "7");
    assert_eq!(all, generate(&rows, "7"));
    assert_ne!(all, generate(&rows, "8"));
    assert_eq!(generate(&rows[41..42], "7")[0], all[41], "alone");
    let mut backwards: Vec<Value> = rows.iter().rev().cloned().collect();
    backwards.push(json!({"id": "another", "prompt": "w40"}));
    let found = generate(&backwards, "7");
    for (i, row) in all.iter().enumerate() {
        assert_eq!(found[89 - i], *row, "in another order and company");
    }
    for row in &all {
        let tokens = row["tokens_out"].as_array().unwrap();
        assert!((1..=12).contains(&tokens.len()) && row["response"].is_string());
        assert_eq!(row["finish"], if tokens.last() == Some(&json!(2)) { "stop" } else { "length" }, "{row}");
    }
}

#[test]
fn a_bad_row_is_an_error_row_and_never_a_lost_file() {
    let folder = model("llama-causal");
    let long = vec!["w5"; 400].join(" ");
    let input = [
        r#"{"id": 1, "prompt": "w20 w21", "response": "w22"}"#.to_string(),
        "{not json".to_string(),
        r#"{"prompt": "", "response": "w22"}"#.to_string(),
        r#"{"question_without_answer": 1}"#.to_string(),
        String::new(),
        r#"{"tokens": [5, 101], "prompt_tokens": 1}"#.to_string(),
        r#"{"tokens": [5, 6], "prompt_tokens": 2}"#.to_string(),
        json!({"prompt": long, "response": "w22"}).to_string(),
        r#"[1, 2]"#.to_string(),
        r#"{"messages": [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21"}], "id": "last"}"#
            .to_string(),
    ]
    .join("\n");
    let args = ["logprob", "--model", text(folder.path())];
    let found = ares_with(&args, &input).expect(0, &["9 rows, 7 with an error"]).rows();
    assert_eq!(found.len(), 9, "a blank line is no row");
    assert!(found[0]["logprob"].as_f64().is_some_and(f64::is_finite) && found[0]["id"] == 1);
    assert!(found[8]["logprob"].as_f64().is_some_and(f64::is_finite) && found[8]["id"] == "last");
    let said = [
        (1, 2, "a JSON object"),
        (2, 3, "empty"),
        (3, 4, "`prompt`, `messages` or `tokens`"),
        (4, 6, "below 101"),
        (5, 7, "`prompt_tokens` from 1 to 1"),
        (6, 8, "at most 256 tokens"),
        (7, 9, "a JSON object"),
    ];
    for (row, line, what) in said {
        let error = found[row]["error"].as_str().unwrap_or_else(|| panic!("row {row} has no error: {}", found[row]));
        assert_eq!(found[row]["line"], line);
        assert!(error.contains(what) && error.contains(&format!("line {line}")), "{what:?}: {error}");
        assert!(found[row].get("logprob").is_none());
    }
}

#[test]
fn ids_beside_a_text_must_be_its_own() {
    let (causal, reward) = (model("llama-causal"), model("llama-reward"));
    // The template makes `w10 w20 w21 w11` of it.
    let prompt = "w20 w21";
    let row = |tokens: &[u32]| json!({"prompt": prompt, "tokens": tokens});
    let args = ["generate", "--model", text(causal.path()), "--greedy", "--max-new-tokens", "4"];
    let rows = [row(&[10, 20, 21, 11]), row(&[10, 20, 22, 11]), json!({"prompt": prompt})];
    let found = ares_with(&args, &lines(&rows)).expect(0, &["3 rows, 1 with an error"]).rows();
    assert_eq!(found[0]["tokens_out"], found[2]["tokens_out"]);
    let refused = |row: &Value| {
        let error = row["error"].as_str().unwrap_or_default();
        assert!(error.contains("line 2: expected `tokens` to be those of the prompt"), "{row}");
    };
    refused(&found[1]);
    let rows = [row(&[10, 20, 21, 11, 30, 2]), row(&[10, 20, 22, 11, 30, 2])];
    let found = ares_with(&["score", "--reward", text(reward.path())], &lines(&rows)).expect(0, &["1 with"]).rows();
    assert!(found[0]["reward"].is_number());
    refused(&found[1]);
    let row = json!({"prompt": "p", "tokens": [1], "response": "a", "p_harm": 0.1, "reward": 0});
    let found = ares_with(&["detect", "--tau-r", "1"], &lines(&[row])).expect(1, &[]).rows();
    assert!(found[0]["error"].as_str().is_some_and(|error| error.contains("found both")), "{}", found[0]);
}

#[test]
fn strict_stops_at_the_first_bad_row_and_writes_nothing() {
    let (folder, out) = (model("llama-causal"), tempfile::tempdir().unwrap());
    let (input, output) = (out.path().join("in.jsonl"), out.path().join("out.jsonl"));
    fs::write(&input, "{\"prompt\": \"w20\", \"response\": \"w21\"}\n{\"prompt\": \"\", \"response\": \"w21\"}\n")
        .unwrap();
    let args = ["logprob", "--model", text(folder.path()), "-i", text(&input), "-o", text(&output), "--strict"];
    ares(&args).expect(1, &["in.jsonl, line 2"]);
    fs::write(&input, "{\"prompt\": \"w20\", \"response\": \"w21\"}\nno json\n").unwrap();
    ares(&args).expect(1, &["in.jsonl, line 2", "a JSON object"]);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "only the input may be there");
    let all_bad = ares_with(&["logprob", "--model", text(folder.path())], "no json\n").expect(1, &["line 1"]);
    assert_eq!(all_bad.rows().len(), 1, "the error row is written all the same");
}

#[test]
fn files_in_and_out_and_the_result_as_json() {
    let (folder, out) = (model("llama-reward"), tempfile::tempdir().unwrap());
    let (input, output) = (out.path().join("in.csv"), out.path().join("out.jsonl"));
    fs::write(&input, "goal,response,mine\nw20 w21,w22,x\nw23,w24 w25,\"a, b\"\n").unwrap();
    let args = ["score", "--reward", text(folder.path()), "-i", text(&input), "-o", text(&output), "--json", "--quiet"];
    let done = ares(&args).expect(0, &[]);
    assert_eq!(
        (done.json()["rows"].as_u64(), done.json()["errors"].as_u64(), done.stderr.as_str()),
        (Some(2), Some(0), "")
    );
    let rows: Vec<Value> =
        fs::read_to_string(&output).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(rows.iter().all(|row| row["reward"].as_f64().is_some_and(f64::is_finite)), "{rows:?}");
    assert_eq!((rows[1]["mine"].as_str(), rows.len()), (Some("a, b"), 2));
    ares(&["score", "--reward", text(folder.path()), "--json"]).expect(2, &["--output"]);
}

#[test]
fn what_cannot_work_is_said_before_any_work() {
    let (causal, reward) = (model("llama-causal"), model("llama-reward"));
    let (causal, reward) = (text(causal.path()), text(reward.path()));
    ares(&["score", "--reward", causal])
        .expect(1, &["LlamaForSequenceClassification", "LlamaForCausalLM", "config.json"]);
    let two = model("qwen2-reward");
    ares(&["score", "--reward", text(two.path())]).expect(1, &["one label", "2 labels"]);
    ares(&["generate", "--model", reward]).expect(1, &["LlamaForCausalLM", "LlamaForSequenceClassification"]);
    ares(&["generate", "--model", "/nowhere/model"]).expect(1, &["/nowhere/model", "a model's folder"]);
    ares(&["generate", "--model", causal, "-i", "/nowhere/in.jsonl"]).expect(1, &["/nowhere/in.jsonl", "cannot read"]);
    ares(&["generate", "--model", causal, "-o", "/nowhere/out.jsonl"])
        .expect(1, &["/nowhere/out.jsonl", "cannot write"]);
    ares(&["generate", "--model", causal, "-o", "/"]).expect(2, &["expected the path of a file"]);
    ares(&["generate", "--model", &format!("{causal}+/nowhere/adapter")]).expect(1, &["/nowhere/adapter"]);
    ares(&["generate", "--model", causal, "--greedy", "--top-k", "3"]).expect(2, &["cannot be used with"]);
    ares(&["generate", "--model", causal, "--temperature", "NaN"]).expect(2, &["a number from 0 up"]);
    ares(&["generate", "--model", causal, "--max-new-tokens", "0"]).expect(2, &["max-new-tokens"]);
    ares(&["generate"]).expect(2, &["--model"]);
    for device in ["cuda:7", "cuda:999"] {
        ares(&["generate", "--model", causal, "--device", device]).expect(1, &["no usable device", "--device cpu"]);
    }
}

#[test]
fn an_empty_file_of_rows_is_an_empty_file_of_rows() {
    let folder = model("llama-causal");
    let done = ares_with(&["generate", "--model", text(folder.path())], "").expect(0, &["0 rows", "device: cpu"]);
    assert_eq!(done.stdout, "");
    let quiet = ares_with(&["generate", "--model", text(folder.path()), "--quiet"], "").expect(0, &[]);
    assert_eq!(quiet.stderr, "");
}

#[test]
fn a_damaged_checkpoint_is_refused_with_its_file_named() {
    let folder = model("llama-causal");
    let weights = folder.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&weights, bytes).unwrap();
        ares(&["generate", "--model", text(folder.path())]).expect(1, &["model.safetensors", "expected", "found"]);
    };
    refused(&whole[..whole.len() - 100]);
    refused(b"");
    refused(&[255; 4096]);
    refused(&[&(1u64 << 63).to_le_bytes()[..], b"{}"].concat());
    let mut infinite = whole.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    refused(&infinite);
}

#[test]
fn a_lexicon_judges_texts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("harm.json");
    fs::write(
        &file,
        r#"{"schema": 1, "match": "any", "ignore_case": true, "start": ["Sure."], "contains": ["First,"]}"#,
    )
    .unwrap();
    let spec = format!("lexicon:{}", file.display());
    let rows = [
        json!({"prompt": "p", "response": "sure. it is"}),
        json!({"prompt": "p", "response": "No."}),
        json!({"tokens": [1]}),
    ];
    let found = ares_with(&["judge", "--judge", &spec], &lines(&rows)).expect(0, &["3 rows, 1 with an error"]).rows();
    assert_eq!((found[0]["p_harm"].as_f64(), found[0]["ambiguous"].as_bool()), (Some(1.0), Some(false)));
    assert_eq!((found[1]["p_harm"].as_f64(), found[1]["response"].as_str()), (Some(0.0), Some("No.")));
    assert!(found[2]["error"].as_str().is_some_and(|error| error.contains("line 3")));
    ares(&["judge", "--judge", "oracle:x"]).expect(2, &["model:DIR or lexicon:FILE"]);
    ares(&["judge", "--judge", "lexicon:/nowhere/x.json"]).expect(1, &["/nowhere/x.json"]);
    ares(&["judge", "--judge", &spec, "--harm-threshold", "2"]).expect(2, &["from 0 to 1"]);
}

#[test]
fn a_classifier_judges_by_the_sigmoid_of_its_score() {
    let folder = model("llama-reward");
    let row = json!({"prompt": "w20 w21", "response": "w22"});
    let reward =
        ares_with(&["score", "--reward", text(folder.path())], &lines(std::slice::from_ref(&row))).rows()[0]["reward"]
            .as_f64()
            .unwrap();
    let spec = format!("model:{}", folder.path().display());
    let found = ares_with(&["judge", "--judge", &spec], &lines(&[row])).expect(0, &[]).rows();
    close(&found[0]["p_harm"], &json!(1.0 / (1.0 + (-reward).exp())));
}

#[test]
fn inspect_says_what_a_folder_holds() {
    let folder = model("qwen3-causal");
    let table = ares(&["inspect", text(folder.path())]).expect(0, &[]).stdout;
    for word in ["Qwen3", "language model", "norm over q and k", "chat template", "yes", "F32"] {
        assert!(table.contains(word), "{word:?} is missing in: {table}");
    }
    let adapter = repository("tests/golden/qwen3-causal/adapter");
    let spec = format!("{}+{}", folder.path().display(), adapter.display());
    let found = ares(&["inspect", &spec, "--json"]).expect(0, &[]).json();
    assert_eq!((found["family"].as_str(), found["problems"].as_array().map(Vec::len)), (Some("Qwen3"), Some(0)));
    assert!(found["adapter"]["rank"].as_u64().is_some_and(|rank| rank > 0) && found["parameters"].as_u64().is_some());
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let found = ares(&["inspect", text(folder.path()), "--json"]).expect(1, &["tokenizer.json"]).json();
    assert_eq!(found["problems"].as_array().map(Vec::len), Some(1), "the rest is reported all the same: {found}");
    assert!(found["parameters"].as_u64().is_some());
    fs::write(folder.path().join("config.json"), r#"{"architectures": ["GPT2LMHeadModel"]}"#).unwrap();
    ares(&["inspect", text(folder.path())]).expect(1, &["GPT2LMHeadModel", "Llama"]);
}

/// Starts a generation that takes minutes, lets it come to work, and asks it to stop.
#[cfg(unix)]
fn interrupted(folder: &Path, signals: u32) -> (super::support::Outcome, std::path::PathBuf) {
    let (checkpoint, input, output) = (model("llama-causal"), folder.join("in.jsonl"), folder.join("out.jsonl"));
    let rows: Vec<Value> = (0..40_000).map(|i| json!({"prompt": format!("w{}", 12 + i % 80)})).collect();
    fs::write(&input, lines(&rows)).unwrap();
    let args =
        ["generate", "--model", text(checkpoint.path()), "--ignore-eos", "-i", text(&input), "-o", text(&output)];
    let child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(4));
    for _ in 0..signals {
        let id = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
        std::thread::sleep(Duration::from_millis(30));
    }
    (super::support::finish(child), output)
}

#[cfg(unix)]
#[test]
fn ctrl_c_finishes_the_unit_and_keeps_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let (outcome, output) = interrupted(folder.path(), 1);
    outcome.expect(130, &["interrupted: finishing", "interrupted; what was finished is kept", "out.jsonl.part"]);
    assert!(!output.exists(), "a part must not pass for the whole");
    let part = fs::read_to_string(folder.path().join("out.jsonl.part")).unwrap();
    assert!(part.lines().all(|line| serde_json::from_str::<Value>(line).unwrap()["response"].is_string()));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file may stay");
}

#[cfg(unix)]
#[test]
fn a_second_ctrl_c_stops_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (outcome, output) = interrupted(folder.path(), 2);
    outcome.expect(130, &["interrupted: finishing"]);
    assert!(!output.exists());
}
