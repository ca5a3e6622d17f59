//! The host's C++ compiler: finding it, and making shared objects that are kept in the cache.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::backend::cuda::cache::{Cache, Key};
use crate::error::{Error, Result};

/// A compiler and its version, which is part of each key.
pub(crate) struct Toolchain {
    program: OsString,
    version: String,
    cache: Cache,
}

/// What is made from one text.
pub(super) struct Unit<'a> {
    /// `norm.cu`: names the files.
    pub(crate) file: &'a str,
    pub(crate) text: &'a str,
    pub(crate) compile: &'a [&'a str],
    pub(crate) link: &'a [&'static str],
}

impl Unit<'_> {
    fn stem(&self) -> &str {
        self.file.split('.').next().unwrap_or(self.file)
    }
}

impl Toolchain {
    /// `$CXX`, else the first of c++, g++ and clang++ that runs.
    pub(crate) fn find() -> Result<Toolchain> {
        let named = std::env::var_os("CXX").filter(|name| !name.is_empty());
        let candidates =
            named.map_or_else(|| ["c++", "g++", "clang++"].map(OsString::from).to_vec(), |name| vec![name]);
        for program in &candidates {
            let Ok(output) = Command::new(program).arg("--version").output() else { continue };
            if output.status.success() {
                let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_string();
                return Ok(Toolchain { program: program.clone(), version, cache: Cache::user() });
            }
        }
        let tried = candidates.iter().map(|c| c.to_string_lossy()).collect::<Vec<_>>().join(", ");
        Err(Error::NoDevice(format!(
            "the simulator: expected a C++ compiler, tried {tried}; install g++ or clang++, or name one with CXX"
        )))
    }

    /// What the compiler says of itself.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The shared object of a unit; compiled unless the cache holds it.
    pub(super) fn shared_object(&self, unit: &Unit) -> Result<PathBuf> {
        let options = format!("{}\0{}", unit.compile.join("\0"), unit.link.join("\0"));
        let parts = [unit.text, &options, &self.version, &self.program.to_string_lossy()];
        let key = Key::new(&format!("sim-{}", unit.stem()), &parts.map(str::as_bytes));
        let entry = self.cache.entry(&key, |folder| self.make(unit, folder))?;
        Ok(entry.join(format!("{}.so", unit.stem())))
    }

    /// Compiles and links in two steps: the object is instrumented, and linked without the instrument's library.
    fn make(&self, unit: &Unit, folder: &Path) -> Result<()> {
        let name = |extension: &str| format!("{}.{extension}", unit.stem());
        let source = folder.join(name("cpp"));
        fs::write(&source, unit.text).map_err(Error::write(&source))?;
        let mut compile = Command::new(&self.program);
        compile.args(unit.compile).args(["-c", &name("cpp"), "-o", &name("o")]);
        self.run(unit, compile, folder)?;
        let mut link = Command::new(&self.program);
        link.args(["-shared", &name("o"), "-o", &name("so")]).args(unit.link);
        self.run(unit, link, folder)?;
        let object = folder.join(name("o"));
        fs::remove_file(&object).map_err(Error::write(&object))
    }

    fn run(&self, unit: &Unit, mut command: Command, folder: &Path) -> Result<()> {
        let output = command.current_dir(folder).output();
        let output = output.map_err(|e| Error::NoDevice(format!("{}: {e}", self.program.to_string_lossy())))?;
        if output.status.success() {
            return Ok(());
        }
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Kernel { file: unit.file.to_string(), target: format!("the simulator ({})", self.version), log })
    }
}
