//! The driver layer against a fake libcuda: what is late happens late, and what fails, fails on request. No GPU needed.
//!
//! libcuda is found by the loader, so each case runs in a process of its own, with the fake in the loader's path.

#[path = "common/compiler.rs"]
mod compiler;
#[path = "common/memory.rs"]
mod memory;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use ares::Result;
use ares::backend::cuda::compiler::KernelOptions;
use ares::backend::cuda::device::GpuDriver;
use ares::backend::cuda::driver::{Arch, Define, Driver, Function, LaunchConfig, MapSpec};
use ares::backend::cuda::kernels::ROWS;
use ares::backend::cuda::nvrtc::Cubin;
use ares::backend::cuda::pack;
use memory::{download, upload};

const DEFINES: &[Define] = &[("THREADS", 128)];

/// The folder of the fake, if it can be compiled here.
fn fake() -> Option<&'static PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let make = || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
        std::fs::create_dir_all(&folder).unwrap();
        compiler::shared_library(Path::new("tests/device/fake_cuda.cpp"), &folder.join("libcuda.so")).then_some(folder)
    };
    FOLDER.get_or_init(make).as_ref()
}

/// Gives what it found or failed with.
type Case = fn() -> Result<String>;

/// What runs under the fake.
const CASES: [(&str, Case); 7] = [
    ("the second device", the_second_device),
    ("with NVRTC", with_nvrtc),
    ("copies", copies),
    ("kernels", kernels),
    ("a box", a_box),
    ("out of memory", out_of_memory),
    ("a fault", a_fault),
];

#[test]
#[ignore = "runs under the fake driver"]
fn under_the_fake() {
    let wanted = std::env::var("FAKE_CASE").unwrap();
    let (_, case) = CASES.iter().find(|(name, _)| *name == wanted).unwrap();
    println!("found: {}", case().unwrap_or_else(|error| error.to_string()));
}

/// Runs a case under the fake with this setting; what it found must hold every one of `words`.
#[track_caller]
fn finds(case: &str, setting: &str, sync: bool, words: &[&str]) -> Option<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "under_the_fake", "--nocapture"]).env("LD_LIBRARY_PATH", fake()?);
    command.env("FAKE_CASE", case).env("FAKE_CUDA", setting).env_remove("ARES_SYNC");
    let output = command.env("FAKE_SYNC", if sync { "1" } else { "0" }).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{out}\n{}", String::from_utf8_lossy(&output.stderr));
    let (_, found) = out.split_once("found: ").unwrap_or_else(|| panic!("{out}"));
    words.iter().for_each(|word| assert!(found.contains(word), "{setting}: {word:?} is not in {found}"));
    Some(found.to_string())
}

/// A driver whose kernels come from a pack that the fake takes for code.
fn open(ordinal: usize) -> Result<Arc<dyn Driver>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.kernels");
    let cubin = Cubin { image: b"cubin".to_vec(), log: String::new() };
    let key = pack::key(ROWS.file, ROWS.text, DEFINES, Arch::Sm90a);
    std::fs::write(&path, pack::encode(&[(key, cubin)])).unwrap();
    let sync = std::env::var("FAKE_SYNC").is_ok_and(|value| value == "1");
    GpuDriver::open(ordinal, KernelOptions { nvrtc: None, kernels: Some(path), sync, tier: None })
}

#[test]
fn what_is_wrong_with_the_device_is_said() {
    for (setting, words) in [
        ("count=1", &["cuda:1", "one device, cuda:0", "--device cpu"][..]),
        ("count=0", &["cuda:1", "0 devices"]),
        ("init=100", &["CUDA_ERROR_NO_DEVICE", "nvidia-smi", "--gpus all"]),
        ("init=34", &["stub", "LD_LIBRARY_PATH"]),
        ("version=11080 count=2", &["speaks CUDA 11.8", "12.0 or newer"]),
        ("count=2 capability=75", &["Fake: compute capability 7.5", "8.0 or newer"]),
        ("count=2 capability=90", &["cuda:1 Fake", "sm_90a", "132"]),
        ("count=2 capability=120", &["cuda:1 Fake", "sm_120"]),
    ] {
        finds("the second device", setting, false, words);
    }
}

fn the_second_device() -> Result<String> {
    let driver = open(1)?;
    let info = driver.info();
    Ok(format!("{} {} {}", info.name, info.arch, info.multiprocessors))
}

