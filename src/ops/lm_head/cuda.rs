mod hopper;

use super::{LmHead, LmHeadForward, LmHeadKl, check_forward, check_kl};
use crate::backend::cuda::driver::{Define, DeviceInfo, LaunchConfig};
use crate::backend::cuda::kernels::{self, HeadParams};
use crate::backend::cuda::{Build, DeviceBuffer};
use crate::backend::{Backend, Cuda, Tensor};
use crate::error::Result;
use crate::ops::Cost;
use crate::ops::product::cuda::{Layout, Operand, Output, Product, TILES, Tile, fastest};

/// Columns whose logits share a maximum: part of what defines a row's bits, so the same for every tile.
const COLUMNS: u32 = 128;
const HEAD_TILES: [Tile; 2] = [
    Tile { block: [128, COLUMNS], warps: [2, 2], blocks_per_sm: 2, max_stages: 4 },
    Tile { block: [32, COLUMNS], warps: [1, 2], blocks_per_sm: 3, max_stages: 4 },
];

/// Floats per row and tile of columns: of one model (m, s), of two (m, s, m0, s0, Σ e0·(l − l0)).
const STATS: usize = 2;
const KL_STATS: usize = 5;

/// Bytes of a chunk of logits at most, and rows that are enough for any product.
const CHUNK_BYTES: usize = 700_000_000;
const CHUNK_ROWS: usize = 4096;

/// Both tiles, of whole chunks and ragged.
pub(crate) fn builds() -> Vec<Build> {
    let mut builds = Vec::new();
    for (tile, ragged) in HEAD_TILES.into_iter().flat_map(|tile| [(tile, false), (tile, true)]) {
        for (stages, blocks) in tile.stage_counts() {
            let (threads, shared) = (tile.threads(), shared(tile, stages));
            let build = Build::new(&kernels::LM_HEAD, &tile.defines(stages, shared, ragged), threads);
            let build = build.with("lm_head_logits", threads, shared, blocks);
            builds.push(build.with("lm_head_kl_logits", threads, shared, blocks));
        }
    }
    builds.extend(hopper::builds());
    builds
}

/// Shared memory of a block: the stages, or in their place the rounded tile and three numbers per row and warp column.
fn shared(tile: Tile, stages: u32) -> u32 {
    let [m, n] = tile.block;
    (stages * tile.stage()).max(2 * m * n + 3 * 4 * tile.warps[1] * m)
}

/// How one chunk is computed: logits, what each row is, the gradient in place of the logits.
struct Launch {
    defines: Vec<Define>,
    steps: [(Kernel, LaunchConfig, Cost); 3],
    /// Tiles of columns, and how many each has: a power of two.
    tiles: usize,
    columns: u32,
    /// Floats of scratch.
    scratch: usize,
}

impl Launch {
    /// For one model's logits or two, with which every row stands in the tile twice.
    fn new(rows: usize, models: usize, sizes: [usize; 2], info: &DeviceInfo) -> Launch {
        Launch::of_columns(COLUMNS, rows, models, sizes, info)
    }

    /// With statistics of tiles of so many columns.
    fn of_columns(columns: u32, rows: usize, models: usize, [vocab, cols]: [usize; 2], info: &DeviceInfo) -> Launch {
        let height = models * rows;
        let tile = fastest(&HEAD_TILES, [height, vocab, cols], info).0;
        let stages = tile.stages(info.shared_per_block);
        let (threads, shared) = (tile.threads(), shared(tile, stages));
        let tiles = vocab.div_ceil(columns as usize);
        let blocks = height.div_ceil(tile.block[0] as usize) * vocab.div_ceil(COLUMNS as usize);
        let ragged = !(vocab.is_multiple_of(8) && cols.is_multiple_of(8));
        let (kernels, stats) = if models == 1 { (ONE_MODEL, STATS) } else { (TWO_MODELS, KL_STATS) };
        let [logits, combine, gradient] = costs([rows, vocab, cols, tiles, stats, models]);
        // The second has a warp for a row, the third a block.
        let steps = [
            (kernels[0], LaunchConfig::linear(blocks as u32, threads).with_shared(shared), logits),
            (kernels[1], LaunchConfig::linear((rows as u32).div_ceil(threads / 32), threads), combine),
            (kernels[2], LaunchConfig::linear(rows as u32, threads), gradient),
        ];
        Launch {
            defines: tile.defines(stages, shared, ragged),
            steps,
            tiles,
            columns,
            scratch: rows * (tiles * stats + models),
        }
    }

