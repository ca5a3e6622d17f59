//! A GPU through NVIDIA's driver: one primary context, one stream.
//!
//! Everything is queued in the stream; copies from and to the host run through pinned memory. libcuda is opened at run time:
//! a program built here runs on machines without it.

mod context;
mod fault;
mod launch;
mod staging;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use self::context::Context;
pub(crate) use self::context::{devices, driver_present, driver_version};
use self::fault::{Trail, describe};
use self::staging::Ring;
use super::cache::Cache;
use super::compiler::{Compiler, KernelOptions};
use super::driver::{Captured, Define, DeviceInfo, Driver, Event, Function, LaunchConfig, MapSpec, TensorMap};
use super::lock;
use super::source::Source;
use crate::error::{Error, Result};

/// Tables, tokens, losses: many of them may be on their way at once.
const SMALL: (usize, usize) = (64, 64 << 10);
/// Weights: two slots, so that the host fills one while the device empties the other.
const LARGE: (usize, usize) = (2, 16 << 20);
/// What [`Trail`] calls a captured sequence.
const CAPTURED: &str = "a captured sequence";

/// A GPU.
pub struct GpuDriver {
    info: DeviceInfo,
    compiler: Compiler,
    /// Wait after each launch.
    sync: bool,
    stream: sys::CUstream,
    modules: Mutex<HashMap<(&'static str, Vec<Define>), sys::CUmodule>>,
    trail: Mutex<Trail>,
    small: Mutex<Option<Ring>>,
    large: Mutex<Option<Ring>>,
    capture: Mutex<Option<Capture>>,
    /// Dropped last.
    context: Context,
}

// SAFETY: the driver's handles may be used from any thread once the context is current there, which `bind` sees to.
unsafe impl Send for GpuDriver {}
// SAFETY: as above; the driver locks its own state, and ours is locked.
unsafe impl Sync for GpuDriver {}

/// What happens while work is recorded.
#[derive(Default)]
struct Capture {
    kernels: Vec<&'static str>,
    /// Memory given back meanwhile: freeing waits for the stream, which a capture forbids.
    freed: Vec<u64>,
}

/// A recorded sequence, destroyed with its owner.
struct Graph {
    driver: Arc<GpuDriver>,
    exec: sys::CUgraphExec,
}

// SAFETY: as for its driver.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once; the driver itself waits for a launch under way. A fault is reported to whoever waits.
        let _ = self.driver.context.bind().and_then(|()| unsafe { result::graph::exec_destroy(self.exec) });
    }
}

impl GpuDriver {
    /// Device `ordinal`, with the compiler that suits its driver.
    #[allow(clippy::new_ret_no_self)] // all that is wanted of it is the trait
    pub fn open(ordinal: usize, options: KernelOptions) -> Result<Arc<dyn Driver>> {
        let sync = options.sync;
        let compile = move || {
            let compiler = Compiler::new(options, context::driver_version(), Cache::user()?)?;
            compiler.check().map(|()| compiler)
        };
        // Opening libnvrtc takes as long as making a context: both at once.
        let (opened, compiler) = std::thread::scope(|scope| {
            let compiler = driver_present().then(|| scope.spawn(compile));
            (Context::open(ordinal), compiler.map(|thread| thread.join()))
        });
        let (context, info) = opened?;
        let fault = || Error::Compiler("libnvrtc: opening it failed without a reason".to_string());
        let compiler = compiler.and_then(std::result::Result::ok).unwrap_or_else(|| Err(fault()))?;
        let made = context.bind().and_then(|()| result::stream::create(result::stream::StreamKind::NonBlocking));
        let stream = made.map_err(|error| Error::NoDevice(format!("{}: {}", info.name, describe(error))))?;
        Ok(Arc::new(GpuDriver {
            info,
            compiler,
            sync,
            stream,
            modules: Mutex::default(),
            trail: Mutex::default(),
            small: Mutex::default(),
            large: Mutex::default(),
            capture: Mutex::default(),
            context,
        }))
    }

    /// Makes the context current and does `work`; `action` completes "cannot …".
    fn with<T>(&self, action: &str, work: impl FnOnce() -> Result<T, DriverError>) -> Result<T> {
        self.context.bind().and_then(|()| work()).map_err(|error| self.fault(action, error))
    }

    fn fault(&self, action: &str, error: DriverError) -> Error {
        fault::fault(&self.info.name, action, error, &lock(&self.trail), self.sync)
    }

