use bytemuck::{Pod, Zeroable};

use super::{AdamW, AdamWSpec, Parameter, check, cost};
use crate::backend::cuda::Build;
use crate::backend::cuda::driver::{Define, LaunchConfig};
use crate::backend::cuda::kernels::{self, AdamWParams};
use crate::backend::{Backend, Cuda, Tensor};
use crate::error::Result;
use crate::ops::{Cost, expect};

const THREADS: u32 = 256;
/// Values of a block: 16 per thread hide the latency of four streams.
const CHUNK: u32 = 4096;
/// One partial sum per warp.
const SHARED: u32 = THREADS / 32 * 4;
const DEFINES: &[Define] = &[("THREADS", THREADS as u64), ("CHUNK", CHUNK as u64), ("SHARED_BYTES", SHARED as u64)];

pub(crate) fn builds() -> Vec<Build> {
    let build = Build::new(&kernels::ADAMW, DEFINES, THREADS);
    vec![build.with("gradient_squares", THREADS, SHARED, 1).with("gradient_norm", 32, 0, 1)]
}

/// One parameter as the kernels read it: `struct Entry` of `kernels/adamw.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    master: u64,
    m: u64,
    v: u64,
    grad: u64,
    operand: u64,
    first_block: u32,
    len: u32,
    cols: u32,
    operand_stride: u32,
    factor: f32,
    unused: u32,
}

const _: () = assert!(size_of::<Entry>() == 64 && std::mem::offset_of!(Entry, first_block) == 40);
/// Words of an entry.
const WORDS: usize = size_of::<Entry>() / 4;

fn blocks(len: usize) -> u32 {
    (len as u32).div_ceil(CHUNK)
}

/// The table of all parameters, and how many blocks they take.
fn table(parameters: &[Parameter<'_, Cuda>]) -> (Vec<Entry>, u32) {
    let mut first_block = 0;
    let mut entries = Vec::with_capacity(parameters.len());
    for p in parameters {
        let (rows, cols) = p.master.shape();
        if rows * cols == 0 {
            continue;
        }
        let (operand, operand_stride, factor) = match &p.operand {
            Some((operand, factor)) => (operand.buffer.address(), operand.stride() as u32, *factor),
            None => (0, 0, 1.0),
        };
        entries.push(Entry {
            master: p.master.buffer.address(),
            m: p.m.buffer.address(),
            v: p.v.buffer.address(),
            grad: p.grad.buffer.address(),
            operand,
            first_block,
            len: (rows * cols) as u32,
            cols: cols as u32,
            operand_stride,
            factor,
            unused: 0,
        });
        first_block += blocks(rows * cols);
    }
    (entries, first_block)
}

impl AdamW for Cuda {
    fn adamw(&self, norm: &mut Tensor<Self, f32>, parameters: &mut [Parameter<Self>], spec: AdamWSpec) -> Result<()> {
        check(parameters)?;
        let (entries, blocks) = table(parameters);
        let words: &[u32] = bytemuck::cast_slice(&entries);
        let mut tables = self.table(entries.len() * WORDS)?;
        self.upload(&mut tables, 0, words)?;
        let mut scratch = self.scratch(blocks as usize)?;
        let (table, partial) = (&*tables, &mut *scratch);
        let each = LaunchConfig::linear(blocks, THREADS).with_shared(SHARED);
        let correct1 = 1.0 / (1.0 - spec.beta1.powi(spec.step as i32));
        let correct2 = 1.0 / (1.0 - spec.beta2.powi(spec.step as i32));
        let AdamWSpec { lr, beta1, beta2, eps, decay, clip, .. } = spec;
        let params = AdamWParams { lr, beta1, beta2, eps, decay, clip, correct1, correct2 };
        let values = entries.iter().map(|entry| u64::from(entry.len)).sum();
        // Each gradient is squared and added.
        let squares = Cost { flops: 2 * values, bytes: 4 * values };
        self.charge(|| squares);
        // SAFETY: `check` proved equal shapes, and `table` knows every length; one partial sum per block was just allocated.
        unsafe {
            kernels::gradient_squares(self, DEFINES, each, partial, table, entries.len())?;
            let norm = &mut norm.buffer;
            kernels::gradient_norm(self, DEFINES, LaunchConfig::linear(1, 32), norm, partial, blocks as usize)?;
            let each = LaunchConfig::linear(blocks, THREADS);
            let Cost { flops, bytes } = cost(values, 2);
            self.charge(|| Cost { flops: flops - squares.flops, bytes: bytes - squares.bytes });
            kernels::adamw(self, DEFINES, each, table, norm, entries.len(), &params)
        }
    }

    fn write_operand(&self, operand: &mut Tensor<Self>, master: &Tensor<Self, f32>, factor: f32) -> Result<()> {
        expect("adamw", "operand", operand.shape(), master.shape())?;
        let (rows, cols) = master.shape();
        let (len, stride) = (rows * cols, operand.stride());
        let config = LaunchConfig::linear((len as u32).div_ceil(THREADS), THREADS);
        let (operand, master) = (&mut operand.buffer, &master.buffer);
        self.charge(|| Cost { flops: len as u64, bytes: 6 * len as u64 });
        // SAFETY: equal shapes were just proved.
        unsafe { kernels::write_operand(self, DEFINES, config, operand, master, len, cols, stride, factor) }
    }
}
