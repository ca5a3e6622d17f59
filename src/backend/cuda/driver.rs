//! What a device must offer: memory, copies, kernels. Two makers: the CUDA driver, and the simulator.
//!
//! Everything but `download` and `elapsed` is queued in one stream, in order. Addresses are plain numbers; that
//! they are alive and long enough is the caller's promise (`mod.rs` keeps it: a buffer knows its length).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};

use super::source::Source;

/// A preprocessor constant that a kernel is compiled with.
pub type Define = (&'static str, u64);

/// The instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    Sm80,
    Sm90a,
    Sm100,
    Sm120,
}

impl Arch {
    /// In the order of their declaration, as all tables are.
    pub const ALL: [Arch; 4] = [Arch::Sm80, Arch::Sm90a, Arch::Sm100, Arch::Sm120];

    /// As the compiler spells it.
    pub(crate) fn name(self) -> &'static str {
        ["sm_80", "sm_90a", "sm_100", "sm_120"][self as usize]
    }

    /// The define ARCH that kernels test.
    pub(crate) fn number(self) -> u64 {
        [80, 90, 100, 120][self as usize]
    }

    /// The architecture that serves a device of this compute capability; `None` for one older than 8.0.
    pub(crate) fn of(major: u32) -> Option<Arch> {
        match major {
            8 => Some(Arch::Sm80),
            9 => Some(Arch::Sm90a),
            10 => Some(Arch::Sm100),
            12.. => Some(Arch::Sm120),
            _ => None,
        }
    }
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> Result<Arch, String> {
        let known = Arch::ALL.map(Arch::name).join(", ");
        Arch::ALL.into_iter().find(|arch| arch.name() == text).ok_or(format!("expected one of {known}, found {text:?}"))
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What plans are made from.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    /// `cuda:0 NVIDIA H200`, `sim:sm_80`.
    pub name: String,
    pub arch: Arch,
    pub multiprocessors: u32,
    /// Largest dynamic shared memory of a block, bytes.
    pub shared_per_block: u32,
    /// Bytes in all.
    pub memory: u64,
}

impl DeviceInfo {
    /// What plans are made for where no device is there.
    pub(crate) fn h200() -> DeviceInfo {
        let (arch, multiprocessors, shared_per_block) = (Arch::Sm90a, 132, 227 << 10);
        DeviceInfo { name: "an H200".into(), arch, multiprocessors, shared_per_block, memory: 139 << 30 }
    }

    /// The simulator shows that kernels run, not how fast.
    pub(crate) fn is_simulated(&self) -> bool {
        self.name.starts_with("sim:")
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub(crate) shared: u32,
    /// Blocks in a row that run at the same time and reach each other's shared memory; 1 without.
    pub(crate) cluster: u32,
    /// Begins before the launch before it has ended: its threads wait in `after_previous()`. Of sm_90 and later.
    pub(crate) dependent: bool,
}

impl LaunchConfig {
    /// A row of blocks, each a row of threads.
    pub fn linear(blocks: u32, threads: u32) -> LaunchConfig {
        LaunchConfig { grid: [blocks, 1, 1], block: [threads, 1, 1], shared: 0, cluster: 1, dependent: false }
    }

    pub fn with_cluster(self, blocks: u32) -> LaunchConfig {
        LaunchConfig { cluster: blocks, ..self }
    }

    /// Beginning before the launch before it has ended.
    pub fn overlapping(self) -> LaunchConfig {
        LaunchConfig { dependent: true, ..self }
    }

    pub fn with_shared(self, bytes: u32) -> LaunchConfig {
        LaunchConfig { shared: bytes, ..self }
    }
}

/// A matrix of bf16 in device memory as the copy engine of sm_90a sees it (TMA), and the box that one copy moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSpec {
    /// Whose, in messages.
    pub what: &'static str,
    pub address: u64,
    pub rows: usize,
    pub cols: usize,
    /// Elements from row to row.
    pub stride: usize,
    pub box_rows: u32,
}

