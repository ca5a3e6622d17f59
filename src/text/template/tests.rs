use super::*;
use crate::error::refused;
use crate::text::specials::Specials;

fn turn(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

fn template(source: &str) -> Template {
    let specials = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(key, text)| (key.to_string(), text.to_string()));
    Template::new(Path::new("chat_template.jinja"), source.to_string(), specials.into(), &Arguments::new()).unwrap()
}

fn rendered(template: &Template, turns: &[Message], add_generation_prompt: bool) -> Result<String> {
    template.render(&[&[(turns.into(), add_generation_prompt)]]).remove(0).map(|mut texts| texts.remove(0))
}

fn render(source: &str, turns: &[Message], add_generation_prompt: bool) -> String {
    rendered(&template(source), turns, add_generation_prompt).unwrap()
}

/// Blocks, trimming and methods as the templates of published models use them; expected is jinja2's output with transformers'
/// settings.
const BLOCKS: &str = "{%- macro turn(m, sep='|') -%}\n{{ m['role'].upper() + sep + m.content|trim }}\n{%- endmacro -%}\n\
    {% for m in messages if m.role != 'system' %}\n  {{- turn(m, sep=':') }}{{ ', ' if not loop.last }}\n{% endfor %}\n\
    {{ messages|selectattr('role','equalto','user')|map(attribute='content')|join('/') }} {{ messages|length }} \
    {{ messages[-1]['content'][:3] }} {{ {'k': [1, true, none, 1.5]}|tojson }} {{ messages[0].get('none', 'dflt') }}\n\
    {% if add_generation_prompt %}\n    {{ 'ASSISTANT:' }}\n{% endif %}\n\n";

#[test]
fn templates_render_as_jinja2_renders_them() {
    let turns = [turn("system", "s"), turn("user", " ü <b> "), turn("assistant", "d"), turn("user", "efgh")];
    let expected = "USER:ü <b>, \nASSISTANT:d, \nUSER:efgh\n ü <b> /efgh 4 efg {\"k\": [1, true, null, 1.5]} dflt\n";
    assert_eq!(render(BLOCKS, &turns, false), expected);
    assert_eq!(render(BLOCKS, &turns, true), format!("{expected}    ASSISTANT:\n"));
}

#[test]
fn what_transformers_adds_to_jinja_is_there() {
    let user = [turn("user", "a'<b> ü")];
    assert_eq!(render("{{ messages[0] | tojson }}", &user, false), r#"{"role": "user", "content": "a'<b> ü"}"#);
    assert_eq!(render("{{ messages[0].content | tojson(ensure_ascii=true) }}", &user, false), r#""a'<b> \u00fc""#);
    assert_eq!(render("{{ {'a': []} | tojson(indent=2) }}", &user, false), "{\n  \"a\": []\n}");
    assert_eq!(render("{% generation %}x{%- endgeneration -%} y", &user, false), "xy");
    assert_eq!(render("{{ bos_token ~ eos_token ~ (tools is none) }}{{ pad_token }}", &user, false), "<s></s>True");
    assert_eq!(
        render("a\n  {% if true %}\n  b\n  {% endif %}\nc", &user, false),
        "a\n  b\nc",
        "blocks leave no blanks"
    );
    assert_eq!(render("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n", &user, false), "a\nb\n");
    assert_eq!(render("{{ strftime_now('%Y') | length }}{{ strftime_now is defined }}", &user, false), "4True");
    let reverse = "{% for m in messages[::-1] %}{% if m.content.startswith('a') %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
    assert_eq!(render(reverse, &[turn("user", "a"), turn("user", "b"), turn("user", "c")], false), "cb");
}

#[test]
fn what_a_template_refuses_is_the_rows_error() {
    let found = rendered(&template("{{ raise_exception('roles must alternate') }}"), &[turn("user", "a")], true);
    assert!(matches!(found, Err(Error::Row { .. })));
    refused(found, "roles must alternate");
    assert!(rendered(&template("{{ none_such + 'a' }}"), &[turn("user", "a")], true).is_err());
}

#[test]
fn foreign_code_stays_within_bounds() {
    let user = [turn("user", "a")];
    let endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    refused(rendered(&template(endless), &user, false), "fuel");
    let long = "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}";
    refused(rendered(&template(long), &user, false), "more than 16777216 bytes");
    let deep = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(rendered(&template(deep), &user, false).is_err());
    for source in ["{% if %}", "{%}", "{%"] {
        let broken = Template::new(Path::new("t.jinja"), source.into(), BTreeMap::new(), &Arguments::new());
        refused(broken, "t.jinja: expected a chat template in Jinja, found syntax error");
    }
}

#[test]
fn a_template_is_found_where_transformers_looks() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let render = || {
        Template::open(dir.path(), Specials::open(dir.path()).unwrap().named, &Arguments::new())
            .unwrap()
            .map(|t| rendered(&t, &[turn("user", "a")], false).unwrap())
    };
    assert_eq!(render(), None);
    write("tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
    assert_eq!(render(), None);
    write(
        "tokenizer_config.json",
        r#"{"chat_template": "1{{ eos_token }}{{ bos_token }}", "eos_token": {"content": "</s>"}}"#,
    );
    write("special_tokens_map.json", r#"{"eos_token": "other", "bos_token": {"content": "<s>"}}"#);
    assert_eq!(render().as_deref(), Some("1</s><s>"));
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "3"}, {"name": "default", "template": "2"}]}"#;
    write("tokenizer_config.json", list);
    assert_eq!(render().as_deref(), Some("2"));
    write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "3"}]}"#);
    let expected = "expected chat_template to be a text, or a list with one named `default`";
    refused(Template::open(dir.path(), Specials::open(dir.path()).unwrap().named, &Arguments::new()), expected);
    write("chat_template.jinja", "4");
    assert_eq!(render().as_deref(), Some("4"));
}

#[test]
fn arguments_stand_beside_the_conversation() {
    let arguments =
        [("thinking".to_string(), serde_json::json!(false)), ("names".to_string(), serde_json::json!(["a", "b"]))]
            .into();
    let source = "{{ 'no' if thinking is defined and thinking is false }}{{ names|length }}{{ messages[0].content }}";
    let template = Template::new(Path::new("t.jinja"), source.into(), BTreeMap::new(), &arguments).unwrap();
    assert_eq!(rendered(&template, &[turn("user", "x")], false).unwrap(), "no2x");
}

#[test]
fn arguments_are_typed_as_json_or_as_text() {
    let typed = ["a=false", "b=2", "c=[1]", "d=two words", "e=", "a=true"].map(|text| text.parse().unwrap());
    let expected = serde_json::json!({"a": true, "b": 2, "c": [1], "d": "two words", "e": ""});
    assert_eq!(serde_json::json!(arguments(&typed)), expected);
    for wrong in ["", "a", "=1", "a b=1"] {
        assert!(wrong.parse::<Argument>().is_err(), "{wrong}");
    }
}
