use super::{Linear, LinearBackward, LinearForward, LinearGradients, LinearWeights, Lora, check, check_gradients};
use crate::backend::cuda::driver::{DeviceInfo, LaunchConfig};
use crate::backend::cuda::kernels::{self, LoraParams};
use crate::backend::cuda::{Build, DeviceBuffer};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::product::cuda::{BLOCK_K, Extension, Layout, Operand, Output, Product, Tile};
use crate::ops::{Cost, expect};

/// Parts that the kernels know; q∣k∣v is the most that a block has.
const MAX_PARTS: usize = 3;

impl Linear for Cuda {
    fn linear_forward(&self, operands: LinearForward<Self>, residual: Option<&Tensor<Self>>) -> Result<()> {
        let LinearForward { y, xa, x, weights } = operands;
        check(y, xa, Some(x), &weights)?;
        let LinearWeights { w, bias, lora } = weights;
        let (t, n, k) = (x.rows(), w.rows(), w.cols());
        let input = Operand::of(x);
        if let Some(lora) = lora {
            let inner = Product::new(Layout::Along, [t, lora.width(), k], input, Operand::of(&lora.a));
            inner.run(self, "linear", Output::of(xa))?;
        }
        let extension = match lora {
            Some(lora) => Some(Extension { xa, b: &lora.b, rank: lora.rank, ends: ends(lora, n)? }),
            None => None,
        };
        let product = Product::new(Layout::Along, [t, n, k], input, Operand::of(w));
        Product { extension, bias, residual, ..product }.run(self, "linear", Output::of(y))
    }

    fn linear_backward(&self, operands: LinearBackward<Self>, dy: &Tensor<Self>) -> Result<()> {
        let LinearBackward { dx, dxa, weights } = operands;
        check(dy, dxa, dx.as_deref(), &weights)?;
        let LinearWeights { w, lora, .. } = weights;
        let (t, n, k) = (dy.rows(), w.rows(), w.cols());
        let upper = Operand::of(dy);
        let product = Product::new(Layout::Across, [t, k, n], upper, Operand::of(w));
        let run = |product: Product| dx.map_or(Ok(()), |dx| product.run(self, "linear", Output::of(dx)));
        let Some(lora) = lora else { return run(product) };
        let (stride, mut first) = (dxa.stride(), 0);
        for (p, &part) in lora.parts.iter().enumerate() {
            let b = Operand::of(&lora.b).from(first * lora.b.stride());
            let inner = Product::new(Layout::Across, [t, lora.rank, part], upper.from(first), b);
            inner.run(self, "linear", Output::Rounded { buffer: &mut dxa.buffer, first: p * lora.rank, stride })?;
            first += part;
        }
        let extension = Extension { xa: dxa, b: &lora.a, rank: lora.width(), ends: [k, k] };
        run(Product { extension: Some(extension), ..product })
    }

    fn linear_gradients(&self, operands: LinearGradients<Self>, dy: &Tensor<Self>) -> Result<()> {
        check_gradients(&operands, dy)?;
        let LinearGradients { grad, dxa, x, xa, lora } = operands;
        let (n, k) = (dy.cols(), x.cols());
        accumulate(self, &mut grad.da.buffer, dxa, x, lora.width(), [k, k], 1.0, false)?;
        accumulate(self, &mut grad.db.buffer, xa, dy, lora.rank, ends(lora, n)?, lora.scale, true)
    }
}

/// Where the first and the second part of `n` output features end.
fn ends(lora: &Lora<Cuda>, n: usize) -> Result<[usize; 2]> {
    expect("linear", "at most three parts", lora.parts.len() <= MAX_PARTS, true)?;
    let end = |count: usize| if lora.parts.len() <= count { n } else { lora.parts[..count].iter().sum() };
    Ok([end(1), end(2)])
}

/// The rank's tile: as wide as it must be, so that the wide operand is read once.
fn tile(width: usize) -> Tile {
    let rows = (width as u32).next_power_of_two().clamp(16, 64);
    // More sums per thread, fewer threads.
    let blocks_per_sm = if rows == 64 { 3 } else { 4 };
    Tile { block: [rows, 128], warps: [1, 4], blocks_per_sm, max_stages: 4 }
}

