//! `generate`, `score`, `logprob`, `judge`, `inspect`: rows in, rows out.

use std::fs;
use std::time::Duration;

use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::support::{Folder, ares, ares_with, command, finish, golden, interrupt, lines, model, rows};

#[track_caller]
fn close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap_or_else(|| panic!("no number: {found}"));
    assert!((found - expected).abs() <= 1e-4, "found {found}, transformers has {expected}");
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

/// One model of each head, without and with an adapter: `tests/golden.rs` has the others. Unknown fields are carried through.
#[test]
fn every_row_gets_its_own_value_of_transformers() {
    for name in ["llama3-causal", "llama3-reward"] {
        let (folder, golden) = (model(name), golden(name));
        let row =
            |s: &Value| json!({"tokens": s["tokens"], "prompt_tokens": s["prompt_tokens"], "mine": [1, {"a": null}]});
        let sequences: Vec<Value> = golden["sequences"].as_array().unwrap().iter().map(row).collect();
        let run = |args: &str| {
            let found = ares_with(args, &lines(&sequences)).expect(0, &[]).rows();
            assert!(found.iter().zip(&sequences).all(|(found, row)| found["mine"] == row["mine"]));
            found
        };
        for (adapter, values) in [(String::new(), "base"), (format!("+tests/golden/{name}/adapter"), "adapted")] {
            let (spec, values) = (format!("{folder}{adapter}"), golden[values].as_array().unwrap());
            assert_eq!(values.len(), sequences.len());
            if name == "llama3-reward" {
                let scores = run(&format!("score --reward {spec}"));
                scores.iter().zip(values).for_each(|(f, v)| close(&f["reward"], v["reward"][0].as_f64().unwrap()));
                continue;
            }
            for (found, values) in run(&format!("logprob --model {spec} --per-token")).iter().zip(values) {
                let expected = numbers(&values["logprobs"]);
                assert_eq!(found["n"], expected.len());
                found["logprobs"].as_array().unwrap().iter().zip(&expected).for_each(|(f, e)| close(f, *e));
                close(&found["logprob"], expected.iter().sum());
            }
            let prompt = |s: &Value| json!({"tokens": s["tokens"].as_array().unwrap()[..s["prompt_tokens"].as_u64().unwrap() as usize]});
            let prompts: Vec<Value> = sequences.iter().map(prompt).collect();
            let args = format!("generate --model {spec} --greedy --max-new-tokens 8 --ignore-eos");
            let found = ares_with(&args, &lines(&prompts)).expect(0, &[]).rows();
            for (found, values) in found.iter().zip(values) {
                assert_eq!(found["tokens_out"].as_array().unwrap(), &values["greedy"].as_array().unwrap()[..8]);
            }
        }
    }
}

#[test]
fn a_classifier_judges_by_the_sigmoid_of_its_score() {
    let folder = model("llama-reward");
    let row = json!({"prompt": "w20 w21", "response": "w22"}).to_string();
    let run = |args: &str| ares_with(&format!("{args}{folder}"), &row).expect(0, &[]).rows();
    let reward = run("score --reward ")[0]["reward"].as_f64().unwrap();
    close(&run("judge --judge model:")[0]["p_harm"], 1.0 / (1.0 + (-reward).exp()));
}