impl MapSpec {
    /// Columns of every box: what 128 bytes hold, which is the widest that can be permuted in shared memory.
    pub(crate) const BOX_COLS: u32 = 64;

    /// The one place that knows what the copy engine can do; both drivers ask it.
    pub(crate) fn check(&self) -> Result<()> {
        let MapSpec { what, address, rows, cols, stride, box_rows } = *self;
        let bytes = 2 * stride as u64;
        let rules = [
            (
                "an address that is a multiple of 16",
                address != 0 && address.is_multiple_of(16),
                format!("{address:#x}"),
            ),
            ("1 to 2^32 rows", rows > 0 && rows as u64 <= 1 << 32, rows.to_string()),
            ("1 to 2^32 columns", cols > 0 && cols as u64 <= 1 << 32, cols.to_string()),
            (
                "rows a multiple of 16 bytes apart, less than 2^40",
                bytes.is_multiple_of(16) && bytes < 1 << 40,
                format!("{bytes} bytes"),
            ),
            ("rows no nearer than they are long", stride >= cols, format!("{cols} columns, {stride} apart")),
            ("a box of 1 to 256 rows", (1..=256).contains(&box_rows), box_rows.to_string()),
        ];
        let Some((rule, _, found)) = rules.into_iter().find(|(_, holds, _)| !holds) else { return Ok(()) };
        Err(Error::Shape { op: "tensor map", expected: format!("{rule} for {what}"), found })
    }
}

/// A [`MapSpec`] as the device reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TensorMap {
    pub(crate) words: [u64; 16],
}

impl TensorMap {
    /// As a kernel's argument.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.words)
    }
}

/// A loaded kernel: the maker's own handle, and the name for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    pub(crate) handle: u64,
    pub(crate) name: &'static str,
}

/// A captured sequence of launches: each call queues it again.
pub type Captured = Box<dyn Fn() -> Result<()> + Send>;

/// A point in the stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Event(pub u64);

pub trait Driver: Send + Sync {
    fn info(&self) -> &DeviceInfo;

    /// Bytes of memory, zeroed, 256-byte aligned. Out of memory is an error: what was asked, what is free, what to lower.
    fn alloc(&self, bytes: usize) -> Result<u64>;

    /// # Safety
    /// `address` came from `alloc`, and nothing uses it any more.
    unsafe fn free(&self, address: u64);

    /// # Safety
    /// `dst` has room for `src`.
    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()>;

    /// Waits for queued work.
    ///
    /// # Safety
    /// `src` holds `dst.len()` bytes.
    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()>;

    /// # Safety
    /// Both ranges are alive and do not overlap.
    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()>;

    /// # Safety
    /// `dst` has room for `bytes`.
    unsafe fn zero(&self, dst: u64, bytes: usize) -> Result<()>;

    /// Compiles (or finds in the cache) and loads one kernel of a source; modules are kept by (source, defines).
    fn load(&self, source: &'static Source, defines: &[Define], kernel: &'static str) -> Result<Function>;

    /// What a kernel takes to have boxes of a matrix copied. It names memory as an address does: whoever launches with it keeps that alive.
    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap>;

    /// Each argument as it lies in memory: an address, a number or a struct, aligned as its type.
    ///
    /// # Safety
    /// The arguments fit the kernel's signature, and the kernel stays within their memory.
    unsafe fn launch(&self, function: Function, config: LaunchConfig, args: &[&[u8]]) -> Result<()>;

    /// From here on work is recorded, not run.
    fn capture_begin(&self) -> Result<()>;
    /// Ends a capture, also one that failed.
    ///
    /// # Safety
    /// Whenever the sequence is called, all memory that it names is alive.
    unsafe fn capture_end(self: Arc<Self>) -> Result<Captured>;

    /// Marks this point of the stream.
    fn event(&self) -> Result<Event>;
    /// Milliseconds between two events; waits for the later one. Frees nothing.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32>;
    fn event_free(&self, event: Event);
}