#[test]
fn a_driver_older_than_the_compiler_is_refused() {
    let Some(folder) = std::env::var_os("ARES_NVRTC").map(PathBuf::from) else {
        println!("skipped: ARES_NVRTC does not name a libnvrtc");
        return;
    };
    let Some(found) = finds("with NVRTC", "version=12040", false, &[]) else { return };
    // NVRTC 12 may be the one that is there, and that fits.
    let new = ares::backend::cuda::nvrtc::Nvrtc::find(Some(&folder), None).unwrap().version.0 > 12;
    assert_eq!(new, found.contains("the driver speaks CUDA 12.4; libnvrtc 13."), "{found}");
    assert_eq!(new, found.contains("nvidia-cuda-nvrtc-cu12==12.9.*"), "{found}");
}

fn with_nvrtc() -> Result<String> {
    GpuDriver::open(0, KernelOptions::default().or_environment())?;
    Ok("opened".into())
}

#[test]
fn copies_of_any_size_arrive() {
    finds("copies", "", false, &["arrived"]);
}

fn copies() -> Result<String> {
    let driver = open(0)?;
    // Below, at and above a slot of either ring, and more parts than there are slots.
    for bytes in [1, 1000, 64 << 10, (64 << 10) + 1, (16 << 20) - 1, (33 << 20) + 3] {
        let from: Vec<u8> = (0..bytes).map(|i| (i * 31 + i / 251) as u8).collect();
        let (a, b) = (upload(&driver, &from), driver.alloc(bytes)?);
        let zeros = |address| download::<u8>(&driver, address, bytes).iter().all(|&byte| byte == 0);
        assert!(zeros(b), "fresh memory is zeroed");
        // SAFETY: each range is `bytes` long and alive, and used no more once it is freed.
        unsafe {
            driver.copy(b, a, bytes)?;
            driver.zero(a, bytes)?;
            assert!(download::<u8>(&driver, b, bytes) == from, "{bytes} bytes");
            assert!(zeros(a));
            driver.free(a);
            driver.free(b);
        }
    }
    // More small uploads than slots, each of another text, none of them waited for.
    let address = driver.alloc(4 * 500)?;
    // SAFETY: 500 words.
    unsafe {
        for i in 0..500u32 {
            driver.upload(address + 4 * u64::from(i), &i.to_le_bytes())?;
        }
        assert!(download::<u32>(&driver, address, 500).into_iter().eq(0..500));
        // Nothing to copy is nothing to do.
        driver.upload(address, &[])?;
        driver.download(&mut [], address)?;
        driver.free(address);
    }
    Ok("arrived".into())
}

/// Two tensors of three rows of eight, `x` filled, and the rows to gather.
struct Gather {
    function: Function,
    y: u64,
    x: u64,
    rows: u64,
}

/// Rows 2, 0, 1.
const GATHERED: [u32; 12] = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7];

impl Gather {
    fn new(driver: &Arc<dyn Driver>) -> Result<Gather> {
        let (x, rows) = (upload(driver, &Vec::from_iter(0..12u32)), upload(driver, &[2u32, 0, 1]));
        Ok(Gather { function: driver.load(&ROWS, DEFINES, "gather")?, y: upload(driver, &[0u32; 12]), x, rows })
    }

    fn launch(&self, driver: &Arc<dyn Driver>) -> Result<()> {
        let words = [self.y, self.x, self.rows, 8];
        // SAFETY: three rows of eight.
        unsafe { driver.launch(self.function, LaunchConfig::linear(3, 128), &words.each_ref().map(bytemuck::bytes_of)) }
    }

    fn read(&self, driver: &Arc<dyn Driver>) -> Result<Vec<u32>> {
        let mut found = vec![0u32; 12];
        // SAFETY: of this length.
        unsafe { driver.download(bytemuck::cast_slice_mut(&mut found), self.y) }.map(|()| found)
    }
}

#[test]
fn kernels_run_and_replay() {
    finds("kernels", "", false, &["ran"]);
}