    /// What a capture forbids: it would wait, or change what is recorded.
    fn outside_capture(&self, action: &str) -> Result<()> {
        if lock(&self.capture).is_none() {
            return Ok(());
        }
        Err(fault::ours(&self.info.name, format!("cannot {action} while a sequence is captured")))
    }

    /// Runs a copy through the ring of its size, made at its first use.
    fn staged(
        &self,
        action: &str,
        bytes: usize,
        copy: impl FnOnce(&mut Ring) -> Result<(), DriverError>,
    ) -> Result<()> {
        self.outside_capture(action)?;
        let (ring, (slots, size)) = if bytes <= SMALL.1 { (&self.small, SMALL) } else { (&self.large, LARGE) };
        let mut ring = lock(ring);
        self.with(action, || {
            let ring = match &mut *ring {
                Some(ring) => ring,
                empty => empty.insert(Ring::new(slots, size)?),
            };
            copy(ring)
        })
    }

    /// The module of (source, defines), compiled or from the cache.
    fn module(&self, source: &'static Source, defines: &[Define]) -> Result<sys::CUmodule> {
        let mut modules = lock(&self.modules);
        if let Some(module) = modules.get(&(source.file, defines.to_vec())) {
            return Ok(*module);
        }
        let (_, cubin, _) = self.compiler.compile(source, defines, self.info.arch)?;
        // SAFETY: a whole cubin of this architecture; the driver copies it.
        let module = self.with(&format!("load {}", source.file), || unsafe {
            result::module::load_data(cubin.image.as_ptr().cast())
        })?;
        modules.insert((source.file, defines.to_vec()), module);
        Ok(module)
    }

    /// Lets the kernel use all the shared memory that a block may have.
    fn allow_shared(&self, function: sys::CUfunction) -> Result<(), DriverError> {
        use sys::CUfunction_attribute as Attribute;
        // SAFETY: the function was just loaded.
        unsafe {
            let fixed =
                result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            let room = i32::try_from(self.info.shared_per_block).unwrap_or(i32::MAX) - fixed;
            let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(function, most, room)
        }
    }

    /// With `--sync`: waits, so that a fault is this launch's.
    fn settle(&self, what: impl FnOnce() -> String) -> Result<()> {
        if !self.sync {
            return Ok(());
        }
        // SAFETY: the stream is alive.
        match self.context.bind().and_then(|()| unsafe { result::stream::synchronize(self.stream) }) {
            Ok(()) => {
                let mut trail = lock(&self.trail);
                let mark = trail.mark();
                trail.reached(mark);
                Ok(())
            }
            Err(error) => Err(fault::ours(&self.info.name, format!("{}: {}", what(), describe(error)))),
        }
    }
}

