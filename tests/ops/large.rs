//! The tile that large heads take, at sizes that a simulator finishes: a device that says it has one multiprocessor makes every
//! plan choose it. Which tile was compiled is read from the constants with which the kernel was loaded. (Every tile of other
//! products: `src/ops/product/cuda/tests.rs`.)

use std::sync::{Arc, Mutex};

use ares::backend::Cuda;
use ares::backend::cuda::driver::{Define, DeviceInfo, Driver, Event, Function, GraphHandle, LaunchConfig};
use ares::backend::cuda::source::Source;
use ares::error::Result;

use crate::lm_head;
use crate::toolkit::{assert_parity, driver};

/// A device that passes for one with a single multiprocessor, and notes what it is asked to load.
struct Single {
    inner: Arc<dyn Driver>,
    info: DeviceInfo,
    loaded: Mutex<Vec<(&'static str, Vec<Define>)>>,
}

impl Single {
    fn open() -> Option<(Arc<Single>, Cuda)> {
        let inner = driver()?;
        let info = DeviceInfo { multiprocessors: 1, ..inner.info().clone() };
        let single = Arc::new(Single { inner, info, loaded: Mutex::default() });
        Some((single.clone(), Cuda::new(single)))
    }

    /// Fails unless `kernel` was loaded, and never with another tile.
    #[track_caller]
    fn expect_only_large(&self, kernel: &str) {
        let loaded = self.loaded.lock().unwrap();
        let of = |defines: &[Define], name: &str| defines.iter().find(|d| d.0 == name).map(|d| d.1);
        let builds = loaded.iter().filter(|(name, _)| *name == kernel);
        let tiles: Vec<_> = builds.map(|(_, defines)| [of(defines, "BLOCK_M"), of(defines, "BLOCK_N")]).collect();
        assert!(!tiles.is_empty() && tiles.iter().all(|tile| *tile == [Some(128); 2]), "{kernel}: {tiles:?}");
    }
}

#[test]
fn heads() {
    // One chunk each: the rest of two would be few rows.
    for shape in [(150, 136, 136, 150), (140, 133, 301, 140)] {
        let Some((single, device)) = Single::open() else { return };
        assert_parity("head", &device, &lm_head::Case::new(shape, 0.2));
        single.expect_only_large("lm_head_logits");
        single.expect_only_large("lm_head_kl_logits");
    }
}

impl Driver for Single {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.inner.alloc(bytes)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.inner.free(address) }
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        unsafe { self.inner.upload(dst, src) }
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        unsafe { self.inner.download(dst, src) }
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        unsafe { self.inner.copy(dst, src, bytes) }
    }

    unsafe fn zero(&self, dst: u64, bytes: usize) -> Result<()> {
        unsafe { self.inner.zero(dst, bytes) }
    }

    fn load(&self, source: &'static Source, defines: &[Define], kernel: &'static str) -> Result<Function> {
        self.loaded.lock().unwrap().push((kernel, defines.to_vec()));
        self.inner.load(source, defines, kernel)
    }

    unsafe fn launch(&self, function: Function, config: LaunchConfig, args: &[&[u8]]) -> Result<()> {
        unsafe { self.inner.launch(function, config, args) }
    }

    fn capture_begin(&self) -> Result<()> {
        self.inner.capture_begin()
    }

    fn capture_end(&self) -> Result<GraphHandle> {
        self.inner.capture_end()
    }

    unsafe fn graph_launch(&self, graph: &GraphHandle) -> Result<()> {
        unsafe { self.inner.graph_launch(graph) }
    }

    fn graph_free(&self, graph: GraphHandle) {
        self.inner.graph_free(graph);
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }

    fn event(&self) -> Result<Event> {
        self.inner.event()
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        self.inner.elapsed(from, to)
    }

    fn event_free(&self, event: Event) {
        self.inner.event_free(event);
    }
}
