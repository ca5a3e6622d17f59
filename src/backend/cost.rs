//! What work must at least do, and how long kernels took.

/// The denominator of every benchmark.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiplications and additions, counted apart.
    pub flops: u64,
    /// Bytes that must cross the memory bus once.
    pub bytes: u64,
}

impl std::ops::Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

/// One kernel's run on a device.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelRun {
    pub(crate) kernel: &'static str,
    /// From the beginning of the recording, milliseconds.
    pub(crate) begin: f32,
    pub(crate) milliseconds: f32,
    /// Zero where the launcher does not say.
    pub(crate) cost: Cost,
}
