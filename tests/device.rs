//! The driver layer against a fake libcuda: what is late happens late, and what fails, fails on request. No GPU needed.
//!
//! libcuda is found by the loader, so each test runs itself once more, in a process of its own, with the fake in the
//! loader's path; the parts that need it are marked as ignored.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};

use ares::backend::cuda::compiler::KernelOptions;
use ares::backend::cuda::device::GpuDriver;
use ares::backend::cuda::driver::{Arch, Define, Driver, Function, LaunchConfig};
use ares::backend::cuda::kernels::ROWS;
use ares::backend::cuda::nvrtc::Cubin;
use ares::backend::cuda::pack;

const DEFINES: &[Define] = &[("THREADS", 128)];

/// The folder of the fake, if it can be compiled here.
fn fake() -> Option<&'static PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let make = || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
        std::fs::create_dir_all(&folder).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/device/fake_cuda.cpp");
        let compiler = std::env::var("CXX").unwrap_or("c++".to_string());
        let mut command = Command::new(compiler);
        command.args(["-std=c++17", "-O1", "-shared", "-fPIC", source, "-o"]).arg(folder.join("libcuda.so"));
        let output = match command.output() {
            Ok(output) => output,
            Err(reason) => {
                assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "no C++ compiler: {reason}");
                return None;
            }
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(folder)
    };
    let found = FOLDER.get_or_init(make).as_ref();
    if found.is_none() {
        println!("skipped: no C++ compiler");
    }
    found
}

/// Runs the ignored test `name` under the fake.
fn run(name: &str, setting: &str, more: &[(&str, &str)]) -> Option<Output> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", name, "--nocapture"]).env("LD_LIBRARY_PATH", fake()?);
    command.env("FAKE_CUDA", setting).envs(more.iter().copied()).env_remove("ARES_SYNC");
    Some(command.output().unwrap())
}

fn passes(name: &str, setting: &str) {
    let Some(output) = run(name, setting, &[]) else { return };
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

/// What `name` prints after `found: `.
fn says(name: &str, setting: &str, sync: bool) -> Option<String> {
    let output = run(name, setting, &[("FAKE_SYNC", if sync { "1" } else { "0" })])?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{out}\n{}", String::from_utf8_lossy(&output.stderr));
    Some(out.lines().find_map(|line| Some(line.split_once("found: ")?.1.to_string())).unwrap_or(out))
}

/// A driver whose kernels come from a pack that the fake takes for code.
fn open(ordinal: usize) -> ares::Result<Arc<dyn Driver>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.kernels");
    let cubin = Cubin { image: b"cubin".to_vec(), log: String::new() };
    let key = pack::key(ROWS.file, ROWS.text, DEFINES, Arch::Sm90a);
    std::fs::write(&path, pack::encode(&[(key, cubin)])).unwrap();
    let sync = std::env::var("FAKE_SYNC").is_ok_and(|value| value == "1");
    GpuDriver::open(ordinal, KernelOptions { nvrtc: None, kernels: Some(path), sync })
}

