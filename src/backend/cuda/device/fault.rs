//! What a GPU's faults are called, what to do about them, and which kernels may be at fault: a GPU reports a fault when somebody
//! waits, long after the launch.

use std::collections::VecDeque;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUresult;

use crate::error::Error;

/// `CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)`
pub(super) fn describe(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}

/// A call failed; `action` completes "cannot …". When a kernel is at fault, `trail` says which it may be.
pub(super) fn fault(device: &str, action: &str, error: DriverError, trail: &Trail, sync: bool) -> Error {
    if !is_kernels(error) {
        let what = format!("cannot {action}: {}", describe(error));
        return failed(device, what, "look at `nvidia-smi`; if the device is well, please report this");
    }
    let what = format!("{}: {}", describe(error), trail.describe());
    if sync {
        return ours(device, what);
    }
    failed(device, what, "run again with --sync to learn which kernel it was, and please report it")
}

/// A fault of the program.
pub(super) fn ours(device: &str, what: String) -> Error {
    failed(device, what, "this is a fault in ares: please report it")
}

fn failed(device: &str, what: String, remedy: &str) -> Error {
    Error::Device { device: device.into(), what, remedy: remedy.into() }
}

/// The context must be current.
pub(super) fn out_of_memory(device: &str, bytes: usize) -> Error {
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let found = match result::mem_get_info() {
        Ok((free, total)) => format!("found {:.2} of {:.1} GiB free", gib(free), gib(total)),
        Err(_) => "found less".to_string(),
    };
    let what = format!("out of memory: expected {:.2} GiB, {found}", gib(bytes));
    let remedy = "lower --batch-tokens or the number of sequences at once, train with `recompute = \"block\"`, take smaller models, \
                  or end other programs on this GPU";
    failed(device, what, remedy)
}

/// Whether a kernel did this, now or earlier: the context is lost.
fn is_kernels(error: DriverError) -> bool {
    matches!(
        error.0,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
    )
}

/// Names kept: a training step launches some hundreds of kernels between two waits.
const KEPT: usize = 64;

/// What was launched since the last time that all was known to be well.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// The last launch that is known to have succeeded.
    done: Option<&'static str>,
    since: VecDeque<&'static str>,
    /// Launches in all.
    launched: usize,
}

impl Trail {
    pub(crate) fn launch(&mut self, name: &'static str) {
        if self.since.len() == KEPT {
            self.since.pop_front();
        }
        self.since.push_back(name);
        self.launched += 1;
    }

    /// For [`Trail::reached`].
    pub(crate) fn mark(&self) -> usize {
        self.launched
    }

    /// Everything up to `mark` succeeded.
    pub(crate) fn reached(&mut self, mark: usize) {
        let later = self.launched - mark.min(self.launched);
        while self.since.len() > later {
            self.done = self.since.pop_front();
        }
    }

    /// `norm_forward succeeded last; since then rows, gather x3 were launched`
    pub(crate) fn describe(&self) -> String {
        let done = self.done.map_or("no kernel is known to have succeeded".into(), |n| format!("{n} succeeded last"));
        if self.since.is_empty() {
            return format!("{done}; none was launched since then");
        }
        let mut runs: Vec<(&str, usize)> = Vec::new();
        for &name in &self.since {
            match runs.last_mut() {
                Some((last, count)) if *last == name => *count += 1,
                _ => runs.push((name, 1)),
            }
        }
        let run = |(name, count): (&str, usize)| if count == 1 { name.to_string() } else { format!("{name} x{count}") };
        let names: Vec<String> = runs.into_iter().map(run).collect();
        // What fell out at the front was launched after `done` as well.
        let more = if self.since.len() == KEPT { "among others " } else { "" };
        format!("{done}; since then {more}{} were launched", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trail_begins_where_all_was_well_and_does_not_grow() {
        let mut trail = Trail::default();
        assert_eq!(trail.describe(), "no kernel is known to have succeeded; none was launched since then");
        ["embed", "norm"].into_iter().for_each(|name| trail.launch(name));
        let mark = trail.mark();
        ["gather", "gather", "qkv"].into_iter().for_each(|name| trail.launch(name));
        assert!(trail.describe().ends_with("since then embed, norm, gather x2, qkv were launched"));
        for _ in 0..2 {
            trail.reached(mark);
            assert_eq!(trail.describe(), "norm succeeded last; since then gather x2, qkv were launched");
        }
        trail.reached(trail.mark());
        assert_eq!(trail.describe(), "qkv succeeded last; none was launched since then");
        (0..10 * KEPT).for_each(|_| trail.launch("a"));
        assert_eq!(trail.since.len(), KEPT);
        assert!(trail.describe().contains("among others a x64"));
        trail.reached(trail.mark() - 1);
        assert!(trail.describe().ends_with("since then a were launched"), "{}", trail.describe());
    }
}
