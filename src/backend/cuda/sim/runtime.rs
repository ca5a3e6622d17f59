//! `kernels/sim.cpp`, compiled and loaded once per process, and the kernels that it runs.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use rayon::prelude::*;

use super::lines;
use super::toolchain::Toolchain;
use crate::backend::cuda::driver::{Arch, Define, LaunchConfig};
use crate::backend::cuda::kernels::SIM_RUNTIME;
use crate::error::{Error, Result};

/// `extern "C" void sim_<kernel>(u64* args)`.
pub(super) type Entry = unsafe extern "C" fn(*mut u64);

/// `SimLaunch` of kernels/sim/block.h.
#[repr(C)]
struct SimLaunch {
    entry: Entry,
    args: *const u64,
    kernel: *const c_char,
    seed: u64,
    grid: [u32; 3],
    block: [u32; 3],
    words: u32,
    shared: u32,
    cluster: u32,
    dependent: u32,
}

/// The functions of kernels/sim.cpp.
pub(super) struct Runtime {
    toolchain: Toolchain,
    /// 0 when there is no room.
    pub(super) alloc: unsafe extern "C" fn(u64) -> u64,
    /// What is no allocation is ignored.
    pub(super) free: unsafe extern "C" fn(u64),
    begin: unsafe extern "C" fn(*const SimLaunch) -> *mut c_void,
    work: unsafe extern "C" fn(*mut c_void),
    end: unsafe extern "C" fn(*mut c_void, *mut c_char, u64) -> c_int,
    /// Keeps the functions alive.
    _library: Library,
}

/// The kernels of one file, compiled with one set of defines.
pub(super) struct Module {
    library: Library,
    object: PathBuf,
}

impl Runtime {
    /// The process's own; an error is tried again at the next call.
    pub(crate) fn get() -> Result<&'static Runtime> {
        static RUNTIME: OnceLock<Runtime> = OnceLock::new();
        if let Some(runtime) = RUNTIME.get() {
            return Ok(runtime);
        }
        let runtime = Runtime::load()?;
        // Of two threads that load it at once, the loader gave both the same library.
        Ok(RUNTIME.get_or_init(|| runtime))
    }

    fn load() -> Result<Runtime> {
        let toolchain = Toolchain::find()?;
        let mut compile = vec!["-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-DARES_SIM"];
        compile.extend(vector_options());
        let object = toolchain.shared_object("sim.cpp", SIM_RUNTIME, &compile, &["-ldl", "-pthread"])?;
        let library = open(&object, RTLD_GLOBAL)?;
        // SAFETY: the signatures are those of kernels/sim.cpp, which the library was compiled from.
        unsafe {
            Ok(Runtime {
                alloc: symbol(&library, &object, c"sim_alloc")?,
                free: symbol(&library, &object, c"sim_free")?,
                begin: symbol(&library, &object, c"sim_begin")?,
                work: symbol(&library, &object, c"sim_work")?,
                end: symbol(&library, &object, c"sim_end")?,
                toolchain,
                _library: library,
            })
        }
    }

    /// Compiles and loads the kernels of one file.
    pub(crate) fn module(&self, file: &str, text: &str, arch: Arch, defines: &[Define]) -> Result<Module> {
        let debug = std::env::var_os("ARES_SIM_DEBUG").is_some_and(|v| !v.is_empty() && v != "0");
        let level: &[&str] = if debug { &["-O0", "-g3"] } else { &["-O2", "-g1"] };
        let mut constants = vec![format!("-DARCH={}", arch.number())];
        constants.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        let constants = constants.iter().map(String::as_str);
        let compile: Vec<&str> = level.iter().chain(KERNEL_OPTIONS).copied().chain(constants).collect();
        let object = self.toolchain.shared_object(file, text, &compile, &["-lm"])?;
        Ok(Module { library: open(&object, RTLD_LOCAL)?, object })
    }

    /// Runs one kernel to its end, on as many threads as rayon has.
    ///
    /// # Safety
    /// `entry` belongs to `module`, the arguments fit its signature, and addresses among them are alive.
    pub(crate) unsafe fn launch(
        &self,
        module: &Module,
        entry: Entry,
        name: &'static str,
        config: &LaunchConfig,
        args: &[u64],
        seed: u64,
    ) -> Result<()> {
        let kernel = CString::new(name).unwrap_or_default();
        let LaunchConfig { grid, block, shared, cluster, dependent } = *config;
        let (args, words) = (args.as_ptr(), args.len() as u32);
        let launch = SimLaunch {
            entry,
            args,
            kernel: kernel.as_ptr(),
            seed,
            grid,
            block,
            words,
            shared,
            cluster,
            dependent: dependent.into(),
        };
        // SAFETY: the launch and what it points to live until `end`.
        let state = unsafe { (self.begin)(&launch) };
        if state.is_null() {
            return Err(fault(name, "expected memory for a launch, found none".into()));
        }
        let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
        let workers = usize::try_from(blocks).unwrap_or(usize::MAX).min(rayon::current_num_threads());
        let shared = AtomicPtr::new(state);
        let work = |_: usize| {
            // SAFETY: any number of threads may work on one launch; `end` is called after all of them.
            unsafe { (self.work)(shared.load(Ordering::Relaxed)) };
        };
        if workers == 1 {
            work(0)
        } else {
            (0..workers).into_par_iter().with_max_len(1).for_each(work)
        }
        let mut message = [0u8; 2048];
        // SAFETY: all work is done; the message has the room that is named, and ends with a zero.
        let failed = unsafe { (self.end)(state, message.as_mut_ptr().cast(), message.len() as u64) };
        if failed == 0 {
            return Ok(());
        }
        let found = CStr::from_bytes_until_nul(&message).map_or("unknown".into(), |m| m.to_string_lossy());
        Err(fault(name, lines::resolve(&module.object, &found)))
    }
}

