use serde_json::json;

use super::*;
use crate::error::refused;
use crate::text::output::write_atomic;

fn jsonl(text: &str) -> Vec<Row> {
    parse("rows.jsonl", text.as_bytes(), false).unwrap()
}

fn row(value: Value) -> Row {
    jsonl(&value.to_string()).remove(0)
}

fn csv(text: &str) -> Vec<Row> {
    parse("rows.csv", text.as_bytes(), false).unwrap()
}

fn user(row: &Row) -> String {
    let Prompt::Chat(turns) = row.prompt(false).unwrap() else { panic!("no chat") };
    assert_eq!((turns.len(), turns[0].role.as_str()), (1, "user"));
    turns[0].content.clone()
}

#[test]
fn unknown_fields_and_their_order_survive() {
    let line = r#"{"z":1,"prompt":"a","b":{"y":[1.5,null],"x":"ü"},"a":9007199254740993}"#;
    let mut rows = jsonl(&format!("\u{feff}\n{line}\r\n\n{line}"));
    assert_eq!((rows.len(), rows[0].line, rows[1].line), (2, 2, 4));
    assert_eq!(serde_json::to_string(&rows[0].object).unwrap(), line);
    rows[0].set("response", "r");
    rows[0].set("z", 2);
    assert_eq!(rows[0].object.keys().collect::<Vec<_>>(), ["z", "prompt", "b", "a", "response"]);
}

#[test]
fn bad_lines_keep_their_place_and_say_why() {
    let text = b"{\"prompt\":\"a\"}\nnot json\n[1]\n{\"prompt\":\"b\"\n{\"prompt\":\"\xff\"}\n{\"prompt\":\"c\"}\n";
    let rows = parse("x.jsonl", text, false).unwrap();
    assert_eq!(
        rows.iter().map(|row| row.fault().is_some()).collect::<Vec<_>>(),
        [false, true, true, true, true, false]
    );
    assert_eq!(rows[1].object["line"], 2);
    let found = rows[1].object["error"].as_str().unwrap();
    assert!(found.starts_with("x.jsonl, line 2: expected a JSON object, found expected "), "{found}");
    refused(rows[2].prompt(false), "line 3: expected a JSON object, found a list of 1");
    assert_eq!(rows[5].line, 6);
    refused(parse("x.jsonl", text, true), "x.jsonl, line 2: expected a JSON object");
    assert!(parse("x.jsonl", b"{\"prompt\":\"a\"}", true).is_ok());
}

#[test]
fn prompts_stand_in_many_places() {
    assert_eq!(user(&row(json!({"prompt": "a", "goal": "b"}))), "a");
    assert_eq!(user(&csv("goal,target\nx,y\n")[0]), "x");
    assert_eq!(user(&csv("Index,Goal,Target,Behavior\n0,x,y,title\n")[0]), "x");
    assert_eq!(user(&csv("category,source,forbidden_prompt\nc,s,\"x\ny\"\n")[0]), "x\ny");
    let harmbench = csv("Behavior,ContextString,BehaviorID\nx,,1\nx,some context,2\n");
    assert_eq!(user(&harmbench[0]), "x");
    assert_eq!(user(&harmbench[1]), "some context\n\n---\n\nx");
    assert_eq!(user(&row(json!({"instruction": "x", "instances": [{"input": "y", "output": ""}]}))), "x\n\ny");
    assert_eq!(user(&row(json!({"instruction": "x", "input": "", "output": "z"}))), "x");
    assert_eq!(user(&row(json!({"input": [{"role": "user", "content": "x"}], "ideal": "y"}))), "x");
    let garak = json!({"goal": "g", "prompt": {"turns": [{"role": "user", "content": {"text": "x"}}]}, "output": {"text": "y"}});
    assert_eq!(user(&row(garak.clone())), "x");
    assert_eq!(row(garak).response().unwrap().as_deref(), Some("y"));
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]});
    assert_eq!(user(&row(parts)), "xy");
    assert_eq!(row(json!({"tokens": [1, 2]})).prompt(false).unwrap(), Prompt::Tokens(vec![1, 2]));
    assert_eq!(row(json!({"prompt": "a"})).prompt(true).unwrap(), Prompt::Raw("a".into()));
}

