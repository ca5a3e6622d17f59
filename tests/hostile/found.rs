//! Every input that once made the program crash, hang, or say something untrue.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::support::{Folder, Outcome, ares, ares_with, command, finish, model};

const ROW: &str = "{\"prompt\": \"w12 w13\", \"response\": \"w14\"}\n";

/// Scores [`ROW`] with the tiny reward model after `change`.
fn score(change: impl FnOnce(&Folder)) -> Outcome {
    let reward = model("llama-reward");
    change(&reward);
    ares_with(&format!("score --reward {reward}"), ROW)
}

fn change(folder: &Folder, file: &str, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&folder.read(file)).unwrap();
    change(&mut value);
    folder.write(file, value.to_string());
}

fn with_template(template: &str) -> Outcome {
    score(|folder| change(folder, "tokenizer_config.json", |config| config["chat_template"] = template.into()))
}

#[test]
fn ids_that_only_the_post_processor_knows_are_held_against_the_embedding() {
    // 101 rows, packed in panels of 48: 105 lies in the padding, 200 beyond it.
    for id in [101, 105, 200] {
        let special = json!({"id": "</s>", "ids": [id], "tokens": ["</s>"]});
        let piece = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let processor = json!({
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, piece("A")],
            "pair": [piece("A"), piece("B")], "special_tokens": {"</s>": special},
        });
        let reward = model("llama-reward");
        change(&reward, "tokenizer.json", |tokenizer| tokenizer["post_processor"] = processor);
        let expected = format!("expected an id below 101, the model's vocabulary, found {id}");
        ares_with(&format!("score --raw --reward {reward}"), ROW).expect(1, &[&expected]);
    }
}

#[test]
fn a_model_cut_short_by_its_config_is_refused() {
    score(|folder| change(folder, "config.json", |config| config["num_hidden_layers"] = 1.into()))
        .expect(1, &["tensor model.layers.1.", "expected no layer beyond num_hidden_layers (1), found one"]);
}

/// Squares that overflow made a norm's row zero, and a reward of 0 came out.
#[test]
fn weights_that_overflow_give_no_number() {
    let huge = |folder: &Folder| {
        let path = folder.at("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        let place = header["model.embed_tokens.weight"]["data_offsets"].as_array().unwrap().clone();
        let [from, to] = [0, 1].map(|i| start + place[i].as_u64().unwrap() as usize);
        bytes[from..to].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&3e30f32.to_le_bytes()));
        fs::write(&path, bytes).unwrap();
    };
    score(huge).expect(1, &[": expected finite numbers, found NaN"]);
}

#[test]
fn templates_end_without_the_program() {
    let many = |part: &str| part.repeat(100_000);
    let cycle = "{% set ns = namespace() %}{% set ns.a = ns %}";
    for template in [
        "{%}".to_string(),
        "{%".to_string(),
        "{{ 'x'|indent(10**12) }}".to_string(),
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
            .to_string(),
        "{{ range(99999)|list|join('x'*100000) }}".to_string(),
        format!("{cycle}{{{{ ns }}}}"),
        format!("{cycle}{{{{ ns|tojson }}}}"),
        format!("{cycle}{{{{ ns == ns }}}}{{{{ [ns]|sort }}}}"),
        format!("{{{{ 1{} }}}}", many("+1")),
        format!("{{{{ {} }}}}", many("not ")),
        format!("{{{{ {}1 }}}}", many("-")),
        format!("{{{{ x{} }}}}", many(".a")),
        format!("{{{{ x{} }}}}", many("|e")),
        format!("{{{{ 1{} }}}}", many(" if 1 else 1")),
        format!("{{{{ {}1{} }}}}", many("("), many(")")),
        format!("{{% if 1 %}}{}{{% endif %}}", many("{% elif 1 %}")),
    ] {
        println!("{}", &template[..template.len().min(100)]);
        with_template(&template).expect(1, &["chat template"]);
    }
    let begin = Instant::now();
    with_template("{{ 'a'.count('') }}").expect(1, &["more than 2 s of computing"]);
    assert!(begin.elapsed() < Duration::from_secs(60), "its own seconds of computing, not all that there are");
}

