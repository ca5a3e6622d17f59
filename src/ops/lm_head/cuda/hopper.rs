//! The head's logits on sm_90a: `kernels/lm_head90.cu` in the place of `lm_head_logits`.

use super::Launch;
use crate::backend::cuda::driver::{Arch, LaunchConfig, MapSpec};
use crate::backend::cuda::kernels::{self, Head90Params, HeadParams};
use crate::backend::cuda::{Build, DeviceBuffer};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::product::cuda::{Layout, Plan90, Tile90};

/// Columns whose logits share a maximum: the same for any number of rows, as a row's bits rest on it.
pub(super) const COLUMNS: u32 = 256;

pub(super) fn builds() -> Vec<Build> {
    let tiles = Tile90::ALL.into_iter().filter(|tile| tile.block_n == COLUMNS);
    let build = |tile: Tile90| {
        let (threads, shared) = (tile.threads(), tile.shared());
        let build = Build::new(&kernels::LM_HEAD90, &tile.defines(Layout::Along), threads).only(Arch::Sm90a);
        build.with("lm_head90_logits", threads, shared, 1)
    };
    tiles.map(build).collect()
}

/// Whether the copy engine can take h and W, and the tile is worth it. Never a question of the number of rows.
pub(super) fn serves(cuda: &Cuda, h: &Tensor<Cuda>, w: &Tensor<Cuda>, softcap: Option<f32>) -> bool {
    let borders = [h.stride(), w.stride(), w.rows(), w.cols()];
    cuda.tier() == Arch::Sm90a
        && softcap.is_none()
        && w.rows() >= 64
        && w.cols() >= 64
        && borders.iter().all(|border| border % 8 == 0)
}

/// The first step of a chunk, of `params.rows` rows from `params.first` on.
///
/// # Safety
/// As of the kernel whose place it takes: the parameters are within their buffers.
pub(super) unsafe fn logits(
    cuda: &Cuda,
    launch: &Launch,
    params: &mut HeadParams,
    [h, w]: [&Tensor<Cuda>; 2],
    targets: &DeviceBuffer<u32>,
) -> Result<()> {
    let HeadParams { first, rows, vocab, cols, tiles, chunk_stride, h_stride, w_stride, .. } = *params;
    let plan = Plan90::of_columns(COLUMNS, [rows, vocab, cols], cuda.info());
    let tile = plan.tile;
    let map = |what, address, rows, cols, stride, box_rows| {
        cuda.driver().tensor_map(&MapSpec { what, address, rows, cols, stride, box_rows })
    };
    let [block_m, _] = tile.block();
    let chunk = map("logits", params.chunk.address(), rows, vocab, chunk_stride, Tile90::WARP_ROWS)?;
    let h = map("h", h.buffer.address() + 2 * (first * h_stride) as u64, rows, cols, h_stride, block_m)?;
    let w = map("w", w.buffer.address(), vocab, cols, w_stride, COLUMNS / tile.cluster())?;
    let config = LaunchConfig::linear(plan.clusters * tile.cluster(), tile.threads());
    let config = config.with_shared(tile.shared()).with_cluster(tile.cluster());
    // All rows of the chunk meet one tile of W before the next: W is read once.
    let [down, _] = tile.tiles(rows, vocab);
    let params = Head90Params { stats: params.stats, targets, first, rows, vocab, cols, tiles, raster: down as usize };
    let defines = tile.defines(Layout::Along);
    cuda.charge(|| launch.steps[0].2);
    // SAFETY: the caller's promise.
    unsafe { kernels::lm_head90_logits(cuda, &defines, config, &chunk, &h, &w, &params) }
}
