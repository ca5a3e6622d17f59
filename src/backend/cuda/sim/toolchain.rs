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
    pub(crate) version: String,
    cache: Cache,
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
                return Ok(Toolchain { program: program.clone(), version, cache: Cache::user()? });
            }
        }
        let tried = candidates.iter().map(|c| c.to_string_lossy()).collect::<Vec<_>>().join(", ");
        Err(Error::NoDevice(format!(
            "the simulator: expected a C++ compiler, tried {tried}; install g++ or clang++, or name one with CXX"
        )))
    }

    /// The shared object of `text`, which `file` names; compiled unless the cache holds it. In two steps: the object is
    /// instrumented, and linked without the instrument's library.
    pub(super) fn shared_object(&self, file: &str, text: &str, compile: &[&str], link: &[&str]) -> Result<PathBuf> {
        let stem = file.split('.').next().unwrap_or(file);
        let options = format!("{}\0{}", compile.join("\0"), link.join("\0"));
        let parts = [text, &options, &self.version, &self.program.to_string_lossy()];
        let key = Key::new(&format!("sim-{stem}"), &parts.map(str::as_bytes));
        let [source, object, library] = ["cpp", "o", "so"].map(|extension| format!("{stem}.{extension}"));
        let entry = self.cache.entry(&key, |folder| {
            let path = folder.join(&source);
            fs::write(&path, text).map_err(Error::write(&path))?;
            self.run(file, &[compile, &["-c", &source, "-o", &object]].concat(), folder)?;
            self.run(file, &[&["-shared", &object, "-o", &library], link].concat(), folder)?;
            let path = folder.join(&object);
            fs::remove_file(&path).map_err(Error::write(&path))
        })?;
        Ok(entry.join(library))
    }

    fn run(&self, file: &str, args: &[&str], folder: &Path) -> Result<()> {
        let output = Command::new(&self.program).args(args).current_dir(folder).output();
        let output = output.map_err(|e| Error::NoDevice(format!("{}: {e}", self.program.to_string_lossy())))?;
        if output.status.success() {
            return Ok(());
        }
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Kernel { file: file.to_string(), target: format!("the simulator ({})", self.version), log })
    }
}