#[test]
fn rows_without_a_usable_prompt_say_what_they_have() {
    for (value, expected) in [
        (json!({"text": "a", "id": 3}), "expected `prompt`, `messages` or `tokens`, found only text, id"),
        (json!({}), "found an empty row"),
        (json!({"prompt": "  "}), "expected a prompt, found an empty text"),
        (json!({"prompt": 3}), "expected `prompt` to be a text, or a list of messages with role and content, found 3"),
        (json!({"messages": []}), "found a list of 0"),
        (json!({"messages": [{"role": "user", "content": null}]}), "expected `messages` to be a text, or a list"),
        (json!({"messages": [{"content": "a"}]}), "found a list of 1"),
        (json!({"tokens": []}), "expected a prompt, found an empty list of tokens"),
        (json!({"tokens": [1, -1]}), "expected `tokens` to be a list of token ids, found a list of 2"),
        (json!({"tokens": [4294967296u64]}), "token ids"),
        (json!({"tokens": [1], "prompt": "a"}), "expected a prompt either as text or as `tokens`, found both"),
    ] {
        refused(row(value.clone()).prompt(false), "rows.jsonl, line 1: ");
        refused(row(value).prompt(false), expected);
    }
    refused(row(json!({"messages": [{"role": "user", "content": "a"}]})).prompt(true), "--raw uses no template");
}

#[test]
fn exchanges_come_in_three_forms() {
    let text = |prompt: Prompt, answer: &str| Exchange::Text { prompt, answer: answer.into() };
    let exchange = |value: Value| row(value).exchange(false, None);
    assert_eq!(exchange(json!({"prompt": "a", "response": ""})).unwrap(), text(Prompt::user("a"), ""));
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    assert_eq!(exchange(json!({ "messages": turns })).unwrap(), text(Prompt::user("a"), "b"));
    let ids = |prompt_len| Exchange::Tokens { tokens: vec![5, 6, 7], prompt_len };
    assert_eq!(exchange(json!({"tokens": [5, 6, 7]})).unwrap(), ids(0));
    assert_eq!(exchange(json!({"tokens": [5, 6, 7], "prompt_tokens": 2})).unwrap(), ids(2));
    assert_eq!(exchange(json!({"tokens": [5, 6, 7], "prompt_tokens": [5]})).unwrap(), ids(1));
    for bad in [
        json!({"tokens": [5], "prompt_tokens": 2}),
        json!({"tokens": [5], "prompt_tokens": [6]}),
        json!({"prompt": "a"}),
    ] {
        assert!(exchange(bad.clone()).is_err(), "{bad}");
    }
    assert!(exchange(json!({"messages": [{"role": "assistant", "content": "b"}]})).is_err(), "an answer to nothing");
}