const KERNEL_OPTIONS: &[&str] = &[
    "-std=c++17",
    "-fPIC",
    "-DARES_SIM",
    // As a GPU's compiler has it: no errno, no aliasing by type; contraction is left out so that results do not depend on the host.
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    // Every access, address, index, shift and divisor is looked at by kernels/sim/hooks.h, which takes the place of the
    // compiler's own library. Loops stay loops: a memcpy made of one would not be seen.
    "-fsanitize=thread,alignment,bounds,shift-exponent,integer-divide-by-zero",
    "-gdwarf-4", // version 5's file numbers are misread by the addr2line of binutils 2.40
    "-fcf-protection=none",
    "-fno-tree-loop-distribute-patterns",
];

/// Vector instructions of this machine; products of bf16 are exact, so results do not depend on them.
fn vector_options() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return &["-mavx2", "-mfma"];
    }
    &[]
}

fn fault(kernel: &str, what: String) -> Error {
    Error::Device { device: "sim".into(), what: format!("{kernel}: {what}"), remedy: "mend the kernel".into() }
}

fn open(object: &Path, flags: c_int) -> Result<Library> {
    // SAFETY: the object was compiled from our own text; its initialisers do nothing but register it.
    let library = unsafe { Library::open(Some(object), RTLD_NOW | flags) };
    library.map_err(Error::file(object, "a shared object that can be loaded", "delete it: it is made anew"))
}

/// # Safety
/// `T` is the symbol's type.
unsafe fn symbol<T: Copy>(library: &Library, object: &Path, name: &CStr) -> Result<T> {
    // SAFETY: the caller's promise.
    let symbol = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    symbol.map(|s| *s).map_err(Error::file(object, "the simulator's functions", "delete it: it is made anew"))
}

impl Module {
    /// The trampoline of one kernel.
    pub(crate) fn entry(&self, kernel: &str) -> Result<Entry> {
        let name = CString::new(format!("sim_{kernel}")).unwrap_or_default();
        // SAFETY: build.rs wrote this signature for every kernel.
        unsafe { symbol(&self.library, &self.object, &name) }
    }
}
