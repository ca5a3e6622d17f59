//! NVIDIA GPUs: bf16 activations, f32 statistics, hand-written kernels compiled at run time. The same kernels, launchers and
//! geometry run on the CPU under the simulator.
//!
//! `driver.rs` is what a device must offer; `source.rs` reads the kernels' signatures, from which `build.rs` writes the typed
//! launchers in [`kernels`]; an operation's geometry and constants are in `src/ops/<op>/cuda.rs`. How to write and debug a kernel
//! without a GPU: [`guide`].

mod buffer;
pub mod cache;
pub mod compiler;
pub(crate) mod counter;
pub mod device;
pub mod driver;
pub mod guide {
    #![doc = include_str!("guide.md")]
}
pub mod kernels;
pub mod nvrtc;
pub mod pack;
mod profile;
mod search;
pub mod sim;
pub mod source;
pub mod usage;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;
use rayon::prelude::*;

pub(crate) use buffer::DeviceBuffer;
pub(crate) use usage::Build;

use self::driver::{Arch, Captured, Define, DeviceInfo, Driver, Function, LaunchConfig};
use self::profile::Profile;
use self::source::Source;
use super::cost::Cost;
use super::{Backend, Element, Matrix, Tensor};
use crate::error::{Error, Result};

/// A GPU, or the simulator in its place.
#[derive(Clone)]
pub struct Cuda {
    state: Arc<State>,
}

struct State {
    driver: Arc<dyn Driver>,
    info: DeviceInfo,
    /// Whose instructions kernels may use that have a form for it.
    tier: Arch,
    /// While a sequence is made that will be replayed: see `tier`.
    replayed: AtomicBool,
    /// Loaded kernels by a hash of name and defines, which stand beside it in full.
    functions: Mutex<HashMap<u64, (Vec<Define>, Function)>>,
    /// Partial sums of kernels that split their work; grown to the largest that was asked for.
    scratch: Mutex<DeviceBuffer<f32>>,
    /// Tables that a kernel reads beside its tensors; grown likewise.
    table: Mutex<DeviceBuffer<u32>>,
    /// How often either was moved: what was captured before holds an address that is gone.
    moves: AtomicU64,
    profile: Profile,
}

/// A frozen matrix (N, K): forward reads it as it lies, backward as well.
impl Matrix for Tensor<Cuda> {
    fn shape(&self) -> (usize, usize) {
        Tensor::shape(self)
    }
}

impl Cuda {
    pub fn new(driver: Arc<dyn Driver>) -> Cuda {
        let info = driver.info().clone();
        Cuda::planned_for(info, driver)
    }

    /// Plans its launches for the device that `info` describes: tests see so what only large problems take.
    pub fn planned_for(info: DeviceInfo, driver: Arc<dyn Driver>) -> Cuda {
        let state = State {
            info,
            tier: Arch::Sm80,
            replayed: AtomicBool::new(false),
            functions: Mutex::default(),
            scratch: Mutex::new(DeviceBuffer::empty(&driver)),
            table: Mutex::new(DeviceBuffer::empty(&driver)),
            moves: AtomicU64::new(0),
            profile: Profile::default(),
            driver,
        };
        Cuda { state: Arc::new(state) }
    }

    /// With the kernels of its own architecture where an operation has such: until they have been measured they must be asked for.
    pub fn with_tier(driver: Arc<dyn Driver>, tier: Option<&str>) -> Result<Cuda> {
        let mut info = driver.info().clone();
        let tier = match tier {
            None | Some("sm_80") => Arch::Sm80,
            Some("sm_90a") if info.arch == Arch::Sm90a => Arch::Sm90a,
            Some(found) => {
                let what = format!(
                    "--tier or ARES_TIER: expected sm_80, or sm_90a on a device of sm_90a, found {found} on {} ({})",
                    info.name, info.arch
                );
                return Err(Error::Usage(format!("{what}; leave it out, and kernels are those of sm_80")));
            }
        };
        if tier != Arch::Sm80 {
            info.name += &format!(", tier {tier}");
        }
        let mut cuda = Cuda::planned_for(info, driver);
        // Nobody else has it yet.
        if let Some(state) = Arc::get_mut(&mut cuda.state) {
            state.tier = tier;
        }
        Ok(cuda)
    }

    /// What is replayed is a step of generation. It has few rows, and its products wait for weights, which the small tiles of sm_80 draw
    /// through all multiprocessors at once; those of sm_90a are few and large. As a step is always a step, a row's bits still do not
    /// depend on how many there are.
    pub(crate) fn tier(&self) -> Arch {
        if self.state.replayed.load(Ordering::Relaxed) { Arch::Sm80 } else { self.state.tier }
    }

