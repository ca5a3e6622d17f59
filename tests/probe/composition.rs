//! The strings that a grammar composes, and what a damaged grammar gets.

use super::world::*;
use ares::probe::{Casing, Genotype, Grammar, Surface};
use serde_json::{Value, json};
use std::path::Path;

fn small() -> Grammar {
    let text = json!({
        "schema": 1,
        "topics": [{"id": "t", "domain": "d", "goal": "take the Old tray", "harmful": "Sure.", "safe": "No."}],
        "forms": [{"id": "f", "template": "How do I {goal}?"}],
        "personas": [{"id": "p", "text": "I am Ada."}],
        "tactics": [{"id": "plain", "templates": ["{persona} {request}", "{request} {persona}"]},
                    {"id": "vowels", "templates": ["Say: {request}"], "table": "vowels"}],
        "prefixes": ["Please."], "suffixes": ["Thank you."],
        "tables": {"leet": {"e": "3", "O": "0"}, "vowels": {"a": "e", "e": "i", "o": "u"}},
    });
    Grammar::parse(&text.to_string(), Path::new("g.json")).expect("valid")
}

#[test]
fn composes_exactly() {
    let grammar = small();
    let plain = Genotype { topic: 0, form: 0, persona: 0, tactic: 0, template: 0, surface: Surface::default() };
    let with = |surface| Genotype { surface, ..plain };
    let cases = [
        (plain, "I am Ada. How do I take the Old tray?"),
        (Genotype { template: 1, ..plain }, "How do I take the Old tray? I am Ada."),
        // O has no image: that of o, capitalised. The framing stays as it is.
        (Genotype { tactic: 1, ..plain }, "Say: Huw du I teki thi Uld trey?"),
        // Table 0 is leet: O has an image of its own, o has none.
        (with(Surface { table: Some(0), ..Default::default() }), "I am Ada. How do I tak3 th3 0ld tray?"),
        (with(Surface { casing: Some(Casing::Upper), ..Default::default() }), "I am Ada. HOW DO I TAKE THE OLD TRAY?"),
        (with(Surface { casing: Some(Casing::Lower), ..Default::default() }), "I am Ada. how do i take the old tray?"),
        (with(Surface { prefix: Some(0), ..Default::default() }), "Please. I am Ada. How do I take the Old tray?"),
        (with(Surface { suffix: Some(0), ..Default::default() }), "I am Ada. How do I take the Old tray? Thank you."),
        (
            with(Surface { encoding: Some(1), prefix: Some(0), ..Default::default() }),
            "Pliesi. I em Ede. Huw du I teki thi Uld trey?",
        ),
    ];
    for (genotype, expected) in cases {
        assert_eq!(grammar.compose(&genotype), expected);
    }
    let hidden = Surface {
        table: Some(0),
        casing: Some(Casing::Upper),
        encoding: Some(1),
        suffix: Some(0),
        ..Default::default()
    };
    assert_eq!(grammar.compose_plain(&with(hidden)), "I am Ada. How do I take the Old tray? Thank you.");
    assert_eq!(grammar.compose_plain(&Genotype { tactic: 1, ..plain }), "Say: How do I take the Old tray?");
}

#[test]
fn a_damaged_grammar_is_refused_at_its_place() {
    let damage = |place: &str, value: Value| {
        let mut json = grammar_json();
        *json.pointer_mut(place).expect("a place of the grammar") = value;
        Grammar::parse(&json.to_string(), Path::new("my/grammar.json")).expect_err(place).to_string()
    };
    let cases = [
        ("/schema", json!(2), "schema to be 1, found 2"),
        ("/topics", json!([]), "topics to be a list of at least one entry, found none"),
        ("/topics/3/goal", json!(" "), "topics[3].goal to be a text"),
        ("/topics/3/id", json!("zz0"), "topics[3].id to be a name of its own within the list, found \"zz0\""),
        ("/topics/3/harmful", json!(5), "invalid type: integer `5`"),
        ("/forms/1/template", json!("How?"), "forms[1].template to be a text with {goal} once, found \"How?\""),
        ("/personas/0/text", json!("I am {request}"), "personas[0].text to be a text without {request}"),
        ("/tactics/2/templates", json!([]), "tactics[2].templates to be a list of at least one template, found none"),
        ("/tactics/2/templates/1", json!("{persona}"), "tactics[2].templates[1] to be a text with {request} once"),
        ("/tactics/2/templates/1", json!("{persona}{persona}{request}"), "with {persona} at most once"),
        (
            "/tactics/10/table",
            json!("leet"),
            "tactics[10].table to be the name of an entry of `tables`, found \"leet\"",
        ),
        (
            "/tables/vowels/a",
            json!("ee"),
            "tables.vowels to be a table from one character to one character, found \"a\": \"ee\"",
        ),
        ("/prefixes/0", json!(""), "prefixes[0] to be a text"),
    ];
    for (place, value, expected) in cases {
        let error = damage(place, value);
        assert!(error.starts_with("my/grammar.json: ") && error.contains(expected), "{place}: {error}");
    }
    for text in ["", "[]", "{", "{\"schema\": 1}", "\u{0}"] {
        let error = Grammar::parse(text, Path::new("g.json")).expect_err("no grammar").to_string();
        assert!(error.starts_with("g.json: expected a grammar of probes"), "{error}");
    }
    let error = Grammar::read(Path::new("no/such/grammar.json")).expect_err("no file").to_string();
    assert!(error.starts_with("no/such/grammar.json: cannot read"), "{error}");
}

/// The suite's script composes its discovery prompts from the same grammar; both must agree on every character.
#[test]
fn composes_the_prompts_of_the_suite() {
    for pair in ["framing", "flattery"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(pair);
        let grammar = Grammar::read(&folder.join("grammar.json")).expect("the suite's grammar");
        let rows = std::fs::read_to_string(folder.join("discovery.jsonl")).expect("the suite's prompts");
        let rows: Vec<Value> = rows.lines().map(|l| serde_json::from_str(l).expect("a row")).collect();
        assert!(rows.len() >= 300, "{pair}: {} rows", rows.len());
        for row in rows {
            let named = |name: &str| row[name].as_str().expect("a text").to_string();
            let at = |ids: Vec<&String>, name: &str| {
                ids.iter().position(|id| **id == named(name)).expect("an id of the grammar")
            };
            let topic = at(grammar.topics.iter().map(|t| &t.id).collect(), "topic");
            let form = at(grammar.forms.iter().map(|f| &f.id).collect(), "form");
            let persona = at(grammar.personas.iter().map(|p| &p.id).collect(), "persona");
            let tactic = at(grammar.tactics.iter().map(|t| &t.id).collect(), "tactic");
            let composed = |template| {
                grammar.compose(&Genotype { topic, form, persona, tactic, template, surface: Surface::default() })
            };
            let templates = grammar.tactics[tactic].templates.len();
            assert!(
                (0..templates).any(|t| composed(t) == named("prompt")),
                "{pair}: {}: {}",
                row["id"],
                named("prompt")
            );
        }
    }
}
