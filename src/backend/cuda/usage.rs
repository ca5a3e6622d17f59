//! What kernels take of a multiprocessor, read from the compiler's report, and whether as many blocks fit as were planned.

use super::driver::{Arch, Define};
use super::source::Source;

/// What one kernel takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    pub kernel: String,
    /// Of a thread.
    pub(crate) registers: u32,
    /// Static shared memory of a block, bytes.
    pub(crate) shared: u32,
    /// Local memory of a thread, bytes: arrays that no register holds, and spills.
    pub stack: u32,
    /// Bytes that a thread writes and reads again because registers ran out.
    pub spills: u32,
    /// What the assembler did otherwise than the kernel says, as it says it: products of a warpgroup one after the other (C7510, C7511,
    /// C7515), waits and arrivals added (C7517, C7519), registers not given over (C7508).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<String>,
}

impl Usage {
    /// Everything of a thread lies in registers, and the assembler left the kernel as it is.
    pub fn is_clean(&self) -> bool {
        self.stack == 0 && self.spills == 0 && self.advice.is_empty()
    }

    /// Blocks of `budget` that fit one multiprocessor of `arch` at once; 0 if not even one does.
    pub fn blocks(&self, budget: &Budget, arch: Arch) -> u32 {
        // The smallest multiprocessor that an architecture's kernels serve: threads, blocks, KiB of shared memory, and of a block's.
        let [threads, blocks, kib, kib_per_block] = match arch {
            // sm_80's own has 164 KiB; 8.6, 8.9 and 12.0, which share its kernels, have 100, of which a block may take 99.
            Arch::Sm80 => [1536, 16, 100, 99],
            Arch::Sm90a | Arch::Sm100 => [2048, 32, 228, 227],
            Arch::Sm120 => [1536, 24, 100, 99],
        };
        let shared = self.shared + budget.shared;
        if shared > kib_per_block * 1024 || budget.threads > 1024 || self.registers > 255 {
            return 0;
        }
        let warps = budget.threads.div_ceil(32);
        // The hardware gives registers to warps in steps of 256, and every block 1 KiB of shared memory more.
        let registers = warps * (32 * self.registers).next_multiple_of(256);
        let by_registers = 65_536 / registers.max(1);
        let by_shared = kib * 1024 / (shared + 1024).next_multiple_of(128);
        let by_threads = threads / (32 * warps).max(1);
        by_registers.min(by_shared).min(by_threads).min(blocks)
    }
}

/// How a kernel is launched at most, and what its plan relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub kernel: &'static str,
    /// Of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub(crate) shared: u32,
    /// That a multiprocessor must hold at once.
    pub blocks: u32,
}

/// A file of kernels with the constants of a typical model: what can be compiled and checked without a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    pub source: &'static Source,
    pub defines: Vec<Define>,
    /// One for each kernel of the file.
    pub budgets: Vec<Budget>,
    /// The architecture whose instructions it uses, where others have none of them.
    only: Option<Arch>,
}

impl Build {
    /// All kernels of `source` with blocks of `threads`, without dynamic shared memory, at least one block at a time.
    pub(crate) fn new(source: &'static Source, defines: &[Define], threads: u32) -> Build {
        let budget = |&kernel| Budget { kernel, threads, shared: 0, blocks: 1 };
        Build { source, defines: defines.to_vec(), budgets: source.kernels.iter().map(budget).collect(), only: None }
    }

    /// For this architecture alone.
    pub(crate) fn only(self, arch: Arch) -> Build {
        Build { only: Some(arch), ..self }
    }

    pub fn serves(&self, arch: Arch) -> bool {
        self.only.is_none_or(|only| only == arch)
    }

    /// Another launch for one of the kernels. A name that the file lacks changes nothing; `tests/kernels.rs` finds it out by
    /// the budget that is then missing.
    pub(crate) fn with(mut self, kernel: &'static str, threads: u32, shared: u32, blocks: u32) -> Build {
        self.budgets.retain(|budget| budget.kernel != kernel);
        self.budgets.push(Budget { kernel, threads, shared, blocks });
        self
    }
}