impl Driver for GpuDriver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.outside_capture("allocate")?;
        // SAFETY: freed once, by `free`.
        let allocated = self.context.bind().and_then(|()| unsafe { result::malloc_sync(bytes) });
        let address = allocated.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => fault::out_of_memory(&self.info.name, bytes),
            _ => self.fault("allocate", error),
        })?;
        // SAFETY: just allocated.
        unsafe { self.zero(address, bytes) }.map(|()| address)
    }

    unsafe fn free(&self, address: u64) {
        if let Some(capture) = &mut *lock(&self.capture) {
            capture.freed.push(address);
            return;
        }
        // SAFETY: the caller's promise; what is queued may still use it, so that comes first. A fault was or will be reported by
        // whoever waits.
        unsafe {
            let _ = self.context.bind().and_then(|()| result::stream::synchronize(self.stream));
            let _ = result::free_sync(address);
        }
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        self.staged("copy to the device", src.len(), |ring| unsafe { ring.upload(dst, src, self.stream) })
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        let mark = lock(&self.trail).mark();
        // SAFETY: the caller's promise.
        self.staged("copy from the device", dst.len(), |ring| unsafe { ring.download(dst, src, self.stream) })?;
        lock(&self.trail).reached(if dst.is_empty() { 0 } else { mark });
        Ok(())
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.with("copy", || unsafe { result::memcpy_dtod_async(dst, src, bytes, self.stream) })
    }

    unsafe fn zero(&self, dst: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.with("clear memory", || unsafe { result::memset_d8_async(dst, 0, bytes, self.stream) })
    }

    fn load(&self, source: &'static Source, defines: &[Define], kernel: &'static str) -> Result<Function> {
        self.outside_capture("load a kernel")?;
        let module = self.module(source, defines)?;
        let name = CString::new(kernel).unwrap_or_default();
        let function = self.with(&format!("find {kernel} in {}", source.file), || {
            // SAFETY: modules live as long as `self`.
            let function = unsafe { result::module::get_function(module, name)? };
            self.allow_shared(function).map(|()| function)
        })?;
        Ok(Function { handle: function as u64, name: kernel })
    }

    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap> {
        spec.check()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (shape, strides) = ([spec.cols as u64, spec.rows as u64], [2 * spec.stride as u64]);
        let (part, steps) = ([MapSpec::BOX_COLS, spec.box_rows], [1u32, 1]);
        // SAFETY: every array is as long as two dimensions ask for; the driver keeps none of them.
        self.with(&format!("describe {} to the copy engine", spec.what), || unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                spec.address as *mut c_void,
                shape.as_ptr(),
                strides.as_ptr(),
                part.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
        })?;
        Ok(TensorMap { words: map.opaque })
    }

    unsafe fn launch(&self, function: Function, config: LaunchConfig, args: &[&[u8]]) -> Result<()> {
        let Function { handle, name } = function;
        let mut args: Vec<*mut c_void> = args.iter().map(|bytes| bytes.as_ptr().cast_mut().cast()).collect();
        let ([x, y, z], [bx, by, bz]) = (config.grid, config.block);
        let mut attributes = launch::attributes(&config);
        let launch = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: config.shared,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the handle came from `load`; the driver only reads configuration and arguments; the rest is the caller's promise.
        let launched = self.context.bind().and_then(|()| unsafe {
            sys::cuLaunchKernelEx(&launch, handle as sys::CUfunction, args.as_mut_ptr(), std::ptr::null_mut()).result()
        });
        launched.map_err(|error| self.fault(&format!("launch {name} with {config:?}"), error))?;
        if let Some(capture) = &mut *lock(&self.capture) {
            capture.kernels.push(name);
            return Ok(());
        }
        lock(&self.trail).launch(name);
        self.settle(|| format!("{name} with {config:?}"))
    }

    fn capture_begin(&self) -> Result<()> {
        self.outside_capture("begin a capture")?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        self.with("capture", || unsafe { result::stream::begin_capture(self.stream, mode) })?;
        *lock(&self.capture) = Some(Capture::default());
        Ok(())
    }

    unsafe fn capture_end(self: Arc<Self>) -> Result<Captured> {
        let Capture { kernels, freed } = lock(&self.capture).take().unwrap_or_default();
        let captured = self.with("capture", || {
            // SAFETY: the stream is alive; the graph is destroyed once, after what was made from it.
            unsafe {
                let graph = result::stream::end_capture(self.stream)?;
                let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags_enum(0));
                let _ = result::graph::destroy(graph);
                exec
            }
        });
        // SAFETY: given back during the capture.
        freed.into_iter().for_each(|address| unsafe { self.free(address) });
        let graph = Graph { exec: captured?, driver: self };
        Ok(Box::new(move || {
            let Graph { driver, exec } = &graph;
            // SAFETY: the caller's promise.
            driver.with("launch a captured sequence", || unsafe { result::graph::launch(*exec, driver.stream) })?;
            lock(&driver.trail).launch(CAPTURED);
            driver.settle(|| format!("{CAPTURED} of {}", kernels.join(", ")))
        }))
    }

    fn event(&self) -> Result<Event> {
        self.with("mark a point in time", || {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            // SAFETY: both are alive.
            unsafe { result::event::record(event, self.stream)? };
            Ok(Event(event as u64))
        })
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        let (from, to) = (from.0 as sys::CUevent, to.0 as sys::CUevent);
        self.with("measure time", || {
            // SAFETY: both came from `event`.
            unsafe {
                result::event::synchronize(to)?;
                context::elapsed(from, to)
            }
        })
    }

    fn event_free(&self, event: Event) {
        // SAFETY: `event` made it, and this is its end. A fault is reported to whoever waits.
        let _ = self.context.bind().and_then(|()| unsafe { result::event::destroy(event.0 as sys::CUevent) });
    }
}

impl Drop for GpuDriver {
    fn drop(&mut self) {
        // After a fault nothing can be done about errors here: they were reported before.
        // SAFETY: all of it is ours; nothing is queued once the stream is idle.
        unsafe {
            let _ = self.context.bind().and_then(|()| result::stream::synchronize(self.stream));
            [&self.small, &self.large].into_iter().for_each(|ring| drop(lock(ring).take()));
            for (_, module) in lock(&self.modules).drain() {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
