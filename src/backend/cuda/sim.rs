//! The simulator as a device: the kernels of `kernels/*.cu`, compiled for the CPU with every thread a fiber.
//!
//! `kernels/sim.cpp` is the machine itself. Here it is compiled, loaded and fed; work is done when it is asked for, so
//! nothing is ever queued.

mod lines;
mod runtime;
mod toolchain;

pub(crate) use self::toolchain::Toolchain;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use self::runtime::{Module, Runtime};
use super::compiler::KernelOptions;
use super::driver::{Arch, Captured, Define, DeviceInfo, Driver, Event, Function, LaunchConfig, MapSpec, TensorMap};
use super::lock;
use super::source::Source;
use crate::error::{Error, Result};

/// Threads of a block, at most.
const MAX_THREADS: u64 = 1024;
/// Blocks of a cluster, at most: of kernels/sim/block.h, too.
const MAX_CLUSTER: u64 = 4;
/// Bytes of device memory: `ARENA` of kernels/sim/memory.h.
const MEMORY: u64 = 64 << 30;

/// A simulated GPU.
pub struct SimDriver {
    info: DeviceInfo,
    runtime: &'static Runtime,
    options: KernelOptions,
    /// `ARES_SIM_SEED`: 0 runs threads and blocks in order, anything else shuffles them.
    seed: u64,
    /// Events are nanoseconds since then.
    begin: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    modules: HashMap<(&'static str, Vec<Define>), Arc<Module>>,
    /// What a [`Function`]'s handle stands for.
    functions: Vec<(Arc<Module>, runtime::Entry)>,
    /// What is being captured.
    recording: Option<Vec<Work>>,
}

/// One step of a stream.
type Work = Box<dyn Fn(&SimDriver) -> Result<()> + Send + Sync>;

impl SimDriver {
    /// Needs a C++ compiler: `$CXX`, c++, g++ or clang++. Kernels are read from the folder that `options` name, if any; threads
    /// and blocks run in order for seed 0, in an order drawn from any other. Without a seed `ARES_SIM_SEED` says it.
    pub fn open(arch: Arch, options: &KernelOptions, seed: Option<u64>) -> Result<Arc<dyn Driver>> {
        let seed = seed.map_or_else(environment_seed, Ok)?;
        let runtime = Runtime::get()?;
        let (multiprocessors, shared_per_block) = match arch {
            // 99 KB: what the smallest of the family offers.
            Arch::Sm80 => (108, 99 << 10),
            Arch::Sm90a => (132, 227 << 10),
            Arch::Sm100 => (148, 227 << 10),
            Arch::Sm120 => (170, 99 << 10),
        };
        let name = format!("sim:{arch}");
        let info = DeviceInfo { name, arch, multiprocessors, shared_per_block, memory: MEMORY };
        let (options, begin) = (options.clone(), Instant::now());
        Ok(Arc::new(SimDriver { info, runtime, options, seed, begin, state: Mutex::default() }))
    }

    /// Records the work if a capture is under way, else does it.
    fn queue(&self, work: impl Fn(&SimDriver) -> Result<()> + Send + Sync + 'static) -> Result<()> {
        if let Some(recording) = &mut lock(&self.state).recording {
            recording.push(Box::new(work));
            return Ok(());
        }
        work(self)
    }

    /// What a GPU would refuse to launch.
    fn check(&self, name: &'static str, config: &LaunchConfig) -> Result<()> {
        let threads: u64 = config.block.iter().map(|&n| u64::from(n)).product();
        if threads == 0 || config.grid.contains(&0) {
            return Err(misuse("blocks and threads", &format!("{config:?}")));
        }
        if config.cluster == 0
            || !config.grid[0].is_multiple_of(config.cluster)
            || (config.cluster > 1 && !threads.is_multiple_of(32))
        {
            return Err(misuse("whole clusters of whole warps", &format!("{config:?}")));
        }
        let most = if self.info.arch >= Arch::Sm90a { MAX_CLUSTER } else { 1 };
        let limits = [
            ("blocks in a cluster", config.cluster.into(), most),
            ("threads in a cluster", threads * u64::from(config.cluster), MAX_THREADS),
            ("threads in a block", threads, MAX_THREADS),
            ("bytes of shared memory", config.shared.into(), self.info.shared_per_block.into()),
            ("blocks in this direction", config.grid[1].into(), 65_535),
            ("blocks in this direction", config.grid[2].into(), 65_535),
        ];
        let Some((what, found, most)) = limits.into_iter().find(|(_, found, most)| found > most) else { return Ok(()) };
        Err(Error::Shape { op: name, expected: format!("at most {most} {what}"), found: found.to_string() })
    }