/// Each width of the rank's tile, whole chunks; one ragged.
pub(crate) fn builds() -> Vec<Build> {
    let mut builds = Vec::new();
    for (width, ragged) in [(16, false), (32, false), (64, false), (64, true)] {
        let tile = tile(width);
        for (stages, blocks) in tile.stage_counts() {
            let (threads, shared) = (tile.threads(), stages * tile.stage());
            let build = Build::new(&kernels::LORA, &tile.defines(stages, shared, ragged), threads);
            builds.push(build.with("lora_partial", threads, shared, blocks));
        }
    }
    builds
}

/// Rows of t that one block sums: a whole number of blocks along k, enough of them that a partial sum is worth its memory,
/// few enough that all multiprocessors have work.
fn slice(rows: usize, tiles: usize, tile: Tile, info: &DeviceInfo) -> usize {
    const LEAST: usize = 256;
    let wanted = (info.multiprocessors * tile.blocks_per_sm) as usize / tiles.max(1);
    rows.div_ceil(wanted.max(1)).max(LEAST).next_multiple_of(BLOCK_K as usize)
}

/// grad += scale·narrowᵀ·wide, (width, cols), or turned, (cols, width): then columns of part p meet columns p·width.. of
/// `narrow`.
fn accumulate(
    cuda: &Cuda,
    grad: &mut DeviceBuffer<f32>,
    narrow: &Tensor<Cuda>,
    wide: &Tensor<Cuda>,
    width: usize,
    ends: [usize; 2],
    scale: f32,
    turned: bool,
) -> Result<()> {
    let (rows, cols, count) = (wide.rows(), wide.cols(), width * wide.cols());
    let tile = tile(width);
    let stages = tile.stages(cuda.info().shared_per_block);
    let shared = stages * tile.stage();
    let parts = [ends[0], ends[1] - ends[0], cols - ends[1]];
    let across: usize = parts.iter().map(|part| part.div_ceil(tile.block[1] as usize)).sum();
    let down = width.div_ceil(tile.block[0] as usize);
    let slice = slice(rows, across * down, tile, cuda.info());
    let slices = rows.div_ceil(slice);
    let ragged = ![width, cols, ends[0], ends[1]].iter().all(|v| v % 8 == 0);
    let defines = tile.defines(stages, shared, ragged);
    let threads = tile.threads();
    let config =
        LaunchConfig { grid: [across as u32, down as u32, slices as u32], shared, ..LaunchConfig::linear(1, threads) };
    let (row_step, col_step) = if turned { (1, width) } else { (cols, 1) };
    let mut scratch = cuda.scratch(slices * count)?;
    let [t, in_all, sums] = [rows, narrow.cols() + cols, slices * count].map(|n| n as u64);
    cuda.charge(|| Cost { flops: 2 * t * count as u64, bytes: 2 * t * in_all + 4 * sums });
    let params = LoraParams {
        partial: &mut scratch,
        narrow: &narrow.buffer,
        wide: &wide.buffer,
        rows,
        width,
        cols,
        narrow_stride: narrow.stride(),
        wide_stride: wide.stride(),
        end_0: ends[0],
        end_1: ends[1],
        slice,
        row_step,
        col_step,
    };
    // SAFETY: `check` proved the shapes of both operands and of the gradient; the scratch holds every slice's sums.
    unsafe {
        kernels::lora_partial(cuda, &defines, config, &params)?;
        let config = LaunchConfig::linear((count as u32).div_ceil(threads), threads);
        cuda.charge(|| Cost { flops: sums, bytes: 4 * (sums + 2 * count as u64) });
        kernels::lora_sum(cuda, &defines, config, grad, params.partial, count, slices, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_fill_the_device_and_no_row_is_left() {
        let info = DeviceInfo::h200();
        for (rows, tiles) in [(1, 12), (257, 12), (16384, 12), (16384, 140), (16384, 5000)] {
            let slice = slice(rows, tiles, tile(16), &info);
            assert!(slice.is_multiple_of(BLOCK_K as usize) && slice >= 256);
            assert!(rows.div_ceil(slice) * tiles <= 132 * 4 + tiles);
        }
        assert_eq!(slice(16384, 12, tile(48), &info), 512);
        assert_eq!([tile(4), tile(48), tile(192)].map(|t| t.block[0]), [16, 64, 64]);
    }
}