    /// Which architecture's kernels carry out what.
    pub(crate) fn served_by(&self) -> &'static str {
        match self.state.tier {
            Arch::Sm90a => {
                "those of sm_80; of sm_90a for products and the head with aligned operands of 64 and more columns and terms, but for steps of generation"
            }
            _ => "those of sm_80",
        }
    }

    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.state.info
    }

    pub(crate) fn driver(&self) -> &Arc<dyn Driver> {
        &self.state.driver
    }

    /// Queues one kernel; compiles and loads it at its first use. An empty grid is no launch.
    ///
    /// # Safety
    /// The arguments fit the kernel's signature, and the kernel stays within their memory.
    pub(crate) unsafe fn launch(
        &self,
        source: &'static Source,
        kernel: &'static str,
        defines: &[Define],
        config: LaunchConfig,
        args: &[&[u8]],
    ) -> Result<()> {
        if config.grid.contains(&0) {
            self.charge(Cost::default);
            return Ok(());
        }
        let function = self.function(source, kernel, defines)?;
        let config = if self.tier() == Arch::Sm90a { config.overlapping() } else { config };
        let State { driver, profile, .. } = &*self.state;
        // SAFETY: the caller's promise.
        let launch = || unsafe { driver.launch(function, config, args) };
        if profile.is_on() { profile.around(&**driver, kernel, launch) } else { launch() }
    }

    /// What the next launch must at least do; asked for while a profile is taken, else never.
    pub(crate) fn charge(&self, cost: impl FnOnce() -> Cost) {
        self.state.profile.charge(cost);
    }

    /// How long each kernel takes, where that is recorded.
    pub(crate) fn profile(&self) -> &Profile {
        &self.state.profile
    }

    fn function(&self, source: &'static Source, kernel: &'static str, defines: &[Define]) -> Result<Function> {
        let mut hasher = DefaultHasher::new();
        (kernel, defines).hash(&mut hasher);
        let hash = hasher.finish();
        let mut functions = lock(&self.state.functions);
        match functions.get(&hash) {
            Some((known, function)) if known == defines && function.name == kernel => return Ok(*function),
            _ => {}
        }
        let function = self.state.driver.load(source, defines, kernel)?;
        functions.insert(hash, (defines.to_vec(), function));
        Ok(function)
    }

    /// At least `len` floats for partial sums, whatever was in them; the next kernel of the stream may reuse them.
    pub(crate) fn scratch(&self, len: usize) -> Result<MutexGuard<'_, DeviceBuffer<f32>>> {
        self.grown(&self.state.scratch, len)
    }

    /// At least `len` words for a table that the host writes.
    pub(crate) fn table(&self, len: usize) -> Result<MutexGuard<'_, DeviceBuffer<u32>>> {
        self.grown(&self.state.table, len)
    }

    fn grown<'a, T: Element>(
        &self,
        memory: &'a Mutex<DeviceBuffer<T>>,
        len: usize,
    ) -> Result<MutexGuard<'a, DeviceBuffer<T>>> {
        let mut memory = lock(memory);
        if memory.len() < len {
            // Before anything can fail: the old address is gone from here on.
            self.state.moves.fetch_add(1, Ordering::Relaxed);
            // Freed first: the old one may be what keeps the new one from fitting.
            *memory = DeviceBuffer::empty(&self.state.driver);
            *memory = self.alloc(len)?;
        }
        Ok(memory)
    }
}

/// As `bf16::from_f32` has it, without a branch: a loop of these runs in vector registers.
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if value.is_nan() { bits >> 16 | 0x40 } else { nearest } as u16)
}