#[test]
fn a_bad_row_is_an_error_row_and_never_a_lost_file() {
    let folder = model("llama-causal");
    let good = r#"{"prompt": "w20 w21", "response": "w22", "id": 1}"#;
    let long = json!({"prompt": "w5 ".repeat(400), "response": "w22"}).to_string();
    // A blank line is no row.
    let bad = [
        ("{not json", "a JSON object"),
        (r#"{"prompt": "", "response": "w22"}"#, "empty"),
        (r#"{"question_without_answer": 1}"#, "`prompt`, `messages` or `tokens`"),
        ("", ""),
        (r#"{"tokens": [5, 101], "prompt_tokens": 1}"#, "below 101"),
        (r#"{"tokens": [5, 6], "prompt_tokens": 2}"#, "`prompt_tokens` from 1 to 1"),
        (&long, "at most 256 tokens"),
        ("[1, 2]", "a JSON object"),
    ];
    let input = format!("{good}\n{}\n{good}", bad.map(|(line, _)| line).join("\n"));
    let args = format!("logprob --model {folder}");
    let found = ares_with(&args, &input).expect(0, &["9 rows, 7 with an error"]).rows();
    assert_eq!(found.len(), 9);
    assert!(found[0]["logprob"].as_f64().is_some_and(f64::is_finite) && found[0]["id"] == 1);
    assert_eq!(found[8], found[0]);
    let expected = bad.iter().zip(2..).filter(|((line, _), _)| !line.is_empty());
    for (found, ((_, what), line)) in found[1..].iter().zip(expected) {
        let error = found["error"].as_str().unwrap_or_else(|| panic!("line {line} has no error: {found}"));
        assert_eq!(found["line"], line);
        assert!(error.contains(what) && error.contains(&format!("line {line}")), "{what:?}: {error}");
        assert!(found.get("logprob").is_none());
    }
    // With --strict the first one stops all, and what was done before it waits for --resume.
    let out = Folder::new();
    for (line, what) in &bad[..2] {
        out.write("in.jsonl", format!("{good}\n{line}\n"));
        ares(&format!("{args} -i {out}/in.jsonl -o {out}/out.jsonl --strict")).expect(1, &["in.jsonl, line 2", what]);
        assert_eq!(out.read("out.jsonl.part").lines().count(), 1);
        assert!(!out.at("out.jsonl").exists());
        for name in ["out.jsonl.part", "out.jsonl.part.toml"] {
            std::fs::remove_file(out.at(name)).unwrap();
        }
    }
    let all_bad = ares_with(&args, "no json\n").expect(1, &["line 1"]);
    assert_eq!(all_bad.rows().len(), 1, "the error row is written all the same");
    ares_with(&args, "").expect(0, &["0 rows", "device: cpu"]);
    let empty = ares_with(&format!("{args} --quiet"), "").expect(0, &[]);
    assert_eq!(empty.stdout + &empty.stderr, "");
}

#[test]
fn ids_beside_a_text_must_be_its_own() {
    let (causal, reward) = (model("llama-causal"), model("llama-reward"));
    // The template makes `w10 w20 w21 w11` of it.
    let row = |tokens: &[u32]| json!({"prompt": "w20 w21", "tokens": tokens});
    let second_refused = |args: &str, asked: &[Value]| {
        let found = ares_with(args, &lines(asked)).expect(0, &[", 1 with an error"]).rows();
        let error = found[1]["error"].as_str().unwrap_or_default();
        assert!(error.contains("line 2: expected `tokens` to be those of the prompt"), "{}", found[1]);
        found
    };
    let args = format!("generate --model {causal} --greedy --max-new-tokens 4");
    let asked = [row(&[10, 20, 21, 11]), row(&[10, 20, 22, 11]), json!({"prompt": "w20 w21"})];
    let found = second_refused(&args, &asked);
    assert_eq!(found[0]["tokens_out"], found[2]["tokens_out"]);
    let asked = [row(&[10, 20, 21, 11, 30, 2]), row(&[10, 20, 22, 11, 30, 2])];
    assert!(second_refused(&format!("score --reward {reward}"), &asked)[0]["reward"].is_number());
    let row = json!({"prompt": "p", "tokens": [1], "response": "a", "p_harm": 0.1, "reward": 0});
    let found = ares_with("detect --tau-r 1 --kind harmful", &lines(&[row])).expect(1, &[]).rows();
    assert!(found[0]["error"].as_str().is_some_and(|error| error.contains("found both")), "{}", found[0]);
}

#[test]
fn files_in_and_out_and_the_result_as_json() {
    let (folder, out) = (model("llama-reward"), Folder::new());
    out.write("in.csv", "goal,response,mine\nw20 w21,w22,x\nw23,w24 w25,\"a, b\"\n");
    let done = ares(&format!("score --reward {folder} -i {out}/in.csv -o {out}/out.jsonl --json --quiet"));
    let done = done.expect(0, &[]);
    assert_eq!((&done.json()["rows"], &done.json()["errors"], &*done.stderr), (&json!(2), &json!(0), ""));
    let rows = rows(&out.read("out.jsonl"));
    assert!(rows.iter().all(|row| row["reward"].as_f64().is_some_and(f64::is_finite)), "{rows:?}");
    assert_eq!((rows[1]["mine"].as_str(), rows.len()), (Some("a, b"), 2));
}

#[test]
fn what_cannot_work_is_said_before_any_work() {
    let (causal, reward, two, damaged) =
        (model("llama-causal"), model("llama-reward"), model("qwen2-reward"), model("llama-causal"));
    let weights = fs::read(damaged.at("model.safetensors")).unwrap();
    damaged.write("model.safetensors", &weights[..weights.len() - 100]);
    let (no_causal, no_reward) = ("LlamaForSequenceClassification", "LlamaForCausalLM");
    for (args, code, words) in [
        (format!("score --reward {causal}"), 1, &[no_causal, no_reward, "config.json"][..]),
        (format!("score --reward {two}"), 1, &["one label", "2 labels"]),
        (format!("score --reward {reward} --json"), 2, &["--output"]),
        (format!("generate --model {reward}"), 1, &[no_reward, no_causal]),
        (format!("generate --model {damaged}"), 1, &["model.safetensors", "expected", "found"]),
        (format!("generate --model {causal} -i /nowhere/in.jsonl"), 1, &["/nowhere/in.jsonl", "cannot read"]),
        (format!("generate --model {causal} -o /nowhere/out.jsonl"), 1, &["/nowhere/out.jsonl", "cannot write"]),
        (format!("generate --model {causal} -o /"), 2, &["expected the path of a file"]),
        (format!("generate --model {causal}+/nowhere/adapter"), 1, &["/nowhere/adapter"]),
        (format!("generate --model {causal} --device cuda:7"), 1, &["no usable device", "--device cpu"]),
        (format!("generate --model {causal} --device cuda:999"), 1, &["no usable device", "--device cpu"]),
    ] {
        println!("{args}");
        ares(&args).expect(code, words);
    }
}

#[test]
fn a_lexicon_judges_texts() {
    let folder = Folder::new();
    let lexicon = r#"{"schema": 1, "match": "any", "ignore_case": true, "start": ["Sure."], "contains": ["First,"]}"#;
    folder.write("harm.json", lexicon);
    let answered = |response: &str| json!({"prompt": "p", "response": response});
    let asked = [answered("sure. it is"), answered("No."), json!({"tokens": [1]})];
    let args = format!("judge --judge lexicon:{folder}/harm.json");
    let found = ares_with(&args, &lines(&asked)).expect(0, &["3 rows, 1 with an error"]).rows();
    assert_eq!((found[0]["p_harm"].as_f64(), found[0]["ambiguous"].as_bool()), (Some(1.0), Some(false)));
    assert_eq!((found[1]["p_harm"].as_f64(), found[1]["response"].as_str()), (Some(0.0), Some("No.")));
    assert!(found[2]["error"].as_str().is_some_and(|error| error.contains("line 3")));
    ares(&format!("{args} --harm-threshold 2")).expect(2, &["from 0 to 1"]);
}

#[test]
fn a_judge_is_held_against_labels() {
    let folder = Folder::new();
    folder.write("harm.json", r#"{"schema": 1, "match": "any", "start": ["Sure"]}"#);
    let row = |response: &str, label: Value| json!({"prompt": "p", "response": response, "person": label});
    let mut asked = vec![row("Sure", json!("harmful")), row("Sure", json!(true)), row("Sure", json!("safe"))];
    asked.push(row("Sure", json!(false)));
    asked.extend([
        row("No", json!(0)),
        row("No", json!("unsafe")),
        row("No", Value::Null),
        row("No", json!("perhaps")),
    ]);
    folder.write("in.jsonl", lines(&asked));
    let line = format!(
        "judge --judge lexicon:{folder}/harm.json --labels person -i {folder}/in.jsonl -o {folder}/out.jsonl --json"
    );
    let found = ares(&line).expect(0, &["8 rows, 1 with an error", "sensitivity", "66.7"]).json();
    let labels = &found["labels"];
    assert_eq!((found["rows"].as_u64(), labels["n"].as_u64(), labels["harmful"].as_u64()), (Some(8), Some(6), Some(3)));
    let rates =
        ["agreement", "precision", "sensitivity", "specificity"].map(|name| labels[name]["rate"].as_f64().unwrap());
    assert_eq!(rates, [3.0 / 6.0, 2.0 / 4.0, 2.0 / 3.0, 1.0 / 3.0]);
    assert!(labels["kappa"].as_f64().unwrap().abs() < 1e-12, "{labels}");
    let error = rows(&folder.read("out.jsonl"))[7]["error"].as_str().unwrap().to_string();
    assert!(error.contains("`person` to be harmful (unsafe, true, 1) or safe"), "{error}");
}

#[test]
fn inspect_says_what_a_folder_holds() {
    let folder = model("qwen3-causal");
    let table = ares(&format!("inspect {folder}")).expect(0, &[]).stdout;
    for word in ["Qwen3", "language model", "norm over q and k", "chat template", "yes", "F32"] {
        assert!(table.contains(word), "{word:?} is missing in: {table}");
    }
    let found = ares(&format!("inspect {folder}+tests/golden/qwen3-causal/adapter --json")).expect(0, &[]).json();
    assert_eq!((found["family"].as_str(), found["problems"].as_array().map(Vec::len)), (Some("Qwen3"), Some(0)));
    assert!(found["adapter"]["rank"].as_u64().is_some_and(|rank| rank > 0) && found["parameters"].as_u64().is_some());
    fs::remove_file(folder.at("tokenizer.json")).unwrap();
    let found = ares(&format!("inspect {folder} --json")).expect(1, &["tokenizer.json"]).json();
    assert_eq!(found["problems"].as_array().map(Vec::len), Some(1), "the rest is reported all the same: {found}");
    assert!(found["parameters"].as_u64().is_some());
    folder.write("config.json", r#"{"architectures": ["GPT2LMHeadModel"]}"#);
    ares(&format!("inspect {folder}")).expect(1, &["GPT2LMHeadModel", "Llama"]);
}

#[test]
fn answers_that_are_cut_are_counted() {
    let causal = model("llama-causal");
    let asked = lines(&[json!({"prompt": "w20"}), json!({"prompt": "w21"})]);
    let line = format!("generate --model {causal} --ignore-eos --max-new-tokens 3");
    ares_with(&line, &asked)
        .expect(0, &["100.0 % of 2 answers were cut at the limit of tokens: raise --max-new-tokens"]);
    let told = ares_with(&format!("{line} --as advbench"), &asked).expect(1, &[]).rows();
    let error = told[0]["error"].as_str().unwrap();
    assert!(error.contains("the columns of AdvBench (goal, target), found only prompt"), "{error}");
    let listed = lines(&[json!({"goal": "w20", "target": "w3"})]);
    let found = ares_with(&line, &listed).expect(0, &["read as AdvBench"]).rows();
    assert_eq!((found[0]["goal"].as_str(), found[0]["target"].as_str()), (Some("w20"), Some("w3")));
}

/// With pad = eos, transformers reads a reward before the end of the turn; other trainers read it there.
#[test]
fn where_a_reward_is_read_is_said() {
    let folder = model("llama-reward");
    let inspect = || ares(&format!("inspect {folder} --json")).expect(0, &[]).json();
    let asked = lines(&[json!({"prompt": "w20 w21", "response": "w22"}), json!({"tokens": [10, 20, 21, 11, 22]})]);
    let score = || {
        let rows = ares_with(&format!("score --reward {folder}"), &asked).expect(0, &[]).rows();
        [0, 1].map(|row| rows[row]["reward"].as_f64().unwrap())
    };
    let read = inspect();
    assert_eq!((read["score_head"].as_str(), &read["warnings"]), (Some("score: one layer"), &json!([])));
    assert_eq!(read["score_read"]["last_tokens"][3], json!([2, "</s>"]));
    assert_eq!(read["score_read"]["position"], read["score_read"]["length"]);
    let [at_end, before] = score();
    let config = folder.read("config.json");
    folder.write("config.json", config.replace(r#""pad_token_id": 0"#, r#""pad_token_id": 2"#));
    let read = inspect();
    assert_eq!(read["score_read"]["position"].as_u64().unwrap() + 1, read["score_read"]["length"].as_u64().unwrap());
    assert!(read["warnings"][0].as_str().unwrap().contains("the last token is pad_token_id"), "{read}");
    let [same, again] = score();
    assert!(same == before && before == again && at_end != before, "{at_end} {before} {same} {again}");

    // Raw text ends where it ends, unless it is told otherwise.
    folder.write("config.json", config);
    let raw = lines(&[json!({"prompt": "w20", "response": " w21"}), json!({"tokens": [20, 21, 2]})]);
    let score = |more: &str| {
        let rows = ares_with(&format!("score --reward {folder} {more}"), &raw).expect(0, &[]).rows();
        [0, 1].map(|row| rows[row]["reward"].as_f64().unwrap())
    };
    let ([plain, ended], [appended, _]) = (score("--raw"), score("--raw --append eos"));
    assert!(plain != ended && appended == ended, "{plain} {ended} {appended}");
    ares(&format!("score --reward {folder} --append eos")).expect(2, &["--raw"]);
}

/// The first Ctrl-C lets the unit in work finish and keeps what is done; a second stops at once.
#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done() {
    let checkpoint = model("llama-causal");
    let asked: Vec<Value> = (0..40_000).map(|i| json!({"prompt": format!("w{}", 12 + i % 80)})).collect();
    for signals in [1, 2] {
        let folder = Folder::new();
        folder.write("in.jsonl", lines(&asked));
        let args = format!("generate --model {checkpoint} --ignore-eos -i {folder}/in.jsonl -o {folder}/out.jsonl");
        let child = command(&args).spawn().unwrap();
        // It would take minutes.
        std::thread::sleep(Duration::from_secs(4));
        for _ in 0..signals {
            interrupt(&child);
            std::thread::sleep(Duration::from_millis(30));
        }
        let outcome = finish(child).expect(130, &["interrupted: finishing"]);
        assert!(!folder.at("out.jsonl").exists(), "a part must not pass for the whole");
        if signals == 1 {
            outcome.expect(130, &["interrupted; ", " rows are done, in ", "out.jsonl.part: go on with --resume"]);
            assert!(rows(&folder.read("out.jsonl.part")).iter().all(|row| row["response"].is_string()));
            assert_eq!(folder.count(), 3, "input, part and its receipt: no temporary file may stay");
        }
    }
}

#[test]
fn template_arguments_reach_the_template() {
    let causal = model("llama-causal");
    let template =
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ 'w7 ' if think is defined and think is false }}";
    causal.write("tokenizer_config.json", json!({"chat_template": template, "eos_token": "</s>"}).to_string());
    let ids = |more: &str| {
        let line = format!("generate --greedy --ignore-eos --max-new-tokens 5 --model {causal} {more}");
        ares_with(&line, "{\"prompt\": \"w12\"}\n").expect(0, &[]).rows()[0]["tokens_out"].clone()
    };
    let given = |prompt: &str| {
        let line = format!("generate --greedy --ignore-eos --max-new-tokens 5 --model {causal} --raw");
        ares_with(&line, &format!("{{\"prompt\": \"{prompt}\"}}\n")).expect(0, &[]).rows()[0]["tokens_out"].clone()
    };
    assert_eq!((ids(""), ids("--template-arg think=false")), (given("w12"), given("w12 w7")));
    assert_eq!(ids("--template-arg think=false --template-arg think=true"), given("w12"));
    ares(&format!("generate --model {causal} --template-arg think")).expect(2, &["expected NAME=VALUE"]);
}

/// Word 40 alone has a part in channel 0, which the first block's attention leaves alone and its MLP takes beyond f32.
#[test]
fn an_answer_of_numbers_that_are_none_is_an_error_of_its_row() {
    let (sound, broken) = (model("llama-causal"), model("llama-causal"));
    let hidden = {
        let config: Value = serde_json::from_str(&sound.read("config.json")).unwrap();
        config["hidden_size"].as_u64().unwrap() as usize
    };
    for (folder, by) in [(&sound, 0.0f32), (&broken, 3e38)] {
        let bytes = fs::read(folder.at("model.safetensors")).unwrap();
        let mut edited = bytes.clone();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut set = |name: &str, at: &dyn Fn(usize) -> Option<f32>| {
            let data = tensors.tensor(name).unwrap().data();
            let from = data.as_ptr() as usize - bytes.as_ptr() as usize;
            for (i, number) in edited[from..from + data.len()].chunks_exact_mut(4).enumerate() {
                at(i).iter().for_each(|x| number.copy_from_slice(&x.to_le_bytes()));
            }
        };
        set("model.embed_tokens.weight", &|i| (i % hidden == 0).then_some(f32::from(i / hidden == 40)));
        set("model.layers.0.self_attn.o_proj.weight", &|i| (i < hidden).then_some(0.0));
        ["gate", "up"].iter().for_each(|name| {
            set(&format!("model.layers.0.mlp.{name}_proj.weight"), &|i| (i % hidden == 0).then_some(by));
        });
        folder.write("model.safetensors", edited);
    }
    let asked = ["w20 w21", "w40 w22", "w23"].map(|prompt| json!({"prompt": prompt}));
    let mut greedy = None;
    for more in ["--greedy", "--temperature 1e-40", "--seed 3", "--top-k 9 --top-p 0.8"] {
        let of = |folder: &Folder| {
            let args = format!("generate --model {folder} --max-new-tokens 8 --ignore-eos {more}");
            ares_with(&args, &lines(&asked)).expect(0, &["3 rows"]).rows()
        };
        let (sound, broken) = (of(&sound), of(&broken));
        assert_eq!((&sound[0], &sound[2]), (&broken[0], &broken[2]));
        let first = greedy.get_or_insert_with(|| sound.clone());
        assert!(
            more.contains("top") || more.contains("seed") || *first == sound,
            "a temperature next to none is greedy"
        );
        assert!(sound[1]["response"].is_string() && broken[1]["response"].is_null(), "{}", broken[1]);
        let error = broken[1]["error"].as_str().unwrap();
        assert!(error.contains("logits of") && error.contains("after 0 tokens"), "{error}");
    }
}
