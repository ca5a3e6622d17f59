//! The order of the house: a layer uses only what stands below it, `backend` names no operation, `model` names no backend,
//! `probe` and `detect` see no tensor.
//!
//! The sources are read as text: comments and string literals are blanked, then every `crate::…` path (also inside braces,
//! also spelled `super::super::…`) is held against the order.

use std::fs;
use std::path::{Path, PathBuf};

/// Lower layers first; layers on one line are siblings and do not know each other.
const ORDER: &[&[&str]] = &[
    &["error"],
    &["backend"],
    &["ops"],
    &["text"],
    &["model"],
    &["judge"],
    &["repair"],
    &["probe", "detect"],
    &["run", "bench"],
    &["report"], // reads what a run has written; a run knows nothing of its report
    &["cli"],
    &["main"],
];

/// Names that a layer may not contain, outside tests.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("model", &["Cpu", "cpu", "Cuda", "cuda"], "model names no backend"),
    ("probe", &["Tensor", "ops", "backend"], "probe sees no tensor"),
    ("detect", &["Tensor", "ops", "backend"], "detect sees no tensor"),
];

fn rank(layer: &str) -> Option<usize> {
    ORDER.iter().position(|names| names.contains(&layer))
}

#[test]
fn no_arrow_turns_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    assert!(files.len() > 10, "expected the crate's sources under {}, found {} files", root.display(), files.len());
    let operations = operations(&root);
    let mut faults = Vec::new();
    for file in files {
        let name = file.strip_prefix(&root).expect("below src").to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(&file).expect("readable source");
        faults.extend(check(&name, &text, &operations));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// All complaints about one file; `name` is relative to `src`.
fn check(name: &str, text: &str, operations: &[String]) -> Vec<String> {
    if name == "lib.rs" {
        return Vec::new(); // only names its modules
    }
    let layer = name.split('/').next().expect("first part").trim_end_matches(".rs");
    let Some(own) = rank(layer) else {
        return vec![format!("src/{name}: `{layer}` has no place in the order of the layers")];
    };
    let code = blank(text);
    let mut faults = Vec::new();
    for used in used_layers(name, &code) {
        let turned = match rank(&used) {
            Some(other) => other > own || (other == own && used != layer),
            None => false, // an item of the crate's root, such as `crate::Result`
        };
        if turned {
            faults.push(format!("src/{name}: `{layer}` uses `{used}`, which is not below it"));
        }
    }
    let is_test = name.ends_with("/tests.rs") || name.contains("/tests/");
    let names = identifiers(if is_test { "" } else { without_tests(&code) });
    for (_, words, rule) in FORBIDDEN.iter().filter(|(l, _, _)| *l == layer) {
        faults.extend(names.iter().filter(|n| words.contains(n)).map(|n| format!("src/{name}: `{n}`: {rule}")));
    }
    if layer == "backend" {
        let named = names.iter().filter(|n| operations.iter().any(|op| op == *n));
        faults.extend(named.map(|n| format!("src/{name}: `{n}`: backend names no operation")));
    }
    faults
}

/// The names of operations: every trait of `src/ops` and every function of both directions.
fn operations(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for file in sources(&root.join("ops")) {
        let code = blank(&fs::read_to_string(&file).expect("readable source"));
        for pair in identifiers(&code).windows(2) {
            match pair {
                ["trait", name] => found.push(name.to_string()),
                ["fn", name] if name.ends_with("_forward") || name.ends_with("_backward") => {
                    found.push(name.to_string())
                }
                _ => {}
            }
        }
    }
    found
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("readable folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The first parts of all paths that start at the crate's root.
fn used_layers(name: &str, code: &str) -> Vec<String> {
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` and `crate::` alike, but not the tail of `my_crate::`.
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            used.extend(heads(&code[at + "crate::".len()..]));
        }
    }
    let climb = "super::".repeat(depth(name));
    for (at, _) in code.match_indices(&climb) {
        used.extend(heads(code[at + climb.len()..].trim_start_matches("super::")));
    }
    used
}

/// How many `super::` lead from a file's own module to the root: `run/mod.rs` 1, `run/dir.rs` 2.
fn depth(name: &str) -> usize {
    name.split('/').count() - usize::from(name.ends_with("/mod.rs"))
}

/// The first identifiers of what follows `crate::`, which is a name or a (nested) list in braces.
fn heads(rest: &str) -> Vec<String> {
    let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(list) = rest.trim_start().strip_prefix('{') else {
        return vec![word(rest.trim_start())];
    };
    let (mut level, mut start, mut found) = (1, 0, Vec::new());
    for (i, c) in list.char_indices() {
        match c {
            '{' => level += 1,
            '}' => level -= 1,
            _ => {}
        }
        if (c == ',' && level == 1) || level == 0 {
            found.push(word(list[start..i].trim_start()));
            start = i + 1;
        }
        if level == 0 {
            break;
        }
    }
    found
}

/// Source with comments, string and character literals blanked, so that prose counts for nothing.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < bytes.len() {
        let rest = &text[i..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |e| e + 2)
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = hashes + 2;
            rest[open..].find(&close).map_or(rest.len(), |e| open + e + close.len())
        } else if rest.starts_with('"') {
            quoted(rest)
        } else if rest.starts_with("'\"'") {
            3 // the one character literal that would open a string
        } else if rest.starts_with("'\\\"'") {
            4
        } else {
            let c = rest.chars().next().expect("not at the end");
            out.push(c);
            i += c.len_utf8();
            continue;
        };
        out.extend(rest[..length].chars().filter(|c| *c == '\n'));
        out.push(' ');
        i += length;
    }
    out
}

/// The number of `#` when `rest` begins a raw string.
fn raw_string(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    let hashes = after.bytes().take_while(|b| *b == b'#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// Length of the string literal that `rest` begins with.
fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (i, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return i + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Unit tests stand at a file's end and may name what the code may not: a test of the model needs some backend.
fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]").map_or(code, |at| &code[..at])
}

fn identifiers(code: &str) -> Vec<&str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty()).collect()
}

#[test]
fn planted_violations_are_found() {
    let ops = ["norm_forward".to_string(), "LmHead".to_string()];
    let faults = |name: &str, text: &str| check(name, text, &ops).len();
    assert_eq!(faults("ops/norm/mod.rs", "use crate::model::Transformer;"), 1, "upwards");
    assert_eq!(faults("probe/search.rs", "use crate::detect::Measure;"), 1, "siblings");
    assert_eq!(faults("run/dir.rs", "use crate::{error::Error, cli::{Cli, Args}, report};"), 2, "inside braces");
    assert_eq!(faults("text/mod.rs", "use super::model::Answer;"), 1, "through super");
    assert_eq!(faults("text/rows/csv.rs", "fn f() -> super::super::super::run::Summary {}"), 1, "through many supers");
    assert_eq!(faults("gadgets.rs", ""), 1, "unknown layer");
    assert_eq!(faults("backend/cpu.rs", "fn norm_forward() {}"), 1, "operation in backend");
    assert_eq!(faults("backend/mod.rs", "trait Ops: LmHead {}"), 1, "operation's trait in backend");
    assert_eq!(faults("model/block.rs", "fn f(b: &Cpu) {}"), 1, "backend in model");
    assert_eq!(faults("probe/mod.rs", "fn f(x: &Tensor) {}"), 1, "tensor in probe");
    assert_eq!(faults("detect/mod.rs", "use crate::ops::norm;"), 1, "ops in detect");
}

#[test]
fn honest_sources_pass() {
    let ops = ["norm_forward".to_string()];
    let faults = |name: &str, text: &str| check(name, text, &ops);
    assert_eq!(faults("run/dir.rs", "use crate::error::Result; use super::journal; use crate::Error;"), [""; 0]);
    assert_eq!(
        faults("model/mod.rs", "//! not for Cpu\nlet s = \"crate::run Cpu\"; let r = r#\"crate::cli \"#;"),
        [""; 0]
    );
    assert_eq!(faults("model/head.rs", "fn f() {}\n#[cfg(test)]\nmod tests { use crate::backend::Cpu; }"), [""; 0]);
    assert_eq!(faults("backend/mod.rs", "fn rows() {} // norm_forward"), [""; 0]);
    assert_eq!(faults("main.rs", "use ares::cli;"), [""; 0]);
}