/// A poisoned lock guards plain tables, whole at any moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backend for Cuda {
    type Act = bf16;
    type Weight = Tensor<Cuda>;
    type Buffer<T: Element> = DeviceBuffer<T>;
    /// With the scratch's moves until then.
    type Graph = Option<(u64, Captured)>;

    const BATCH: usize = 8192;

    fn describe(&self) -> String {
        self.info().name.clone()
    }

    /// Rows of activations, which are bf16, begin at 16-byte borders; everything else lies packed.
    fn stride<T: Element>(cols: usize) -> usize {
        if size_of::<T>() == size_of::<bf16>() { cols.next_multiple_of(8) } else { cols }
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::new(&self.state.driver, len)
    }

    fn upload<T: Element>(&self, dst: &mut DeviceBuffer<T>, at: usize, src: &[T]) -> Result<()> {
        let address = dst.range(at, src.len())?;
        // SAFETY: `range` proved that the buffer holds it.
        unsafe { self.state.driver.upload(address, bytemuck::cast_slice(src)) }
    }

    fn download<T: Element>(&self, dst: &mut [T], src: &DeviceBuffer<T>, at: usize) -> Result<()> {
        let address = src.range(at, dst.len())?;
        // SAFETY: `range` proved that the buffer holds it.
        unsafe { self.state.driver.download(bytemuck::cast_slice_mut(dst), address) }
    }

    fn copy<T: Element>(
        &self,
        dst: &mut DeviceBuffer<T>,
        dst_at: usize,
        src: &DeviceBuffer<T>,
        src_at: usize,
        len: usize,
    ) -> Result<()> {
        let (to, from) = (dst.range(dst_at, len)?, src.range(src_at, len)?);
        // SAFETY: `range` proved both, and `&mut` beside `&` that they are two buffers.
        unsafe { self.state.driver.copy(to, from, len * size_of::<T>()) }
    }

    fn zero<T: Element>(&self, dst: &mut DeviceBuffer<T>, at: usize, len: usize) -> Result<()> {
        let address = dst.range(at, len)?;
        // SAFETY: `range` proved that the buffer holds it.
        unsafe { self.state.driver.zero(address, len * size_of::<T>()) }
    }

    fn activations(&self, values: &[f32]) -> Vec<bf16> {
        const PART: usize = 1 << 16;
        let mut rounded = vec![bf16::ZERO; values.len()];
        let parts = rounded.par_chunks_mut(PART).zip(values.par_chunks(PART));
        parts.for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, &from)| *to = round(from)));
        rounded
    }

    fn weight(&self, rows: usize, cols: usize, values: Vec<f32>) -> Result<Tensor<Cuda>> {
        let rounded = self.activations(&values);
        let all_finite = |values: &[bf16]| values.iter().fold(true, |all, value| all & value.is_finite());
        if !rounded.par_chunks(1 << 16).all(all_finite) {
            let at = rounded.iter().position(|value| !value.is_finite()).unwrap_or_default();
            return Err(Error::NotFinite {
                what: "a weight rounded to bf16".into(),
                found: values[at].to_string(),
                remedy: "this checkpoint needs --device cpu".into(),
            });
        }
        Tensor::from_host(self, rows, cols, &rounded)
    }

    /// A product over few rows costs what reading its weight costs.
    fn replayed_rows(rows: usize) -> usize {
        rows.next_power_of_two()
    }

    fn replay(&self, graph: &mut Self::Graph, mut record: impl FnMut() -> Result<()>) -> Result<()> {
        let driver = &self.state.driver;
        let mut record = || {
            self.state.replayed.store(true, Ordering::Relaxed);
            let recorded = record();
            self.state.replayed.store(false, Ordering::Relaxed);
            recorded
        };
        if self.profile().is_on() {
            // A captured sequence is one launch: its kernels would not be seen.
            return record();
        }
        let moves = || self.state.moves.load(Ordering::Relaxed);
        match graph {
            Some((then, captured)) if *then == moves() => return captured(),
            _ => *graph = None,
        }
        // Plainly first: it loads modules and grows the scratch, which a capture may not.
        record()?;
        driver.capture_begin()?;
        let recorded = record();
        // SAFETY: buffers that a step names live as long as the generator that owns its graph.
        let captured = unsafe { driver.clone().capture_end() };
        // Half a step must not be replayed.
        recorded.and_then(|()| captured.map(|captured| *graph = Some((moves(), captured))))
    }
}

#[cfg(test)]
mod tests {
    use super::counter::Counter;
    use super::*;

    /// Every upper half, with lower halves around the tie.
    #[test]
    fn rounding_is_that_of_half() {
        for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            for upper in 0..=0xffffu32 {
                let value = f32::from_bits(upper << 16 | lower);
                assert_eq!(round(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn a_weight_that_bf16_cannot_hold_is_named() {
        let cuda = Cuda::new(Counter::new(DeviceInfo::h200()));
        let mut values = vec![1.0f32; 300 * 1000];
        assert!(cuda.weight(300, 1000, values.clone()).is_ok());
        values[200_007] = 3.4e38;
        let error = cuda.weight(300, 1000, values).err().unwrap().to_string();
        assert!(error.contains("a weight rounded to bf16") && error.contains("340000"), "{error}");
    }

    #[test]
    fn a_step_of_generation_is_of_the_first_tier() {
        let cuda = Cuda::with_tier(Counter::new(DeviceInfo::h200()), Some("sm_90a")).unwrap();
        let mut seen = Vec::new();
        let mut graph = <Cuda as Backend>::Graph::default();
        cuda.replay(&mut graph, || {
            seen.push(cuda.tier());
            Ok(())
        })
        .unwrap();
        assert_eq!((seen, cuda.tier()), (vec![Arch::Sm80; 2], Arch::Sm90a), "run plainly, then captured");
        let fault = || Err(Error::Usage("stop".into()));
        assert!(cuda.replay(&mut <Cuda as Backend>::Graph::default(), fault).is_err());
        assert_eq!(cuda.tier(), Arch::Sm90a);
    }
}