    /// Of rows first..first + count; what one or two models need besides is null.
    fn params<'a>(
        &self,
        chunk: &'a mut Tensor<Cuda>,
        stats: &'a mut DeviceBuffer<f32>,
        h: &'a Tensor<Cuda>,
        w: &'a Tensor<Cuda>,
        first: usize,
        count: usize,
    ) -> HeadParams<'a> {
        HeadParams {
            chunk_stride: chunk.stride(),
            chunk: &mut chunk.buffer,
            stats,
            h: &h.buffer,
            w: &w.buffer,
            targets: None,
            logprob: None,
            lse: None,
            log_rest: None,
            h0: None,
            chunk0: None,
            kl: None,
            first,
            rows: count,
            vocab: w.rows(),
            cols: w.cols(),
            tiles: self.tiles,
            tile_shift: self.columns.ilog2() as usize,
            h_stride: h.stride(),
            w_stride: w.stride(),
            softcap: 0.0,
        }
    }

    /// The steps from `begin` on, or all of these but the gradient.
    ///
    /// # Safety
    /// Those of `kernels`.
    unsafe fn run(&self, cuda: &Cuda, params: &HeadParams, begin: usize, gradient: bool) -> Result<()> {
        for (kernel, config, cost) in &self.steps[begin..if gradient { 3 } else { 2 }] {
            cuda.charge(|| *cost);
            // SAFETY: the caller's promise.
            unsafe { kernel(cuda, &self.defines, *config, params)? };
        }
        Ok(())
    }
}

