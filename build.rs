//! Embeds the weakened suite, so that `ares demo` runs from an empty folder on another machine, and the kernels, with a typed
//! launcher for each.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha2::{Digest, Sha256};

#[path = "src/backend/cuda/source.rs"]
#[allow(dead_code)] // the program uses the rest
mod source;

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap_or_default());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/backend/cuda/source.rs");
    suite(&root.join("models"), &out.join("suite"))?;
    pack(&out.join("kernels.pack.xz"))?;
    if let Err(fault) = kernels(&root, &out.join("kernels.rs")) {
        println!("cargo::error={fault}");
    }
    Ok(())
}

/// The compiled kernels that a release carries: the pack, compressed by xz, that ARES_EMBED names, else none.
fn pack(out: &Path) -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=ARES_EMBED");
    let Some(file) = env::var_os("ARES_EMBED") else { return fs::write(out, []) };
    println!("cargo::rerun-if-changed={}", Path::new(&file).display());
    fs::copy(file, out).map(drop)
}

/// Every file with its SHA-256 and compressed by zlib: a third of the program would be the suite otherwise.
fn suite(models: &Path, out: &Path) -> io::Result<()> {
    println!("cargo::rerun-if-changed=models");
    let mut files = Vec::new();
    collect(models, &mut files)?;
    files.sort();
    fs::create_dir_all(out)?;
    let mut code = String::from(
        "/// (path below the suite's folder, SHA-256, contents compressed by zlib)\npub(super) const FILES: &[(&str, [u8; 32], &[u8])] = &[\n",
    );
    for (i, file) in files.iter().enumerate() {
        let name = file.strip_prefix(models).unwrap_or(file).to_string_lossy().replace('\\', "/");
        let bytes = fs::read(file)?;
        let hash: [u8; 32] = Sha256::digest(&bytes).into();
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&bytes)?;
        let place = out.join(format!("{i}.z"));
        fs::write(&place, packed.finish()?)?;
        // Writing to a String cannot fail.
        let _ = writeln!(code, "    ({name:?}, {hash:?}, include_bytes!({:?})),", place.display().to_string());
    }
    code.push_str("];\n");
    fs::write(out.join("files.rs"), code)
}

/// One static per `kernels/*.cu` (headers inlined, trampolines appended), and a launcher per kernel.
fn kernels(root: &Path, out: &Path) -> Result<(), String> {
    println!("cargo::rerun-if-changed=kernels");
    let folder = root.join("kernels");
    let text = |name: &str| fs::read_to_string(folder.join(name)).map_err(|e| format!("kernels/{name}: {e}"));
    let mut files = Vec::new();
    collect(&folder, &mut files).map_err(|e| format!("kernels: {e}"))?;
    let name = |file: &PathBuf| file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut names: Vec<String> = files.iter().map(name).filter(|n| n.ends_with(".cu")).collect();
    names.sort();
    let (mut code, mut list) = (String::new(), String::new());
    for file in &names {
        let body = text(file)?;
        source::expect_waits(file, &body)?;
        let signatures = source::signatures(file, &body)?;
        let stem = file.trim_end_matches(".cu");
        // `product90.cu` is `product` on sm_90a.
        let op = stem.trim_end_matches(|c: char| c.is_ascii_digit());
        if !root.join("src/ops").join(op).is_dir() {
            return Err(format!("kernels/{file}: expected its partner src/ops/{op}/, found none"));
        }
        let inlined = source::inline(file, &body, &mut Vec::new(), &text)? + &source::trampolines(&signatures);
        let upper = stem.to_uppercase();
        let kernels: Vec<&str> = signatures.iter().map(|s| s.name.as_str()).collect();
        let _ = writeln!(
            code,
            "/// `kernels/{file}`\npub static {upper}: Source = Source {{ file: {file:?}, text: {inlined:?}, kernels: &{kernels:?} }};\n"
        );
        code.push_str(&source::launchers(file, &upper, &signatures));
        let _ = write!(list, "&{upper}, ");
    }
    let _ = writeln!(code, "/// Every file of `kernels/`, by name.\npub static SOURCES: &[&Source] = &[{list}];");
    let runtime = source::inline("sim.cpp", &text("sim.cpp")?, &mut Vec::new(), &text)?;
    let _ = writeln!(code, "/// `kernels/sim.cpp`: the simulator itself.\npub static SIM_RUNTIME: &str = {runtime:?};");
    fs::write(out, code).map_err(|e| format!("{}: {e}", out.display()))
}

/// Every file below `dir`.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, files)? } else { files.push(path) }
    }
    Ok(())
}
