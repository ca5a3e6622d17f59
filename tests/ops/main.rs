//! Every operation in its own file, with four kinds of test: `gradient` (the plain loops' backward = central differences of their
//! forward), `naive` (the fast CPU kernel = the plain loops), `parity` (the device's kernel = the CPU that rounds as it does) and
//! `invariance` (a row's bits do not depend on its company). `cargo test --test ops norm` runs one operation's,
//! `cargo test --test ops parity` one kind. The device is the simulator, or with ARES_PARITY_DEVICE=cuda a GPU.

mod toolkit;

mod adamw;
mod attention;
mod decode;
mod gate_up;
mod layer_norm;
mod lm_head;
mod lora;
mod norm;
mod qkv;
mod rows;
mod sample;
mod score_head;

use std::path::Path;

/// What an operation does not have, and why.
const WITHOUT: &[(&str, &[&str], &str)] = &[
    ("adamw", &["gradient", "invariance"], "an update: nothing is differentiated through it, and it has no rows"),
    ("ceilings", &["naive.rs", "gradient", "naive", "parity", "invariance"], "measures rates; no operation of a model"),
    ("decode", &["gradient"], "nothing is trained through a cache"),
    (
        "product",
        &["cpu.rs", "gradient", "naive", "parity", "invariance"],
        "a part of lora, tested through it; its mod.rs is the CPU's",
    ),
    ("rows", &["invariance"], "copies rows"),
    ("sample", &["gradient"], "a drawn token has no gradient"),
];

#[test]
fn every_operation_has_its_files_and_its_four_kinds() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = std::fs::read_dir(root.join("src/ops")).unwrap().map(|entry| entry.unwrap().path());
    let operations: Vec<_> = folders.filter(|path| path.is_dir()).collect();
    assert!(operations.len() >= 14, "found {} operations", operations.len());
    let mut missing = Vec::new();
    for folder in operations {
        let op = folder.file_name().unwrap().to_str().unwrap();
        let without = |what| WITHOUT.iter().any(|(name, lacks, _)| *name == op && lacks.contains(&what));
        let files = ["mod.rs", "naive.rs", "cpu.rs", "cuda.rs"];
        missing.extend(
            files.iter().filter(|file| without(file) == folder.join(file).is_file()).map(|file| format!("{op}/{file}")),
        );
        let tests = std::fs::read_to_string(root.join(format!("tests/ops/{op}.rs"))).unwrap_or_default();
        for kind in ["gradient", "naive", "parity", "invariance"] {
            let there = tests.contains(&format!("#[test]\nfn {kind}() {{"));
            if there == without(kind) {
                missing.push(format!("tests/ops/{op}.rs: {kind}"));
            }
        }
    }
    assert!(missing.is_empty(), "missing, or there although said to be without: {missing:#?}");
}