/// A row that ends the template's process is that row's error; the rows beside it are scored as without it.
#[test]
fn a_row_that_breaks_its_template_breaks_no_other() {
    let reward = model("llama-reward");
    let template =
        "{% for m in messages %}{{ 'x'|indent(10**12) if m.content == 'w9' else m.content + ' ' }}{% endfor %}";
    change(&reward, "tokenizer_config.json", |config| config["chat_template"] = template.into());
    let row = |prompt: &str| format!("{}\n", json!({"prompt": prompt, "response": "w20"}));
    let good: Vec<String> = (10..30).map(|i| row(&format!("w{i}"))).collect();
    let line = format!("score --reward {reward}");
    let expected = ares_with(&line, &good.concat()).expect(0, &["20 rows, 0 with an error"]).rows();
    let mixed = format!("{}{}{}", good[..7].concat(), row("w9"), good[7..].concat());
    let mut found = ares_with(&line, &mixed).expect(0, &["21 rows, 1 with an error"]).rows();
    let error = found.remove(7)["error"].to_string();
    assert!(error.contains("more memory than 1024 MiB"), "{error}");
    assert_eq!(found, expected);
}

#[test]
fn tokenizers_that_their_library_cannot_bear_are_the_files_fault() {
    let set = |key: &'static str, value: Value| {
        score(move |folder| change(folder, "tokenizer.json", |tokenizer| tokenizer[key] = value))
    };
    let replace = |pattern: Value| json!({"type": "Replace", "pattern": pattern, "content": "x"});
    set("normalizer", replace(json!({"String": ""}))).expect(1, &["tokenizer.json", "an empty pattern"]);
    set("normalizer", replace(json!({"Regex": ""}))).expect(1, &["tokenizer.json", "an empty pattern"]);
    let long = json!([{"id": 100, "content": "x".repeat(100_000), "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false}]);
    set("added_tokens", long).expect(1, &["tokenizer.json", "an added token of 100000 bytes"]);
    // A panic in the library: a character of one byte's width cut in two.
    let metaspace = json!({"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": true});
    set("pre_tokenizer", metaspace).expect(1, &["tokenizer.json"]);
    let text = json!({"prompt": "w12 ".repeat(2_000_000), "response": "w14"});
    let reward = model("llama-reward");
    ares_with(&format!("score --reward {reward}"), &format!("{text}\n")).expect(1, &["expected at most 1048576 bytes"]);
}

/// Scored as transformers scores: `eos_token` is no token of the file, and gets the next id there.
#[test]
fn special_tokens_that_the_tokenizer_lacks_are_added() {
    let reward = model("llama-reward");
    change(&reward, "tokenizer_config.json", |config| {
        (config["eos_token"], config["pad_token"]) = ("<end>".into(), "<pad>".into())
    });
    change(&reward, "tokenizer.json", |tokenizer| {
        tokenizer["added_tokens"] = json!([]);
        let words = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        words.retain(|_, id| id.as_u64().unwrap() < 60);
    });
    let scored = |row: Value| {
        ares_with(&format!("score --raw --reward {reward}"), &format!("{row}\n")).expect(0, &[]).rows()[0]["reward"]
            .clone()
    };
    for (text, id) in [("<end>", 60), ("<pad>", 61)] {
        let row = json!({"prompt": format!("w12 w13{text}"), "response": ""});
        assert_eq!(scored(row), scored(json!({"tokens": [12, 13, id]})), "{text}");
    }
}

/// PEFT reads no matrices of what the configuration does not name; here they were used.
#[test]
fn adapters_whose_configuration_names_less_than_they_hold_are_refused() {
    let reward = model("llama-reward");
    fs::create_dir(reward.at("adapter")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(format!("tests/golden/llama-reward/adapter/{name}"), reward.at(&format!("adapter/{name}"))).unwrap();
    }
    let line = format!("score --reward {reward}+{reward}/adapter");
    for (key, value, expected) in [
        (
            "target_modules",
            json!(["q_proj", "v_proj"]),
            "of which the adapter has matrices, found \"q_proj\", \"v_proj\"",
        ),
        ("target_modules", json!(["xq_proj", "proj"]), "of which the adapter has matrices"),
        ("target_modules", json!([0, null]), "target_modules to be a list of texts"),
        ("layers_to_transform", json!([0]), "one with 1, of which the adapter has matrices"),
        ("layers_to_transform", json!(1), "one with 0, of which the adapter has matrices"),
    ] {
        let before = reward.read("adapter/adapter_config.json");
        change(&reward, "adapter/adapter_config.json", |config| config[key] = value);
        ares_with(&line, ROW).expect(1, &["adapter_config.json", expected]);
        reward.write("adapter/adapter_config.json", before);
    }
    change(&reward, "adapter/adapter_config.json", |config| config["layers_to_transform"] = json!([0, 1]));
    ares_with(&line, ROW).expect(0, &[]);
}

#[cfg(unix)]
fn pipe(folder: &Folder, name: &str) {
    let _ = fs::remove_file(folder.at(name));
    assert!(Command::new("mkfifo").arg(folder.at(name)).status().unwrap().success());
}

#[test]
fn a_models_files_are_regular() {
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        score(|folder| pipe(folder, name)).expect(1, &[name, "regular file"]);
    }
    score(|folder| {
        fs::remove_file(folder.at("tokenizer.json")).unwrap();
        symlink("/dev/zero", folder.at("tokenizer.json")).unwrap();
    })
    .expect(1, &["tokenizer.json: expected a regular file, found a pipe or device"]);
}

/// Until something has been made that is worth finishing, the first signal ends the program.
#[test]
fn the_first_signal_ends_what_waits() {
    let folder = Folder::new();
    pipe(&folder, "rows.jsonl");
    let reward = model("llama-reward");
    for (line, signal, code) in [
        (format!("score --reward {reward} -i {folder}/rows.jsonl"), "-TERM", 143),
        ("bench step --repeats 1000".to_string(), "-INT", 130),
    ] {
        let mut child = command(&line).stdin(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        assert!(child.try_wait().unwrap().is_none(), "{line} ended by itself");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begin.elapsed() > Duration::from_secs(20) {
                child.kill().unwrap();
                panic!("{line} still waits");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        finish(child).expect(code, &["interrupted"]);
    }
    // What never ends is no row.
    ares(&format!("score --reward {reward} -i /dev/zero")).expect(1, &["/dev/zero", "more than 67108864 bytes"]);
}

#[test]
fn output_goes_where_it_was_sent_or_the_command_fails() {
    let (folder, reward) = (Folder::new(), model("llama-reward"));
    folder.write("in.jsonl", ROW);
    let line = format!("score --reward {reward} -i {folder}/in.jsonl");
    symlink(folder.at("nowhere"), folder.at("link")).unwrap();
    ares(&format!("{line} -o {folder}/link")).expect(2, &["link", "a link that leads nowhere"]);
    assert!(folder.at("link").is_symlink() && !folder.at("nowhere").exists());
    folder.write("old.jsonl", "old");
    fs::set_permissions(folder.at("old.jsonl"), fs::Permissions::from_mode(0o600)).unwrap();
    ares(&format!("{line} -o {folder}/old.jsonl")).expect(0, &[]);
    assert_eq!(fs::metadata(folder.at("old.jsonl")).unwrap().permissions().mode() & 0o777, 0o600);
    let shell = |redirection: &str| {
        let line = format!("{} {line} {redirection}", env!("CARGO_BIN_EXE_ares"));
        finish(Command::new("sh").args(["-c", &line]).stderr(Stdio::piped()).spawn().unwrap())
    };
    shell(">&-").expect(1, &["standard output: expected it open, found it closed"]);
    shell("> /dev/full").expect(1, &["standard output: cannot write"]);
}

/// What writers left that were killed goes with the next run beside it; what a writer still holds stays.
#[test]
fn temporary_files_of_the_dead_are_swept() {
    let (folder, reward) = (Folder::new(), model("llama-reward"));
    let held = fs::File::create(folder.at(".ares-held.tmp")).unwrap();
    held.lock().unwrap();
    folder.write(".ares-dead.tmp", "half");
    fs::create_dir(folder.at(".ares-folder.tmp")).unwrap();
    folder.write(".ares-folder.tmp/adapter", "half");
    folder.write("mine.tmp", "");
    folder.write("in.jsonl", ROW);
    ares(&format!("score --reward {reward} -i {folder}/in.jsonl -o {folder}/out.jsonl")).expect(0, &[]);
    let there = |name: &str| folder.at(name).exists();
    assert!(there(".ares-held.tmp") && there("mine.tmp") && !there(".ares-dead.tmp") && !there(".ares-folder.tmp"));
}

#[test]
fn nothing_shown_steers_the_terminal() {
    let reward = model("llama-reward");
    let row = "{\"prompt\": \"w12\", \"response\": 7, \"id\": \"\\u001b[31m\"}\n";
    let outcome = ares_with(&format!("score --reward {reward}/\u{1b}[31m"), row);
    assert!(outcome.stderr.contains(r"\u{1b}[31m") && !outcome.stderr.contains('\u{1b}'), "{}", outcome.stderr);
}