type Kernel = unsafe fn(&Cuda, &[Define], LaunchConfig, &HeadParams<'_>) -> Result<()>;

const ONE_MODEL: [Kernel; 3] = [kernels::lm_head_logits, kernels::lm_head_combine, kernels::lm_head_gradient];
const TWO_MODELS: [Kernel; 3] = [kernels::lm_head_kl_logits, kernels::lm_head_kl_combine, kernels::lm_head_kl_gradient];

/// Rows of each chunk, at most `capacity`: as many as let the second product, (rows, V)·(V, C), fill its waves best.
fn chunk_rows(rows: usize, capacity: usize, vocab: usize, cols: usize, info: &DeviceInfo) -> usize {
    if rows <= capacity {
        return rows.max(1);
    }
    let each = |rows: usize| fastest(&TILES, [rows, cols, vocab], info).1 / rows as f64;
    let candidates = (1..=capacity / 128).map(|blocks| blocks * 128);
    candidates.fold(capacity, |best, rows| if each(rows) <= each(best) { rows } else { best })
}

/// What the kernels of one chunk are charged, for one model's logits or `models` = 2: the product; per-row statistics of `stats`
/// numbers and tile; the logits turned into a gradient.
fn costs(sizes: [usize; 6]) -> [Cost; 3] {
    let [rows, vocab, cols, tiles, stats, models] = sizes.map(|n| n as u64);
    let (logits, numbers) = (models * rows * vocab, rows * tiles * stats);
    let product =
        Cost { flops: 2 * logits * cols, bytes: 2 * (models * rows * cols + vocab * cols + logits) + 4 * numbers };
    let combine = Cost { flops: 2 * numbers, bytes: 4 * (numbers + 3 * rows) };
    [product, combine, Cost { flops: 4 * logits, bytes: 2 * (logits + rows * vocab) }]
}

/// dh = dlogits·W for the chunk's rows.
fn back(
    cuda: &Cuda,
    dh: &mut Tensor<Cuda>,
    chunk: &Tensor<Cuda>,
    w: &Tensor<Cuda>,
    first: usize,
    count: usize,
) -> Result<()> {
    let (stride, shape) = (dh.stride(), [count, w.cols(), w.rows()]);
    let product = Product::new(Layout::Across, shape, Operand::of(chunk), Operand::of(w));
    product.run(cuda, "lm_head", Output::Rounded { buffer: &mut dh.buffer, first: first * stride, stride })
}

impl LmHead for Cuda {
    fn lm_head_chunk(vocab: usize) -> usize {
        let rows = CHUNK_BYTES / (2 * Cuda::stride::<half::bf16>(vocab.max(1)));
        (rows / 128 * 128).clamp(128, CHUNK_ROWS)
    }

    fn lm_head_forward(&self, operands: LmHeadForward<Self>) -> Result<()> {
        let [rows, vocab, cols] = check_forward(&operands)?;
        let LmHeadForward { out, mut dh, chunk, h, targets, w, softcap } = operands;
        let size = chunk_rows(rows, chunk.capacity(), vocab, cols, self.info());
        let on_hopper = hopper::serves(self, h, w, softcap);
        let columns = if on_hopper { hopper::COLUMNS } else { COLUMNS };
        for first in (0..rows).step_by(size) {
            let count = size.min(rows - first);
            let launch = Launch::of_columns(columns, count, 1, [vocab, cols], self.info());
            let mut scratch = self.scratch(launch.scratch)?;
            let mut params = HeadParams {
                targets: Some(&targets.buffer),
                logprob: Some(&mut out.logprob.buffer),
                lse: Some(&mut out.lse.buffer),
                log_rest: Some(&mut out.log_rest.buffer),
                softcap: softcap.unwrap_or(0.0),
                ..launch.params(chunk, &mut scratch, h, w, first, count)
            };
            // SAFETY: `check_forward` proved h, W, targets and outputs; `count` rows fit the chunk, and the
            // scratch was sized for them.
            unsafe {
                if on_hopper {
                    hopper::logits(self, &launch, &mut params, [h, w], &targets.buffer)?;
                }
                launch.run(self, &params, usize::from(on_hopper), dh.is_some())?;
            }
            if let Some(dh) = &mut dh {
                back(self, dh, chunk, w, first, count)?;
            }
        }
        Ok(())
    }

    fn lm_head_kl(&self, operands: LmHeadKl<Self>) -> Result<()> {
        let [rows, vocab, cols] = check_kl(&operands)?;
        let LmHeadKl { kl, dh, chunk, chunk0, h, h0, w, softcap } = operands;
        let size = chunk_rows(rows, chunk.capacity().min(chunk0.capacity()), vocab, cols, self.info());
        for first in (0..rows).step_by(size) {
            let count = size.min(rows - first);
            let launch = Launch::new(count, 2, [vocab, cols], self.info());
            let mut scratch = self.scratch(launch.scratch)?;
            let params = HeadParams {
                h0: Some(&h0.buffer),
                chunk0: Some(&mut chunk0.buffer),
                kl: Some(&mut kl.buffer),
                softcap: softcap.unwrap_or(0.0),
                ..launch.params(chunk, &mut scratch, h, w, first, count)
            };
            // SAFETY: as in `lm_head_forward`; h0 has h's shape and chunk0 chunk's stride.
            unsafe { launch.run(self, &params, 0, true)? };
            back(self, dh, chunk, w, first, count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `parity_of_the_large_tile` in tests/ops rests on.
    #[test]
    fn one_multiprocessor_takes_the_large_tile() {
        for shared_per_block in [99 << 10, 163 << 10, 227 << 10] {
            let info = DeviceInfo { multiprocessors: 1, shared_per_block, ..DeviceInfo::h200() };
            for (rows, sizes, models) in
                [(150, [136, 136], 1), (150, [136, 136], 2), (140, [301, 133], 1), (140, [301, 133], 2)]
            {
                let (_, logits, _) = Launch::new(rows, models, sizes, &info).steps[0];
                assert_eq!(logits.block, [HEAD_TILES[0].threads(), 1, 1], "{sizes:?}, models {models}");
            }
        }
    }

    #[test]
    fn chunks_stay_below_their_bytes_and_fill_waves() {
        let info = DeviceInfo::h200();
        let rows = Cuda::lm_head_chunk(151_936);
        assert!(rows % 128 == 0 && rows * 151_936 * 2 <= CHUNK_BYTES && rows >= 2048, "{rows}");
        assert_eq!(chunk_rows(100, rows, 151_936, 1536, &info), 100);
        assert_eq!(chunk_rows(5000, 130, 151_936, 1536, &info), 128);
        // 11 x 12 tiles are one wave of 132 multiprocessors.
        for (cols, least) in [(1536, 0.95), (4096, 0.95), (896, 0.6)] {
            let chosen = chunk_rows(100_000, rows, 151_936, cols, &info);
            let tiles = chosen.div_ceil(128) * cols.div_ceil(128);
            let filled = tiles as f64 / (tiles.div_ceil(132) * 132) as f64;
            assert!(chosen <= rows && filled >= least, "{cols}: {chosen} rows fill {filled}");
        }
    }
}
