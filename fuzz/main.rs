//! libFuzzer's side of `ares::fuzz`: `ARES_FUZZ` names the format.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs, panic, process};

use ares::fuzz::{FORMATS, Reader};
use libfuzzer_sys::fuzz_target;

static READER: OnceLock<Reader> = OnceLock::new();

/// Prepares the folder that is read, and fills the corpus in `ARES_FUZZ_CORPUS` with the seeds.
fn prepare() -> Reader {
    let name = env::var("ARES_FUZZ").unwrap_or_default();
    let Some(format) = FORMATS.iter().find(|format| format.name == name) else {
        println!("{}", FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(" "));
        process::exit(2);
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("fuzz/ lies in the repository");
    let folder = tempfile::tempdir().expect("a temporary folder").keep();
    let reader = Reader::new(format, root, &folder).expect("the repository's files");
    let corpus = PathBuf::from(env::var_os("ARES_FUZZ_CORPUS").expect("a folder"));
    for seed in reader.seeds(root) {
        let name = seed.display().to_string().replace('/', "-");
        fs::copy(&seed, corpus.join(name.trim_matches('-'))).expect("a seed can be copied");
    }
    // A panic that the program contains is the file's fault, not a crash.
    let told = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !ares::text::is_contained() {
            told(info);
        }
    }));
    reader
}

fuzz_target!(init: { let _ = READER.set(prepare()); }, |bytes: &[u8]| {
    if let Some(reader) = READER.get() {
        reader.read(bytes);
    }
});