    fn refuse_in_capture(&self, what: &str) -> Result<()> {
        if lock(&self.state).recording.is_some() {
            return Err(misuse("launches, copies and zeros in a capture", what));
        }
        Ok(())
    }
}

/// `ARES_SIM_SEED`, 0 when unset.
fn environment_seed() -> Result<u64> {
    match std::env::var("ARES_SIM_SEED") {
        Ok(text) if !text.is_empty() => {
            text.parse().map_err(|_| Error::Usage(format!("ARES_SIM_SEED: expected a number, found {text:?}")))
        }
        _ => Ok(0),
    }
}

fn misuse(expected: &str, found: &str) -> Error {
    Error::Shape { op: "simulator", expected: expected.into(), found: found.into() }
}

impl Driver for SimDriver {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        // SAFETY: any number of bytes may be asked for.
        match unsafe { (self.runtime.alloc)(bytes as u64) } {
            0 => Err(Error::Device {
                device: "sim".into(),
                what: format!("expected {bytes} bytes of memory, found no room"),
                remedy: "lower --batch-tokens, train with `recompute = \"block\"`, or take a smaller model".into(),
            }),
            address => Ok(address),
        }
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise.
        unsafe { (self.runtime.free)(address) };
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        self.refuse_in_capture("an upload")?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst as *mut u8, src.len()) };
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        self.refuse_in_capture("a download")?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        self.queue(move |_| {
            // SAFETY: the caller's promise. Memory is host memory.
            unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, bytes) };
            Ok(())
        })
    }

    unsafe fn zero(&self, dst: u64, bytes: usize) -> Result<()> {
        self.queue(move |_| {
            // SAFETY: as above.
            unsafe { std::ptr::write_bytes(dst as *mut u8, 0, bytes) };
            Ok(())
        })
    }

    fn load(&self, source: &'static Source, defines: &[Define], kernel: &'static str) -> Result<Function> {
        let key = (source.file, defines.to_vec());
        let known = lock(&self.state).modules.get(&key).cloned();
        let module = match known {
            Some(module) => module,
            None => {
                let text = self.options.text(source)?;
                let module = Arc::new(self.runtime.module(source.file, &text, self.info.arch, defines)?);
                lock(&self.state).modules.entry(key).or_insert(module).clone()
            }
        };
        let entry = module.entry(kernel)?;
        let mut state = lock(&self.state);
        state.functions.push((module, entry));
        Ok(Function { handle: state.functions.len() as u64 - 1, name: kernel })
    }

    /// As kernels/sim/box.h reads it.
    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap> {
        spec.check()?;
        let mut words = [0; 16];
        let stride = 2 * spec.stride as u64;
        let known =
            [spec.address, spec.cols as u64, spec.rows as u64, stride, MapSpec::BOX_COLS.into(), spec.box_rows.into()];
        words[..known.len()].copy_from_slice(&known);
        Ok(TensorMap { words })
    }

    unsafe fn launch(&self, function: Function, config: LaunchConfig, args: &[&[u8]]) -> Result<()> {
        let args = args.iter().flat_map(|bytes| {
            let mut words = vec![0u64; bytes.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
            words
        });
        let args: Vec<u64> = args.collect();
        self.queue(move |sim| {
            let loaded = lock(&sim.state).functions.get(function.handle as usize).cloned();
            let (module, entry) = loaded.ok_or_else(|| misuse("a loaded kernel", function.name))?;
            sim.check(function.name, &config)?;
            // SAFETY: the caller's promise; the entry is the module's.
            unsafe { sim.runtime.launch(&module, entry, function.name, &config, &args, sim.seed) }
        })
    }

    fn capture_begin(&self) -> Result<()> {
        self.refuse_in_capture("a capture")?;
        lock(&self.state).recording = Some(Vec::new());
        Ok(())
    }

    unsafe fn capture_end(self: Arc<Self>) -> Result<Captured> {
        let recorded = lock(&self.state).recording.take().ok_or_else(|| misuse("a capture", "none"))?;
        Ok(Box::new(move || {
            self.refuse_in_capture("a graph")?;
            recorded.iter().try_for_each(|work| work(&self))
        }))
    }

    fn event(&self) -> Result<Event> {
        Ok(Event(self.begin.elapsed().as_nanos() as u64))
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        Ok(to.0.saturating_sub(from.0) as f32 / 1e6)
    }

    fn event_free(&self, _event: Event) {}
}
