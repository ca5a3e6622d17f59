//! Where compiled code comes from: a pack, else the cache, else libnvrtc.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use super::cache::{Cache, Key, write};
use super::driver::{Arch, Define};
use super::nvrtc::{Cubin, Nvrtc, target};
use super::pack::{self, Pack};
use super::search::DriverVersion;
use super::source::{Source, inline, signatures, trampolines};
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
    /// The architecture whose kernels are used where an operation has its own (`--tier`, `ARES_TIER`).
    pub tier: Option<String>,
}

impl KernelOptions {
    /// What was not said otherwise is taken from the environment.
    pub fn or_environment(self) -> KernelOptions {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        KernelOptions {
            nvrtc: self.nvrtc.or_else(|| set("ARES_NVRTC").map(PathBuf::from)),
            kernels: self.kernels.or_else(|| set("ARES_KERNELS").map(PathBuf::from)),
            sync: self.sync || set("ARES_SYNC").is_some_and(|value| value != "0"),
            tier: self.tier.or_else(|| set("ARES_TIER").map(|tier| tier.to_string_lossy().into_owned())),
        }
    }

    /// The text to compile: what is embedded or, with a folder of sources, that file of it at each call, so that a kernel's author
    /// need not build the program anew. Fails where signatures differ, since launchers are compiled in.
    pub(crate) fn text(&self, source: &'static Source) -> Result<Cow<'static, str>> {
        let folder = self.kernels.as_deref().filter(|path| path.is_dir());
        let Some(folder) = folder else { return Ok(Cow::Borrowed(source.text)) };
        let path = folder.join(source.file);
        let read = |path: &Path| fs::read_to_string(path).map_err(Error::read(path));
        let remedy = "name a copy of the program's kernels/ folder with ARES_KERNELS, or unset it";
        let fault = |found: String| Error::file(&path, "kernels in CUDA C++ with all their headers", remedy)(found);
        let body = read(&path)?;
        let header = |header: &str| read(&folder.join(header)).map_err(|e| e.to_string());
        let inlined = inline(source.file, &body, &mut Vec::new(), &header).map_err(fault)?;
        let trampolines = trampolines(&signatures(source.file, &body).map_err(fault)?);
        // The embedded text ends with the trampolines of the signatures that the program's launchers were made from.
        if !source.text.ends_with(&trampolines) {
            let expected = "the kernels and signatures that the program was built with";
            return Err(Error::file(&path, expected, "build ares anew to change a signature")("others"));
        }
        Ok(Cow::Owned(inlined + &trampolines))
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
    /// Reads the pack that is named, else the one that the program carries, if any. Code will fit `driver`; without one, any.
    pub fn new(options: KernelOptions, driver: Option<DriverVersion>, cache: Cache) -> Result<Compiler> {
        let pack = match &options.kernels {
            Some(path) if !path.is_dir() => Some(Pack::read(path)?),
            Some(_) => None,
            None => Pack::embedded()?,
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
        let text = self.options.text(source)?;
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::backend::cuda::kernels::SOURCES;
    use crate::error::refused;

    #[test]
    fn a_folder_takes_the_place_of_what_is_embedded() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let folder = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").args(["-R", "."]).arg(folder.path()).current_dir(&kernels).status();
        assert!(copied.unwrap().success());
        let [own, other] = [kernels, folder.path().into()]
            .map(|path| KernelOptions { kernels: Some(path), ..KernelOptions::default() });
        for source in SOURCES {
            assert_eq!(KernelOptions::default().text(source).unwrap(), source.text);
            assert_eq!(own.text(source).unwrap(), source.text, "{}", source.file);
            let path = folder.path().join(source.file);
            let body = fs::read_to_string(&path).unwrap();
            fs::write(&path, format!("// other\n{body}")).unwrap();
            assert!(other.text(source).unwrap().contains("// other\n"));
            fs::write(&path, format!("{body}KERNEL another(u32 n) {{}}\n")).unwrap();
            refused(other.text(source), "build ares anew");
            fs::write(&path, body).unwrap();
        }
        fs::remove_file(folder.path().join("device.cuh")).unwrap();
        assert!(other.text(SOURCES[0]).is_err());
    }
}