fn kernels() -> Result<String> {
    let driver = open(0)?;
    let gather = Gather::new(&driver)?;
    let from = driver.event()?;
    gather.launch(&driver)?;
    let to = driver.event()?;
    assert_eq!(driver.elapsed(&from, &to)?, 1.0);
    driver.event_free(from);
    driver.event_free(to);
    assert_eq!(gather.read(&driver)?, GATHERED);
    // From another thread, whose context nobody has set.
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(gather.read(&driver).unwrap(), GATHERED));
    });
    // SAFETY: 48 bytes.
    unsafe { driver.zero(gather.y, 48)? };
    let spare = driver.alloc(64)?;
    driver.capture_begin()?;
    gather.launch(&driver)?;
    for forbidden in [driver.alloc(8).map(drop), gather.read(&driver).map(drop), driver.capture_begin()] {
        assert!(forbidden.unwrap_err().to_string().contains("while a sequence is captured"));
    }
    // Given back now, freed after the capture, which forbids to wait for what may still use it.
    // SAFETY: nothing uses it.
    unsafe { driver.free(spare) };
    // SAFETY: all memory is alive below.
    let captured = unsafe { driver.clone().capture_end()? };
    assert_eq!(gather.read(&driver)?, [0; 12], "recorded, not run");
    captured()?;
    assert_eq!(gather.read(&driver)?, GATHERED);
    let error = driver.load(&ROWS, &[("THREADS", 64)], "gather").unwrap_err().to_string();
    assert!(error.contains("expected rows.cu for sm_90a with THREADS=64"), "{error}");
    assert!(error.contains("ares kernels --arch sm_90a --pack"), "{error}");
    // SAFETY: refused before anything is touched.
    let refused = unsafe {
        driver.launch(gather.function, LaunchConfig::linear(3, 128).with_shared(1 << 20), &[&[0u8; 8][..]; 4])
    };
    assert!(refused.unwrap_err().to_string().contains("cannot launch gather"), "the device is named");
    Ok("ran".into())
}

#[test]
fn maps_and_clusters_reach_the_driver() {
    finds("a box", "", false, &["copied"]);
}

fn a_box() -> Result<String> {
    let driver = open(0)?;
    let (rows, cols, stride) = (5usize, 24usize, 32usize);
    let (x, y) = (upload(&driver, &Vec::from_iter(0..80u32)), upload(&driver, &[7u32; 80]));
    let spec = MapSpec { what: "x", address: x, rows, cols, stride, box_rows: 3 };
    let (from, to) = (driver.tensor_map(&spec)?, driver.tensor_map(&MapSpec { what: "y", address: y, ..spec })?);
    let refused = driver.tensor_map(&MapSpec { address: x + 8, ..spec }).unwrap_err().to_string();
    assert!(refused.contains("expected an address that is a multiple of 16 for x"), "{refused}");
    let function = driver.load(&ROWS, DEFINES, "copy_box")?;
    // SAFETY: the first three rows of both.
    unsafe {
        driver.launch(
            function,
            LaunchConfig::linear(4, 128).with_cluster(2).overlapping(),
            &[to.bytes(), from.bytes()],
        )?
    };
    let found = download::<u32>(&driver, y, 80);
    let copied = |i: usize| i / 16 < 3 && i % 16 < 12;
    assert!((0..80).all(|i| found[i] == if copied(i) { i as u32 } else { 7 }), "{found:?}");
    Ok("copied".into())
}

#[test]
fn out_of_memory_says_what_is_free() {
    let words = ["cuda:0 Fake", "expected 2.00 GiB", "found 1.00 of 3.0 GiB free", "--batch-tokens"];
    finds("out of memory", "memory=3221225472", false, &words);
}

fn out_of_memory() -> Result<String> {
    let driver = open(0)?;
    driver.alloc(2 << 30).unwrap();
    driver.alloc(2 << 30).map(|_| "a second half".into())
}

#[test]
fn a_fault_names_the_kernels_that_may_be_at_fault() {
    let since = "gather succeeded last; since then scale_rows, scatter, scale_rows were launched";
    finds("a fault", "fault=scatter", false, &["CUDA_ERROR_ILLEGAL_ADDRESS", since, "--sync"]);
    let words = ["scatter with LaunchConfig", "ILLEGAL_ADDRESS"];
    let Some(at_once) = finds("a fault", "fault=scatter", true, &words) else { return };
    assert!(!at_once.contains("--sync"), "{at_once}");
}

/// Everything is dropped after the fault, without a panic.
fn a_fault() -> Result<String> {
    let driver = open(0)?;
    let gather = Gather::new(&driver)?;
    gather.launch(&driver)?;
    gather.read(&driver)?;
    for name in ["scale_rows", "scatter", "scale_rows"] {
        let function = driver.load(&ROWS, DEFINES, name)?;
        // SAFETY: the fake does not touch memory for these.
        unsafe { driver.launch(function, LaunchConfig::linear(1, 128), &[&[0u8; 8][..]; 4])? };
    }
    gather.read(&driver).map(|_| "no fault".into())
}