#[test]
fn what_is_wrong_with_the_device_is_said() {
    let expect = |setting: &str, words: &[&str]| {
        let Some(found) = says("inner_open_the_second", setting, false) else { return };
        words.iter().for_each(|word| assert!(found.contains(word), "{setting}: {found}"));
    };
    expect("count=1", &["cuda:1", "one device, cuda:0", "--device cpu"]);
    expect("count=0", &["cuda:1", "0 devices"]);
    expect("init=100", &["CUDA_ERROR_NO_DEVICE", "nvidia-smi", "--gpus all"]);
    expect("init=34", &["stub", "LD_LIBRARY_PATH"]);
    expect("version=11080 count=2", &["speaks CUDA 11.8", "12.0 or newer"]);
    expect("count=2 capability=75", &["Fake: compute capability 7.5", "8.0 or newer"]);
    expect("count=2 capability=90", &["cuda:1 Fake", "sm_90a", "132"]);
    expect("count=2 capability=120", &["cuda:1 Fake", "sm_120"]);
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_open_the_second() {
    match open(1) {
        Ok(driver) => {
            let info = driver.info();
            println!("found: {} {} {}", info.name, info.arch, info.multiprocessors);
        }
        Err(error) => println!("found: {error}"),
    }
}

#[test]
fn a_driver_older_than_the_compiler_is_refused() {
    let folder = std::env::var_os("ARES_NVRTC").map(PathBuf::from);
    let Some(folder) = folder else {
        println!("skipped: ARES_NVRTC does not name a libnvrtc");
        return;
    };
    let Some(found) = says("inner_open_with_nvrtc", "version=12040", false) else { return };
    // NVRTC 12 may be the one that is there, and that fits.
    let new = ares::backend::cuda::nvrtc::Nvrtc::find(Some(&folder), None).unwrap().version.0 > 12;
    assert_eq!(new, found.contains("the driver speaks CUDA 12.4; libnvrtc 13."), "{found}");
    assert_eq!(new, found.contains("nvidia-cuda-nvrtc-cu12==12.9.*"), "{found}");
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_open_with_nvrtc() {
    let options = KernelOptions { nvrtc: None, kernels: None, sync: false }.or_environment();
    println!("found: {}", GpuDriver::open(0, options).map_or_else(|e| e.to_string(), |_| "opened".to_string()));
}

#[test]
fn copies_of_any_size_arrive() {
    passes("inner_copies", "");
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_copies() {
    let driver = open(0).unwrap();
    let byte = |i: usize| (i * 31 + i / 251) as u8;
    // Below, at and above a slot of either ring, and more parts than there are slots.
    for bytes in [1, 1000, 64 << 10, (64 << 10) + 1, (16 << 20) - 1, (33 << 20) + 3] {
        let from: Vec<u8> = (0..bytes).map(byte).collect();
        let (a, b) = (driver.alloc(bytes).unwrap(), driver.alloc(bytes).unwrap());
        let mut to = vec![1u8; bytes];
        // SAFETY: each range is `bytes` long and alive.
        unsafe {
            driver.download(&mut to, a).unwrap();
            assert!(to.iter().all(|&byte| byte == 0), "fresh memory is zeroed");
            driver.upload(a, &from).unwrap();
            driver.copy(b, a, bytes).unwrap();
            driver.zero(a, bytes).unwrap();
            driver.download(&mut to, b).unwrap();
            assert!(to == from, "{bytes} bytes");
            driver.download(&mut to, a).unwrap();
            assert!(to.iter().all(|&byte| byte == 0));
            driver.free(a);
            driver.free(b);
        }
    }
    // More small uploads than slots, each of another text, none of them waited for.
    let address = driver.alloc(4 * 500).unwrap();
    let mut to = [0u8; 4 * 500];
    // SAFETY: 500 words.
    unsafe {
        for i in 0..500u32 {
            driver.upload(address + 4 * u64::from(i), &i.to_le_bytes()).unwrap();
        }
        driver.download(&mut to, address).unwrap();
        assert!(to.chunks(4).zip(0u32..).all(|(found, i)| found == i.to_le_bytes()));
        // Nothing to copy is nothing to do.
        driver.upload(address, &[]).unwrap();
        driver.download(&mut [], address).unwrap();
        driver.free(address);
    }
}

/// Two tensors of three rows of eight, `x` filled, and the rows to gather.
struct Gather {
    function: Function,
    y: u64,
    x: u64,
    rows: u64,
}

impl Gather {
    fn new(driver: &Arc<dyn Driver>) -> Gather {
        let function = driver.load(&ROWS, DEFINES, "gather").unwrap();
        let [y, x, rows] = [48, 48, 12].map(|bytes| driver.alloc(bytes).unwrap());
        let values: Vec<u8> = (0..48).collect();
        // SAFETY: of these lengths.
        unsafe {
            driver.upload(x, &values).unwrap();
            driver.upload(rows, bytemuck::cast_slice(&[2u32, 0, 1])).unwrap();
        }
        Gather { function, y, x, rows }
    }

    fn launch(&self, driver: &Arc<dyn Driver>) -> ares::Result<()> {
        let words = [self.y, self.x, self.rows, 8];
        // SAFETY: three rows of eight.
        unsafe { driver.launch(self.function, LaunchConfig::linear(3, 128), &words.each_ref().map(bytemuck::bytes_of)) }
    }

    fn read(&self, driver: &Arc<dyn Driver>) -> ares::Result<Vec<u8>> {
        let mut found = vec![0; 48];
        // SAFETY: of this length.
        unsafe { driver.download(&mut found, self.y) }.map(|()| found)
    }
}

/// Rows 2, 0, 1.
fn gathered() -> Vec<u8> {
    (32..48).chain(0..32).collect()
}

#[test]
fn kernels_run_and_replay() {
    passes("inner_kernels", "");
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_kernels() {
    let driver = open(0).unwrap();
    let gather = Gather::new(&driver);
    let from = driver.event().unwrap();
    gather.launch(&driver).unwrap();
    let to = driver.event().unwrap();
    assert_eq!(driver.elapsed(&from, &to).unwrap(), 1.0);
    driver.event_free(from);
    driver.event_free(to);
    assert_eq!(gather.read(&driver).unwrap(), gathered());
    // From another thread, whose context nobody has set.
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(gather.read(&driver).unwrap(), gathered()));
    });
    // SAFETY: 48 bytes.
    unsafe { driver.zero(gather.y, 48).unwrap() };
    let spare = driver.alloc(64).unwrap();
    driver.capture_begin().unwrap();
    gather.launch(&driver).unwrap();
    for forbidden in [driver.alloc(8).map(drop), gather.read(&driver).map(drop), driver.capture_begin()] {
        assert!(forbidden.unwrap_err().to_string().contains("while a sequence is captured"));
    }
    // Given back now, freed after the capture, which forbids to wait for what may still use it.
    // SAFETY: nothing uses it.
    unsafe { driver.free(spare) };
    // SAFETY: all memory is alive below.
    let captured = unsafe { driver.clone().capture_end().unwrap() };
    assert_eq!(gather.read(&driver).unwrap(), [0; 48], "recorded, not run");
    captured().unwrap();
    assert_eq!(gather.read(&driver).unwrap(), gathered());
    let error = driver.load(&ROWS, &[("THREADS", 64)], "gather").unwrap_err().to_string();
    assert!(error.contains("rows.cu for sm_90a with THREADS=64"), "{error}");
    // SAFETY: refused before anything is touched.
    let refused = unsafe {
        driver.launch(gather.function, LaunchConfig::linear(3, 128).with_shared(1 << 20), &[&[0u8; 8][..]; 4])
    };
    assert!(refused.unwrap_err().to_string().contains("cannot launch gather"), "the device is named");
}

#[test]
fn out_of_memory_says_what_is_free() {
    let Some(found) = says("inner_out_of_memory", "memory=3221225472", false) else { return };
    for word in ["cuda:0 Fake", "expected 2.00 GiB", "found 1.00 of 3.0 GiB free", "--batch-tokens"] {
        assert!(found.contains(word), "{found}");
    }
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_out_of_memory() {
    let driver = open(0).unwrap();
    driver.alloc(2 << 30).unwrap();
    println!("found: {}", driver.alloc(2 << 30).unwrap_err());
}

#[test]
fn a_fault_names_the_kernels_that_may_be_at_fault() {
    let Some(late) = says("inner_fault", "fault=scatter", false) else { return };
    assert!(late.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{late}");
    assert!(late.contains("gather succeeded last; since then scale_rows, scatter, scale_rows were launched"), "{late}");
    assert!(late.contains("--sync"), "{late}");
    let Some(at_once) = says("inner_fault", "fault=scatter", true) else { return };
    assert!(at_once.contains("scatter with LaunchConfig") && at_once.contains("ILLEGAL_ADDRESS"), "{at_once}");
    assert!(!at_once.contains("--sync"), "{at_once}");
}

#[test]
#[ignore = "runs under the fake driver"]
fn inner_fault() {
    let driver = open(0).unwrap();
    let gather = Gather::new(&driver);
    gather.launch(&driver).unwrap();
    gather.read(&driver).unwrap();
    let launch = |name| {
        let function = driver.load(&ROWS, DEFINES, name)?;
        // SAFETY: the fake does not touch memory for these.
        unsafe { driver.launch(function, LaunchConfig::linear(1, 128), &[&[0u8; 8][..]; 4]) }
    };
    let outcome = launch("scale_rows")
        .and_then(|()| launch("scatter"))
        .and_then(|()| launch("scale_rows"))
        .and_then(|()| gather.read(&driver).map(drop));
    println!("found: {}", outcome.unwrap_err());
    // Everything is dropped after the fault, without a panic.
}