/// The report that `--ptxas-options=-v` puts into the log, one entry per kernel, in the order of their names.
pub fn parse(log: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or("").to_string();
            found.push(Usage { kernel, ..Usage::default() });
        }
        let Some(usage) = found.last_mut() else { continue };
        // Functions that were not inlined report frames of their own, which the kernel's threads pay for too.
        let said = |unit| before(line, unit).unwrap_or(0);
        usage.stack = usage.stack.max(said(" bytes stack frame")).max(said(" bytes cumulative stack size"));
        usage.spills += said(" bytes spill stores") + said(" bytes spill loads");
        usage.registers = usage.registers.max(said(" registers"));
        usage.shared = usage.shared.max(said(" bytes smem"));
    }
    found.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    // Advice stands before all reports, and may name a function that was not inlined, or none: then it is everybody's.
    for line in log.lines().filter(|line| line.contains("(C7")) {
        let named = |usage: &Usage| line.contains(&format!("function '{}'", usage.kernel));
        let all = !found.iter().any(named);
        found
            .iter_mut()
            .filter(|usage| all || named(usage))
            .for_each(|usage| usage.advice.push(line.trim().to_string()));
    }
    found
}

/// The number in front of `unit`.
fn before(line: &str, unit: &str) -> Option<u32> {
    line[..line.find(unit)?].rsplit([' ', ',']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'g' for 'sm_80'
ptxas info    : Function properties for g
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
ptxas         .     272 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 272 bytes cumulative stack size, 360 bytes cmem[0]
";

    #[test]
    fn the_report_is_read() {
        let f = Usage { kernel: "f".into(), registers: 255, shared: 0, stack: 272, spills: 24, advice: Vec::new() };
        let g = Usage { kernel: "g".into(), registers: 12, shared: 256, stack: 0, spills: 0, advice: Vec::new() };
        assert!(!f.is_clean() && g.is_clean());
        assert_eq!(parse(LOG), [f, g]);
        assert_eq!(parse("anything else"), []);
        let advice = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 54 in function";
        for (whose, expected) in [("'g'", [0, 1]), ("'inner'", [1, 1])] {
            let found = parse(&format!("{advice} {whose}\n{LOG}"));
            assert_eq!([found[0].advice.len(), found[1].advice.len()], expected, "{whose}");
            assert!(!found[1].is_clean());
        }
    }

    #[test]
    fn blocks_are_counted_as_the_hardware_does() {
        let blocks = |registers, threads, shared, arch| {
            let usage = Usage { registers, ..Usage::default() };
            usage.blocks(&Budget { kernel: "k", threads, shared, blocks: 1 }, arch)
        };
        assert_eq!(blocks(128, 256, 0, Arch::Sm90a), 2, "128 x 256 registers are half of the file");
        assert_eq!(blocks(129, 256, 0, Arch::Sm90a), 1, "registers come in eights");
        assert_eq!(blocks(255, 256, 0, Arch::Sm90a), 1);
        assert_eq!(blocks(168, 512, 0, Arch::Sm90a), 0, "more than the file holds");
        assert_eq!(blocks(32, 128, 49 * 1024, Arch::Sm80), 2, "two of 49 + 1 KiB in 100");
        assert_eq!(blocks(32, 128, 50 * 1024, Arch::Sm80), 1);
        assert_eq!(blocks(32, 128, 100 * 1024, Arch::Sm80), 0, "99 KiB is the most of a block");
        assert_eq!(blocks(32, 128, 100 * 1024, Arch::Sm90a), 2);
        assert_eq!(blocks(16, 1024, 0, Arch::Sm120), 1, "1536 threads");
        assert_eq!(blocks(16, 32, 0, Arch::Sm80), 16);
    }
}
