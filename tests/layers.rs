//! The order of the house: a layer uses only what stands below it, `backend` names no operation, `model` names no backend,
//! `probe` and `detect` see no tensor.
//!
//! The sources are read as text: comments and string literals are blanked, then every path that starts at the crate's root
//! (`crate::…` or spelled `super::super::…`) is held against the order.

use std::fs;
use std::path::{Path, PathBuf};

/// Lower layers first; layers on one line are siblings and do not know each other.
const ORDER: &[&[&str]] = &[
    &["error"],
    &["backend", "journal"],
    &["ops"],
    &["text"],
    &["model"],
    &["judge"],
    &["attacker"],
    &["repair"],
    &["probe", "detect"],
    &["run", "bench"],
    &["report"], // reads what a run has written; a run knows nothing of its report
    &["cli", "fuzz"],
    &["main"],
];

/// Names that a layer may not contain, outside tests.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("model", &["Cpu", "cpu", "Cuda", "cuda"], "model names no backend"),
    ("probe", &["Tensor", "ops", "backend"], "probe sees no tensor"),
    ("detect", &["Tensor", "ops", "backend"], "detect sees no tensor"),
];

#[test]
fn no_arrow_turns_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (files, operations) = (sources(&root), operations(&root));
    assert!(files.len() > 10 && operations.len() > 10, "{} files, {} operations", files.len(), operations.len());
    let faults: Vec<String> = files
        .iter()
        .filter(|file| !file.ends_with("src/lib.rs")) // only names its modules
        .flat_map(|file| {
            let name = file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            check(&name, &fs::read_to_string(file).unwrap(), &operations)
        })
        .collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// All complaints about one file; `name` is relative to `src`.
fn check(name: &str, text: &str, operations: &[String]) -> Vec<String> {
    let rank = |layer: &str| ORDER.iter().position(|names| names.contains(&layer));
    let layer = name.split('/').next().unwrap().trim_end_matches(".rs");
    let Some(own) = rank(layer) else {
        return vec![format!("src/{name}: `{layer}` has no place in the order of the layers")];
    };
    let code = blank(text);
    let mut faults = Vec::new();
    for used in used_layers(name, &code) {
        // What has no rank is an item of the crate's root, such as `crate::Result`.
        if used.is_empty() || rank(used).is_some_and(|other| other > own || (other == own && used != layer)) {
            faults.push(format!("src/{name}: `{layer}` uses `{used}`, which is not one name of a layer below it"));
        }
    }
    // Unit tests stand at a file's end and may name what the code may not: a test of the model needs some backend.
    let is_test = name.ends_with("/tests.rs") || name.contains("/tests/");
    let tested = code.split("#[cfg(test)]").next().filter(|_| !is_test).unwrap_or_default();
    for word in identifiers(tested) {
        let rules = FORBIDDEN.iter().filter(|(l, words, _)| *l == layer && words.contains(&word));
        faults.extend(rules.map(|(.., rule)| format!("src/{name}: `{word}`: {rule}")));
        if layer == "backend" && operations.iter().any(|operation| operation == word) {
            faults.push(format!("src/{name}: `{word}`: backend names no operation"));
        }
    }
    faults
}

/// The names of operations: every trait of `src/ops` and every function of both directions.
fn operations(root: &Path) -> Vec<String> {
    let code: String =
        sources(&root.join("ops")).iter().map(|file| blank(&fs::read_to_string(file).unwrap())).collect();
    let words: Vec<&str> = identifiers(&code).collect();
    let names = words.windows(2).filter(|pair| {
        pair[0] == "trait" || (pair[0] == "fn" && (pair[1].ends_with("_forward") || pair[1].ends_with("_backward")))
    });
    names.map(|pair| pair[1].to_string()).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// The first part of every path that starts at the crate's root; empty where a list in braces follows.
fn used_layers<'a>(name: &str, code: &'a str) -> Vec<&'a str> {
    // So many `super::` lead from a file's own module to the root: `run/mod.rs` 1, `run/dir.rs` 2.
    let climb = "super::".repeat(name.split('/').count() - usize::from(name.ends_with("/mod.rs")));
    // `$crate::` and `crate::` alike, but not the tail of `my_crate::`.
    let own = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
    let down = code.match_indices("crate::").filter(|(at, _)| own(*at));
    let head = |rest: &'a str| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    // A list or a star after `super::` is that of a module inside the file.
    let up = code.match_indices(&climb).filter(|(at, _)| code[at + climb.len()..].starts_with(char::is_alphabetic));
    let paths = down.chain(up).map(|(at, prefix)| code[at + prefix.len()..].trim_start_matches("super::"));
    paths.map(head).collect()
}

/// Source with comments and string literals blanked, so that prose counts for nothing.
fn blank(text: &str) -> String {
    let text = text.replace("\\\\", "").replace("\\\"", "").replace("'\"'", "");
    let (mut out, mut rest) = (String::with_capacity(text.len()), text.as_str());
    while let Some(at) = rest.find(['/', '"']) {
        let (before, from) = rest.split_at(at);
        let close = match from.as_bytes() {
            [b'/', b'/', ..] => "\n",
            [b'/', ..] => "",
            _ if before.ends_with("r#") => "\"#",
            _ => "\"",
        };
        out.extend([before, " "]);
        rest = from[1..].split_once(close).map_or("", |(_, rest)| rest);
    }
    out + rest
}

fn identifiers(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

#[test]
fn planted_violations_are_found_and_honest_sources_pass() {
    let ops = ["norm_forward".to_string(), "LmHead".to_string()];
    for (name, text, faults) in [
        ("ops/norm/mod.rs", "use crate::model::Transformer;", 1),
        ("probe/search.rs", "use crate::detect::Measure;", 1),
        ("run/dir.rs", "use crate::{error::Error, cli::{Cli, Args}, report};", 1),
        ("text/mod.rs", "use super::model::Answer;", 1),
        ("text/rows/csv.rs", "fn f() -> super::super::super::run::Summary {}", 1),
        ("gadgets.rs", "", 1),
        ("backend/cpu.rs", "fn norm_forward() {}", 1),
        ("backend/mod.rs", "trait Ops: LmHead {}", 1),
        ("model/block.rs", "fn f(b: &Cpu) {}", 1),
        ("probe/mod.rs", "fn f(x: &Tensor) {}", 1),
        ("detect/mod.rs", "use crate::ops::norm;", 1),
        ("run/dir.rs", "use crate::error::Result; use super::journal; use crate::Error;", 0),
        ("model/mod.rs", "//! not for Cpu\nlet s = \"crate::run \\\" Cpu\"; let r = r#\"crate::cli \"#;", 0),
        ("model/head.rs", "fn f() {}\n#[cfg(test)]\nmod tests { use crate::backend::Cpu; }", 0),
        ("backend/mod.rs", "fn rows() {} // norm_forward", 0),
        ("main.rs", "use ares::cli;", 0),
    ] {
        assert_eq!(check(name, text, &ops).len(), faults, "{name}: {text}");
    }
}
