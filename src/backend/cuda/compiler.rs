//! Where compiled code comes from: a pack, else the cache, else libnvrtc.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use super::cache::{Cache, Key, write};
use super::driver::{Arch, Define};
use super::nvrtc::{Cubin, Nvrtc, target};
use super::pack::{self, Pack};
use super::search::DriverVersion;
use super::source::Source;
use super::text::text;
use crate::error::{Error, Result};

/// What the user says about kernels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelOptions {
    /// libnvrtc or its folder (`--nvrtc`, `ARES_NVRTC`).
    pub nvrtc: Option<PathBuf>,
    /// A pack, or a folder of sources (`--kernels`, `ARES_KERNELS`).
    pub kernels: Option<PathBuf>,
    /// Wait after each launch, so that a fault names its kernel (`--sync`, `ARES_SYNC`).
    pub sync: bool,
}

impl KernelOptions {
    /// What was not said otherwise is taken from the environment.
    pub fn or_environment(self) -> KernelOptions {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        KernelOptions {
            nvrtc: self.nvrtc.or_else(|| set("ARES_NVRTC").map(PathBuf::from)),
            kernels: self.kernels.or_else(|| set("ARES_KERNELS").map(PathBuf::from)),
            sync: self.sync || set("ARES_SYNC").is_some_and(|value| value != "0"),
        }
    }

    /// The folder of sources, if `kernels` is one.
    pub(crate) fn sources(&self) -> Option<&Path> {
        self.kernels.as_deref().filter(|path| path.is_dir())
    }
}

/// Where one file's code came from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Origin {
    Pack,
    Cache,
    /// Seconds.
    Compiled(f64),
}

/// Compiles files of kernels, each (text, constants, architecture) once.
pub struct Compiler {
    options: KernelOptions,
    driver: Option<DriverVersion>,
    pack: Option<Pack>,
    cache: Cache,
    /// Opened at the first need.
    nvrtc: OnceLock<Nvrtc>,
}

impl Compiler {
    /// Reads the pack, if one is named. Code will fit `driver`; without one, any.
    pub fn new(options: KernelOptions, driver: Option<DriverVersion>, cache: Cache) -> Result<Compiler> {
        let pack = match &options.kernels {
            Some(path) if !path.is_dir() => Some(Pack::read(path)?),
            _ => None,
        };
        Ok(Compiler { options, driver, pack, cache, nvrtc: OnceLock::new() })
    }

    /// The compiler of this machine.
    pub(crate) fn nvrtc(&self) -> Result<&Nvrtc> {
        if let Some(nvrtc) = self.nvrtc.get() {
            return Ok(nvrtc);
        }
        let found = Nvrtc::find(self.options.nvrtc.as_deref(), self.driver.as_ref())?;
        Ok(self.nvrtc.get_or_init(|| found))
    }

    /// Fails early when nothing could be compiled or found later; opens the library otherwise.
    pub fn check(&self) -> Result<()> {
        match self.pack {
            Some(_) => Ok(()),
            None => self.nvrtc().map(drop),
        }
    }

    /// The code of one file, and its key in a pack.
    pub fn compile(&self, source: &'static Source, defines: &[Define], arch: Arch) -> Result<(Key, Cubin, Origin)> {
        let text = text(source, self.options.sources())?;
        let packed = pack::key(source.file, &text, defines, arch);
        if let Some(cubin) = self.pack.as_ref().and_then(|pack| pack.get(&packed)) {
            return Ok((packed, cubin.clone(), Origin::Pack));
        }
        let nvrtc = self.nvrtc().map_err(|error| self.not_packed(error, source, defines, arch))?;
        let key = packed.and(nvrtc.identity().as_bytes());
        let begin = Instant::now();
        let mut origin = Origin::Cache;
        let entry = self.cache.entry(&key, |folder| {
            let cubin = nvrtc.compile(source.file, &text, defines, arch)?;
            origin = Origin::Compiled(begin.elapsed().as_secs_f64());
            write(&folder.join(IMAGE), &cubin.image)?;
            write(&folder.join(LOG), cubin.log.as_bytes())
        })?;
        let read = |name: &str| fs::read(entry.join(name)).map_err(Error::read(&entry.join(name)));
        let log = String::from_utf8_lossy(&read(LOG)?).into_owned();
        Ok((packed, Cubin { image: read(IMAGE)?, log }, origin))
    }

    /// Without a compiler it is the pack that lacks something.
    fn not_packed(&self, error: Error, source: &Source, defines: &[Define], arch: Arch) -> Error {
        let Some(pack) = &self.pack else { return error };
        let expected = format!("{} for {}", source.file, target(defines, arch));
        let remedy = format!("make it anew with this version's `ares kernels --arch {arch} --pack FILE`, or: {error}");
        Error::file(&pack.path, &expected, &remedy)(format!("{} other files of kernels", pack.cubins.len()))
    }
}

const IMAGE: &str = "kernel.cubin";
const LOG: &str = "log.txt";
