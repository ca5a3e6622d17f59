//! Stages as NVTX ranges, for Nsight Systems and whatever else speaks NVTX, without a toolkit's header or library.
//!
//! A profiler that starts a program names its own library in `NVTX_INJECTION64_PATH`. That library is handed a function which
//! gives it tables of slots, and writes into them what should be called (NVTX 3, `nvtxDetail/nvtxTypes.h`). Without the variable
//! nothing is opened, and a range costs one load. What cannot be opened or declines is left alone: a profile is never a reason
//! to fail.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

/// Functions of each module (core, CUDA, OpenCL, CUDA runtime, core 2, synchronisation), the unused first one included.
const SIZES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const MOST: usize = 16;
const CORE: usize = 1;
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;
const CALLBACKS: u32 = 1;
const VERSION_INFO: u32 = 3;

/// What a profiler writes into: one slot per function of each module.
static SLOTS: [[AtomicPtr<c_void>; MOST]; SIZES.len()] =
    [const { [const { AtomicPtr::new(null_mut()) }; MOST] }; SIZES.len()];
/// Where those slots lie; the first of each module and one past its last are null.
static TABLES: [[AtomicPtr<c_void>; MOST + 1]; SIZES.len()] =
    [const { [const { AtomicPtr::new(null_mut()) }; MOST + 1] }; SIZES.len()];

/// `NvtxExportTableCallbacks`
#[repr(C)]
struct Callbacks {
    size: usize,
    table: unsafe extern "C" fn(c_int, *mut *const c_void, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`
#[repr(C)]
struct VersionInfo {
    size: usize,
    version: u32,
    reserved: u32,
    set_version: unsafe extern "C" fn(u32),
}

static EXPORTED: Callbacks = Callbacks { size: size_of::<Callbacks>(), table: module_table };
static VERSION: VersionInfo = VersionInfo { size: size_of::<VersionInfo>(), version: 3, reserved: 0, set_version };

unsafe extern "C" fn set_version(_: u32) {}

/// The table of one module, and how many slots it has.
unsafe extern "C" fn module_table(module: c_int, table: *mut *const c_void, size: *mut c_uint) -> c_int {
    let Some(slots) = usize::try_from(module).ok().filter(|&m| m > 0 && m < SIZES.len()) else { return 0 };
    // SAFETY: the caller passes null or the addresses of its own variables.
    unsafe {
        if !table.is_null() {
            *table = TABLES[slots].as_ptr().cast();
        }
        if !size.is_null() {
            *size = SIZES[slots] as c_uint;
        }
    }
    1
}

unsafe extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        CALLBACKS => (&raw const EXPORTED).cast(),
        VERSION_INFO => (&raw const VERSION).cast(),
        _ => null(),
    }
}

type Export = unsafe extern "C" fn(u32) -> *const c_void;
type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

/// What a profiler wants called when a range begins and ends.
fn profiler() -> Option<&'static (Push, Pop)> {
    static PROFILER: OnceLock<Option<(Push, Pop)>> = OnceLock::new();
    PROFILER.get_or_init(attach).as_ref()
}

fn attach() -> Option<(Push, Pop)> {
    let path = std::env::var_os("NVTX_INJECTION64_PATH").filter(|path| !path.is_empty())?;
    for (module, &size) in SIZES.iter().enumerate() {
        for function in 1..size {
            TABLES[module][function].store(SLOTS[module][function].as_ptr().cast(), Ordering::Release);
        }
    }
    // SAFETY: the library that the profiler put there to be opened; it stays open, since it is called until the end.
    let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(path) }.ok()?));
    // SAFETY: NVTX's signature of this name; all that it is given lives as long as the program.
    unsafe {
        let begin = library.get::<unsafe extern "C" fn(Export) -> c_int>(b"InitializeInjectionNvtx2\0").ok()?;
        if begin(export_table) == 0 {
            return None;
        }
    }
    let slot = |function: usize| SLOTS[CORE][function].load(Ordering::Acquire);
    let (push, pop) = (slot(RANGE_PUSH), slot(RANGE_POP));
    if push.is_null() || pop.is_null() {
        return None;
    }
    // SAFETY: the profiler wrote functions of these signatures into these slots.
    Some(unsafe { (std::mem::transmute::<*mut c_void, Push>(push), std::mem::transmute::<*mut c_void, Pop>(pop)) })
}

/// A stage of work, which an attached profiler shows until this is dropped, on the thread on which it began.
#[must_use = "a stage ends when this is dropped"]
pub(crate) struct Stage(Option<Pop>, PhantomData<*const ()>);

/// Begins a stage on this thread.
pub(crate) fn stage(name: &CStr) -> Stage {
    let pop = profiler().map(|(push, pop)| {
        // SAFETY: a string that ends in zero, read before the call returns.
        unsafe { push(name.as_ptr()) };
        *pop
    });
    Stage(pop, PhantomData)
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(pop) = self.0 {
            // SAFETY: one call for one `push`, on its thread.
            unsafe { pop() };
        }
    }
}
