//! A device that counts and computes nothing: how many bytes a run holds at once, and what it launches. Every number that is read
//! from it is zero, but for short columns that the host wrote: they say what an operation would read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use super::driver::{Captured, Define, DeviceInfo, Driver, Event, Function, LaunchConfig, MapSpec, TensorMap};
use super::lock;
use super::source::Source;
use crate::error::Result;

/// Bytes of a column that is kept.
const SHORT: usize = 4096;

/// Counts in a GPU's place.
pub(crate) struct Counter {
    info: DeviceInfo,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    counts: Counts,
    /// Bytes by address.
    alive: HashMap<u64, u64>,
    next: u64,
    /// Short columns by address.
    written: HashMap<u64, Vec<u8>>,
    /// What is being captured.
    recording: Option<Vec<&'static str>>,
}

/// What was asked of the device until now.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Counts {
    /// Bytes held.
    pub(crate) bytes: u64,
    /// The most that was held at once.
    pub(crate) peak_bytes: u64,
    /// The files of kernels that were loaded, each with the defines it was compiled with.
    pub(crate) builds: BTreeSet<(&'static str, Vec<Define>)>,
    /// By kernel, those of replayed captures included.
    pub(crate) launches: BTreeMap<&'static str, u64>,
    pub(crate) captures: u64,
    pub(crate) replays: u64,
}

impl Counter {
    /// A device of this description, with memory without end.
    pub(crate) fn new(info: DeviceInfo) -> Arc<Counter> {
        Arc::new(Counter { info, state: Mutex::default() })
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.state).counts.clone()
    }

    /// Forgets what was launched, and what was held before; what was loaded stays so.
    pub(crate) fn begin(&self) {
        let counts = &mut lock(&self.state).counts;
        let builds = std::mem::take(&mut counts.builds);
        *counts = Counts { bytes: counts.bytes, peak_bytes: counts.bytes, builds, ..Counts::default() };
    }
}

// SAFETY: no address is ever followed, so nothing is asked of a caller.
impl Driver for Counter {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let State { counts, alive, next, .. } = &mut *lock(&self.state);
        let address = *next + 256; // none is null
        *next = address + bytes as u64;
        alive.insert(address, bytes as u64);
        counts.bytes += bytes as u64;
        counts.peak_bytes = counts.peak_bytes.max(counts.bytes);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        let State { counts, alive, written, .. } = &mut *lock(&self.state);
        counts.bytes -= alive.remove(&address).unwrap_or_default();
        written.remove(&address);
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        if src.len() <= SHORT {
            lock(&self.state).written.insert(dst, src.to_vec());
        }
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        match lock(&self.state).written.get(&src).filter(|written| written.len() == dst.len()) {
            Some(written) => dst.copy_from_slice(written),
            None => dst.fill(0),
        }
        Ok(())
    }

    unsafe fn copy(&self, _dst: u64, _src: u64, _bytes: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn zero(&self, _dst: u64, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn load(&self, source: &'static Source, defines: &[Define], kernel: &'static str) -> Result<Function> {
        lock(&self.state).counts.builds.insert((source.file, defines.to_vec()));
        Ok(Function { handle: 0, name: kernel })
    }

    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap> {
        // Its addresses are none: rules about them do not hold.
        MapSpec { address: 256, ..*spec }.check()?;
        Ok(TensorMap { words: [0; 16] })
    }

    unsafe fn launch(&self, function: Function, _config: LaunchConfig, _args: &[&[u8]]) -> Result<()> {
        let State { counts, recording, .. } = &mut *lock(&self.state);
        match recording {
            Some(recording) => recording.push(function.name),
            None => *counts.launches.entry(function.name).or_default() += 1,
        }
        Ok(())
    }

    fn capture_begin(&self) -> Result<()> {
        lock(&self.state).recording = Some(Vec::new());
        Ok(())
    }

    unsafe fn capture_end(self: Arc<Self>) -> Result<Captured> {
        let recorded = {
            let State { counts, recording, .. } = &mut *lock(&self.state);
            counts.captures += 1;
            recording.take().unwrap_or_default()
        };
        Ok(Box::new(move || {
            let counts = &mut lock(&self.state).counts;
            counts.replays += 1;
            recorded.iter().for_each(|kernel| *counts.launches.entry(kernel).or_default() += 1);
            Ok(())
        }))
    }

    fn event(&self) -> Result<Event> {
        Ok(Event(0))
    }

    fn elapsed(&self, _from: &Event, _to: &Event) -> Result<f32> {
        Ok(0.0)
    }

    fn event_free(&self, _event: Event) {}
}