#[test]
fn pairs_come_in_six_forms() {
    let expected = Preference { prompt: Prompt::user("a"), chosen: "good".into(), rejected: "bad".into() };
    let turn = |content: &str| json!({"role": "assistant", "content": content});
    let asked = json!({"role": "user", "content": "a"});
    let human = "\n\nHuman: a\n\nAssistant: ";
    for value in [
        json!({"prompt": "a", "chosen": "good", "rejected": "bad"}),
        json!({"prompt": [asked], "chosen": [turn("good")], "rejected": [turn("bad")]}),
        json!({"chosen": [asked, turn("good")], "rejected": [asked, turn("bad")]}),
        json!({"prompt": "a", "chosen": [asked, turn("good")], "rejected": [asked, turn("bad")]}),
        json!({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"}}),
        json!({"chosen": format!("{human}good"), "rejected": format!("{human}bad")}),
    ] {
        assert_eq!(row(value.clone()).pair().unwrap(), expected, "{value}");
    }
    let long = "\n\nHuman: a\n\nAssistant: b\nb\n\nHuman: c\n\nAssistant:";
    let pair = row(json!({"chosen": format!("{long} d"), "rejected": format!("{long}")})).pair().unwrap();
    let Prompt::Chat(turns) = &pair.prompt else { panic!("no chat") };
    assert_eq!(turns.iter().map(|turn| turn.content.as_str()).collect::<Vec<_>>(), ["a", "b\nb", "c"]);
    assert_eq!((pair.chosen.as_str(), pair.rejected.as_str()), ("d", ""));
}

#[test]
fn what_others_publish_is_known_by_its_columns() {
    for (value, expected) in [
        (json!({"goal": "a", "target": "t"}), "AdvBench"),
        (json!({"Behavior": "a", "BehaviorID": "i", "Tags": "x", "ContextString": ""}), "HarmBench"),
        (json!({"Index": 0, "Goal": "a", "Target": "t", "Behavior": "b"}), "JailbreakBench"),
        (json!({"category": "c", "source": "s", "forbidden_prompt": "a"}), "StrongREJECT"),
        (json!({"id": 1, "prompt": "a", "type": "homonyms", "label": "safe"}), "XSTest"),
        (json!({"id": 1, "prompt": "a", "type": "contrast_definitions", "label": "unsafe"}), "XSTest"),
        (json!({"id": 2, "prompt": "a", "type": "contrast_discr", "label": "unsafe"}), "XSTest"),
        (json!({"id": 3, "prompt": "a", "type": "contrast_privacy", "label": "unsafe"}), "XSTest"),
        (
            json!({"vanilla": "a", "adversarial": "", "completion": "c", "data_type": "vanilla_harmful"}),
            "WildJailbreak",
        ),
        (json!({"adversarial": "a", "label": 1}), "WildJailbreak"),
        (json!({"prompt": "a", "response_0": "r", "response_1": "s", "safer_response_id": 1}), "PKU-SafeRLHF"),
        (
            json!({"prompt": "a", "chosen": ["c"], "rejected": ["r"], "num_correct": 1, "total_completions": 2}),
            "RewardBench 2",
        ),
        (json!({"prompt": "a", "prompt_id": "i", "chosen": [], "rejected": []}), "UltraFeedback, binarized"),
        (json!({"prompt": "a", "chosen": "c", "rejected": "r"}), "TRL's preferences"),
        (json!({"chosen": "c", "rejected": "r"}), "HH-RLHF"),
        (json!({"prompt": "a", "completion": "c", "label": true}), "TRL's unpaired preferences"),
        (json!({"prompt": "a", "completion": "c", "label": "False"}), "TRL's unpaired preferences"),
        (json!({"input": "a", "ideal": "b"}), "openai/evals"),
        (json!({"prompt": "a", "completion": "c", "label": "safe"}), "none"),
        (json!({"prompt": "a", "category": "violence"}), "none"),
        (json!({"prompt": "a", "type": "question"}), "none"),
    ] {
        let found = row(value.clone()).format().map_or("none".to_string(), |format| format.to_string());
        assert_eq!(found, expected, "{value}");
    }
    let told = |value: Value| row(value).told(Some(Format::OrBench));
    assert_eq!(told(json!({"prompt": "a", "category": "c"})).format(), Some(Format::OrBench));
    let expected = "expected the columns of OR-Bench (prompt, category), found only prompt, kind";
    refused(told(json!({"prompt": "a", "kind": "benign"})).prompt(false), expected);
}

#[test]
fn what_others_publish_is_read_as_they_mean_it() {
    let prompt = |value| row(value).prompt(false).unwrap();
    assert_eq!(prompt(json!({"vanilla": "v", "adversarial": ""})), Prompt::user("v"));
    assert_eq!(prompt(json!({"vanilla": "v", "adversarial": "a"})), Prompt::user("a"));
    let copyright = |tags: &str| row(json!({"Behavior": "a", "BehaviorID": "i", "Tags": tags})).is_judged_by_hashes();
    assert!(copyright("hash_check, book") && !copyright("context"));
    let ideal = |value| row(json!({"input": "a", "ideal": value})).answered(false).unwrap().1;
    assert_eq!((ideal(json!("b")), ideal(json!(["b", "c"]))), ("b".to_string(), "b".to_string()));
    assert_eq!(row(json!({"input": "a", "ideal": "b"})).response().unwrap(), None, "nobody has answered");

    let pair = |chosen: &str, rejected: &str| Preference {
        prompt: Prompt::user("a"),
        chosen: chosen.into(),
        rejected: rejected.into(),
    };
    let lists = json!({"prompt": "a", "chosen": ["c", "d"], "rejected": ["r", "s"], "total_completions": 4});
    let all = [pair("c", "r"), pair("c", "s"), pair("d", "r"), pair("d", "s")];
    assert_eq!(row(lists.clone()).pairs().unwrap(), all);
    let mut bad = lists;
    bad["chosen"] = json!([3]);
    refused(row(bad).pairs(), "expected `chosen` to be a list of texts");

    let pku = |safer: Value, safe: [bool; 2]| {
        row(json!({"prompt": "a", "response_0": "r", "response_1": "s", "safer_response_id": safer,
            "is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}))
    };
    assert_eq!(pku(json!(1), [false, true]).calibration_pairs().unwrap(), [pair("s", "r")]);
    assert_eq!(pku(json!("0"), [true, true]).pairs().unwrap(), [pair("r", "s")]);
    assert_eq!(pku(json!(0), [true, true]).calibration_pairs().unwrap(), [], "both are acceptable");
    refused(pku(json!(2), [true, false]).pairs(), "expected `safer_response_id` to be 0 or 1, found 2");
}

#[test]
fn what_is_no_pair_is_refused() {
    let human = |text: &str| format!("\n\nHuman: {text}");
    let [a, x] = ["a", "x"].map(|asked| human(&format!("{asked}\n\nAssistant: b")));
    for (value, expected) in [
        (json!({"prompt": "a", "chosen": "b"}), "expected a field `rejected`, found none"),
        (json!({"prompt": "a", "chosen": "b", "rejected": 3}), "expected `rejected` to be one answer, found 3"),
        (json!({"chosen": "b", "rejected": "c"}), "a transcript (`Human:`, `Assistant:`) or messages"),
        (json!({"chosen": human("a"), "rejected": human("a")}), "does not end with the assistant's turn"),
        (json!({"chosen": a, "rejected": x}), "found different turns before it"),
    ] {
        refused(row(value).pair(), expected);
    }
}

#[test]
fn csv_rows_are_counted_and_checked() {
    let rows = csv("prompt,type\na,x\n\"b\nb\",y\nc\nd,z\n");
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 3, 5, 6]);
    assert!(rows[2].fault().unwrap().to_string().ends_with("line 5: expected 2 columns, as in the header, found 1"));
    assert_eq!(rows[3].text("type").unwrap(), "z");
    // A record's own line, whatever ends the lines before it.
    for text in ["prompt,type\r\na,x\r\n\r\nb\r\nc,z\r\n", "prompt,type\na,x\n\nb\nc,z\n"] {
        let rows = csv(text);
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 4, 5], "{text:?}");
        assert!(rows[1].fault().is_some());
    }
    let bytes = b"prompt,type\r\n\xff,x\r\nb,y\r\n";
    let rows = parse("x.csv", bytes, false).unwrap();
    assert_eq!((rows.len(), rows[0].fault().is_some(), user(&rows[1]).as_str()), (2, true, "b"));
    assert_eq!((rows[0].line, rows[1].line), (2, 3));
    refused(parse("x.csv", b"a,a\n1,2\n", false), "found two columns `a`");
}

#[test]
fn formats_are_told_apart() {
    let json = "{\"prompt\": \"x\"}";
    for (name, text, rows, prompt) in [
        ("a.CSV", "prompt\n{}", 1, "{}"),
        ("a.tsv", "prompt\tn\nx, y\t1", 1, "x, y"),
        ("a.txt", "{}", 1, "{}"),
        ("a.json", &format!(" [{json}]"), 1, "x"),
        ("a.json", &format!("{json}\n{json}"), 2, "x"),
        ("a.json", &format!("\u{feff}{json}"), 1, "x"),
        ("standard input", "goal,target\nx,y", 1, "x"),
        ("standard input", "well, hello\nyou", 2, "well, hello"),
    ] {
        let found = parse(name, text.as_bytes(), true).unwrap();
        assert_eq!((found.len(), user(&found[0]).as_str()), (rows, prompt), "{name}: {text}");
    }
    let plain = parse("a.txt", b" one \n\ntwo\r\n", false).unwrap();
    assert_eq!((user(&plain[0]).as_str(), user(&plain[1]).as_str(), plain[1].line), ("one", "two", 3));
    let list = parse("a.json", br#"[{"prompt":"a"}, 3]"#, false).unwrap();
    assert!(list[0].fault().is_none() && list[1].fault().is_some());
    refused(parse("a.json", b"[1", false), "a.json: expected a list");
}

#[test]
fn numbers_are_read_from_text_too() {
    let row = row(json!({"a": 1.5, "b": " 2 ", "c": "", "d": "x", "e": null}));
    assert_eq!((row.number("a").unwrap(), row.number("b").unwrap()), (Some(1.5), Some(2.0)));
    assert_eq!((row.number("c").unwrap(), row.number("e").unwrap()), (None, None));
    assert!(row.number("d").is_err());
    refused(row.text("none"), "expected a field `none`, found none");
}

#[test]
fn written_rows_are_read_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [json!({"prompt": "a,\n\"b\"", "n": 1}), json!({"prompt": "c", "extra": [1]})];
    for name in ["out.jsonl", "out.csv"] {
        let path = dir.path().join(name);
        let mut writer = RowWriter::create(Some(&path)).unwrap();
        rows.iter().for_each(|row| writer.write(row.as_object().unwrap()).unwrap());
        assert!(!path.exists(), "nothing before it is whole");
        refused(RowWriter::create(Some(&path)), "go on with --resume, or delete it");
        writer.finish().unwrap();
        let back = read(Some(&path), true).unwrap();
        assert_eq!(back.len(), 2);
        assert_eq!(user(&back[0]), "a,\n\"b\"");
        assert_eq!((back[0].number("n").unwrap(), back[1].number("n").unwrap()), (Some(1.0), None));
    }
    refused(RowWriter::create(Some(&dir.path().join("no/out.jsonl"))), "no/out.jsonl: cannot write");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside the two files");
    write_atomic(&dir.path().join("empty.jsonl"), b"\n").unwrap();
    assert!(read(Some(&dir.path().join("empty.jsonl")), true).unwrap().is_empty());
}

#[test]
fn an_error_is_placed_once() {
    let mut row = row(json!({"prompt": "a"}));
    let inner = Error::Row { place: "prompt".into(), expected: "b".into(), found: "c".into() };
    let placed = row.placed(inner);
    assert_eq!(placed.to_string(), "rows.jsonl, line 1: prompt: expected b, found c");
    let again = row.placed(placed);
    assert_eq!(again.to_string(), "rows.jsonl, line 1: prompt: expected b, found c");
    row.fail(&again);
    assert_eq!(
        (row.object["line"].as_u64(), row.object["error"].as_str()),
        (Some(1), Some(again.to_string().as_str()))
    );
}
