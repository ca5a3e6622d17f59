//! The CPU: f32, in this process's memory. The reference that every other backend is held against.

mod halves;
mod packed;

use std::sync::OnceLock;

pub(crate) use halves::{Halves, Right};
pub(crate) use packed::{PANEL, Packed};

use super::{Backend, Element, Matrix, within};
use crate::error::{Error, Result};

/// f32 on all threads of the process's rayon pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    rounded: bool,
}

impl Cpu {
    pub fn new() -> Cpu {
        Cpu { rounded: false }
    }

    /// Rounds weights and every stored activation to bf16, as a GPU backend stores them: the reference for parity.
    pub fn rounded() -> Cpu {
        Cpu { rounded: true }
    }

    /// Rounds what an op is about to leave in memory, where this backend does so.
    pub(crate) fn store(&self, values: &mut [f32]) {
        if self.rounded {
            for value in values {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
    }
}

/// `AMD EPYC, family 26 model 2, avx512f`: virtual machines name the make alone, and speed differs by generation. Linux says it; elsewhere
/// it is the architecture.
pub(crate) fn processor() -> String {
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let mut fields = about.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_string())
    };
    let name = value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let number =
        value("cpu family").zip(value("model")).map(|(family, model)| format!("family {family} model {model}"));
    let flags = value("flags").unwrap_or_default();
    let vectors = ["avx512f", "avx2"].into_iter().find(|set| flags.split(' ').any(|flag| flag == *set));
    [Some(name), number, vectors.map(str::to_string)].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Bytes of a core's second cache, as Linux says them; elsewhere a megabyte.
pub(crate) fn second_cache() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let said = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").unwrap_or_default();
        said.trim().strip_suffix('K').and_then(|kilobytes| kilobytes.parse::<usize>().ok()).map_or(1 << 20, |n| n << 10)
    })
}

/// A frozen matrix W (N, K), packed for both directions of a product.
pub struct CpuMatrix(Stored);

enum Stored {
    /// In the sixteen bits that its numbers have.
    Halves(Halves),
    /// `forward` is Wᵀ (K, N); `backward`, W, is made at its first use: a model that is only run forward is in memory once.
    Whole { forward: Packed, backward: OnceLock<Packed> },
}

impl CpuMatrix {
    /// Wᵀ (K, N): the right operand of y = x·Wᵀ.
    pub(crate) fn forward(&self) -> Right<'_> {
        match &self.0 {
            Stored::Halves(halves) => Right::Halves(halves),
            Stored::Whole { forward, .. } => forward.into(),
        }
    }

    /// W (N, K): the right operand of dx = dy·W.
    pub(crate) fn backward(&self) -> Right<'_> {
        match &self.0 {
            Stored::Halves(halves) => Right::Turned(halves),
            Stored::Whole { forward, backward } => backward.get_or_init(|| forward.transposed()).into(),
        }
    }

    /// Overwrites `out` (K) with row n of W.
    pub(crate) fn read_row(&self, n: usize, out: &mut [f32]) {
        match &self.0 {
            Stored::Halves(halves) => halves.read_column(n, out),
            Stored::Whole { forward, backward } => match backward.get() {
                Some(backward) => backward.read_row(n, out),
                None => forward.read_column(n, out),
            },
        }
    }
}

impl Matrix for CpuMatrix {
    fn shape(&self) -> (usize, usize) {
        let (cols, rows) = self.forward().shape();
        (rows, cols)
    }
}

impl Backend for Cpu {
    type Act = f32;
    type Weight = CpuMatrix;
    type Buffer<T: Element> = Vec<T>;
    type Graph = ();

    const BATCH: usize = 1024;

    fn describe(&self) -> String {
        format!("cpu ({} threads of {})", rayon::current_num_threads(), processor())
    }

    fn stride<T: Element>(cols: usize) -> usize {
        cols
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        // Zeroed pages come from the system as they are touched: capacity that is never used costs no memory.
        bytemuck::allocation::try_zeroed_vec(len).map_err(|()| Error::Data {
            what: "memory".into(),
            expected: format!("{} MB free", len * size_of::<T>() / 1_000_000),
            found: "less".into(),
            remedy: "lower --batch-tokens, or train with `recompute = \"block\"`".into(),
        })
    }

    fn upload<T: Element>(&self, dst: &mut Vec<T>, at: usize, src: &[T]) -> Result<()> {
        let range = within(dst.len(), at, src.len())?;
        dst[range].copy_from_slice(src);
        Ok(())
    }

    fn download<T: Element>(&self, dst: &mut [T], src: &Vec<T>, at: usize) -> Result<()> {
        dst.copy_from_slice(&src[within(src.len(), at, dst.len())?]);
        Ok(())
    }

    fn copy<T: Element>(&self, dst: &mut Vec<T>, dst_at: usize, src: &Vec<T>, src_at: usize, len: usize) -> Result<()> {
        let range = within(dst.len(), dst_at, len)?;
        dst[range].copy_from_slice(&src[within(src.len(), src_at, len)?]);
        Ok(())
    }

    fn zero<T: Element>(&self, dst: &mut Vec<T>, at: usize, len: usize) -> Result<()> {
        let range = within(dst.len(), at, len)?;
        dst[range].fill(T::default());
        Ok(())
    }

    fn activations(&self, values: &[f32]) -> Vec<f32> {
        let mut values = values.to_vec();
        self.store(&mut values);
        values
    }

    fn weight(&self, rows: usize, cols: usize, mut values: Vec<f32>) -> Result<CpuMatrix> {
        if values.len() != rows * cols {
            let (expected, found) = (format!("{rows} x {cols} values"), values.len().to_string());
            return Err(Error::Shape { op: "weight", expected, found });
        }
        self.store(&mut values);
        Ok(CpuMatrix(match Halves::new(&values, (cols, rows)) {
            Some(halves) => Stored::Halves(halves),
            None => {
                let forward = Packed::new(&values, (cols, rows), (1, cols));
                Stored::Whole { forward, backward: OnceLock::new() }
            }
        }))
    }

    /// Where a block stays in a thread's second cache, its operations take less time than threads need to meet at each.
    fn in_lanes(weights: usize) -> bool {
        weights * size_of::<f32>() <= 1 << 20
    }

    fn replay(&self, _graph: &mut (), mut record: impl FnMut() -> Result<()>) -> Result<()> {
        record()
    }
}
