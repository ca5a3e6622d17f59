//! The compiler: libnvrtc, looked for and opened at run time, because neither building nor the CPU needs it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use super::driver::{Arch, Define};
use super::search::{self, DriverVersion};
use crate::error::{Error, Result};

/// Compiled code of one file, and what the compiler said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cubin {
    pub image: Vec<u8>,
    pub log: String,
}

/// One flag per option. 177: a header's function that this file does not use. Line tables let tools name a kernel's line.
const OPTIONS: &[&str] = &["--std=c++17", "--ptxas-options=-v", "--diag-suppress=177", "-lineinfo"];

type Status = c_int;
type Handle = *mut c_void;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> Status;
type Bytes = unsafe extern "C" fn(Handle, *mut c_char) -> Status;

/// An open libnvrtc.
pub struct Nvrtc {
    api: Api,
    /// (13, 0)
    pub version: (u32, u32),
    path: PathBuf,
    /// The functions live as long as these.
    _libraries: Vec<Library>,
}

struct Api {
    version: unsafe extern "C" fn(*mut u32, *mut u32) -> Status,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    log_size: Size,
    log: Bytes,
    cubin_size: Size,
    cubin: Bytes,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    error: unsafe extern "C" fn(Status) -> *const c_char,
}

impl Nvrtc {
    /// The library at `named` (a file or its folder), else the newest on this machine that fits `driver`; without a driver the
    /// newest of all.
    pub fn find(named: Option<&Path>, driver: Option<&DriverVersion>) -> Result<Nvrtc> {
        let candidates = named.map_or_else(search::installed, search::named);
        let fits = |major: u32| driver.is_none_or(|d| major <= d.cuda.0);
        let (mut faults, mut too_new) = (Vec::new(), None);
        for path in candidates {
            match Nvrtc::open(&path) {
                // Its file's name may say 12 and the library be 13: its own word counts.
                Ok(found) if fits(found.version.0) => return Ok(found),
                Ok(found) => too_new = too_new.or(Some(found.version)),
                // Not in the loader's path: nothing to report.
                Err(_) if named.is_none() && !path.is_absolute() => {}
                Err(fault) => faults.push(fault),
            }
        }
        Err(Error::Compiler(search::missing(named, driver, too_new, &faults)))
    }

    fn open(path: &Path) -> Result<Nvrtc, String> {
        let mut libraries = Vec::new();
        // libnvrtc looks for its builtins by name alone: opened first, they are found wherever they lie.
        if let Some(builtins) = path.parent().and_then(search::builtins) {
            // SAFETY: NVIDIA's library, whose initialisation has no precondition.
            libraries.push(unsafe { Library::new(&builtins) }.map_err(|e| e.to_string())?);
        }
        // SAFETY: as above.
        let library = unsafe { Library::new(path) }.map_err(|e| e.to_string())?;
        // SAFETY: the names are NVRTC's, the types those of nvrtc.h since 11.1.
        let api = unsafe { Api::load(&library)? };
        libraries.push(library);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function writes two integers.
        api.check(unsafe { (api.version)(&mut major, &mut minor) })?;
        let version = (major, minor);
        Ok(Nvrtc { api, version, path: path.to_path_buf(), _libraries: libraries })
    }

    /// All that decides what comes out, apart from the text: part of a cache key.
    pub(crate) fn identity(&self) -> String {
        format!("nvrtc {}.{} {}", self.version.0, self.version.1, OPTIONS.join(" "))
    }

    /// Compiles `text`, whose messages name `kernels/{file}`.
    pub(crate) fn compile(&self, file: &str, text: &str, defines: &[Define], arch: Arch) -> Result<Cubin> {
        let target = target(defines, arch);
        let failed = |log: String| Error::Kernel { file: file.to_string(), target: target.clone(), log };
        let plain = |text: String| CString::new(text).map_err(|_| failed("a NUL character in the text".to_string()));
        let (name, text) = (plain(format!("kernels/{file}"))?, plain(text.to_string())?);
        let mut options = vec![format!("--gpu-architecture={arch}"), format!("-DARCH={}", arch.number())];
        options.extend(OPTIONS.iter().map(|option| option.to_string()));
        options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        let options = options.into_iter().map(plain).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        self.api.compile(&name, &text, &options).map_err(|log| failed(with_lines(&log)))
    }
}

impl std::fmt::Display for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "libnvrtc {}.{} ({})", self.version.0, self.version.1, self.path.display())
    }
}

/// `sm_80 with ROWS_PER_BLOCK=8`
pub(crate) fn target(defines: &[Define], arch: Arch) -> String {
    let list: Vec<String> = defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if list.is_empty() { arch.to_string() } else { format!("{arch} with {}", list.join(" ")) }
}

impl Api {
    /// # Safety
    /// The library is NVRTC.
    unsafe fn load(library: &Library) -> Result<Api, String> {
        // SAFETY: the caller's promise; each field's type is the function's.
        unsafe {
            Ok(Api {
                version: symbol(library, c"nvrtcVersion")?,
                create: symbol(library, c"nvrtcCreateProgram")?,
                compile: symbol(library, c"nvrtcCompileProgram")?,
                log_size: symbol(library, c"nvrtcGetProgramLogSize")?,
                log: symbol(library, c"nvrtcGetProgramLog")?,
                cubin_size: symbol(library, c"nvrtcGetCUBINSize")?,
                cubin: symbol(library, c"nvrtcGetCUBIN")?,
                destroy: symbol(library, c"nvrtcDestroyProgram")?,
                error: symbol(library, c"nvrtcGetErrorString")?,
            })
        }
    }

    /// The cubin, or what is wrong with the text.
    fn compile(&self, name: &CStr, text: &CStr, options: &[*const c_char]) -> Result<Cubin, String> {
        let (mut program, none) = (std::ptr::null_mut(), std::ptr::null());
        // SAFETY: all strings end with NUL and outlive the calls; no headers are named. The program is destroyed once, after its last
        // use; sizes and contents are asked for in pairs.
        unsafe {
            self.check((self.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, none, none))?;
            let status = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let made = self.bytes(program, self.log_size, self.log).and_then(|log| {
                let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
                self.check(status).map_err(|status| format!("{log}{status}"))?;
                Ok(Cubin { image: self.bytes(program, self.cubin_size, self.cubin)?, log })
            });
            (self.destroy)(&mut program);
            made
        }
    }

    /// # Safety
    /// `size` and `get` are a pair of NVRTC's functions, and the program is alive.
    unsafe fn bytes(&self, program: Handle, size: Size, get: Bytes) -> Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: the caller's promise.
        unsafe {
            self.check(size(program, &mut length))?;
            let mut bytes = vec![0u8; length];
            self.check(get(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }

    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC returns a static string for any number.
        Err(unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy().into_owned())
    }
}

/// # Safety
/// `T` is the type of the function of that name.
unsafe fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: the caller's promise.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    found.map(|symbol| *symbol).map_err(|e| e.to_string())
}

/// `kernels/x.cu(12): error` as editors and people read it: `kernels/x.cu:12: error`.
fn with_lines(log: &str) -> String {
    let line = |line: &str| {
        let place = line.strip_prefix("kernels/").and_then(|rest| rest.split_once("): "));
        match place.and_then(|(place, message)| Some((place.split_once('(')?, message))) {
            Some(((file, number), message)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                format!("kernels/{file}:{number}: {message}")
            }
            _ => line.to_string(),
        }
    };
    log.lines().map(line).collect::<Vec<_>>().join("\n")
}
