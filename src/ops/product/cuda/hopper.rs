//! Products on sm_90a: which tile and how many stages for `kernels/product90.cu`.

use half::bf16;

use super::{Extension, Layout, Output, Product};
use crate::backend::Cuda;
use crate::backend::cuda::driver::{Arch, Define, DeviceInfo, LaunchConfig, MapSpec, TensorMap};
use crate::backend::cuda::kernels::{self, Product90Params};
use crate::backend::cuda::{Build, DeviceBuffer};
use crate::error::Result;

/// Elements of k in a stage: the columns of a box.
const BLOCK_K: u32 = MapSpec::BOX_COLS;
/// Rows of a consumer, a warpgroup of threads, and of each of its four warps.
const CONSUMER_ROWS: u32 = 64;
/// Of a block, bytes.
const SHARED: u32 = 227 << 10;
/// LoRA's columns that one block along k holds. Along, a part has one; across, there are as many as it takes.
const MAX_RANK: usize = BLOCK_K as usize;

/// What a block of threads computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile90 {
    pub(crate) consumers: u32,
    pub(crate) block_n: u32,
}

impl Tile90 {
    pub(crate) const WARP_ROWS: u32 = 16;
    pub(crate) const ALL: [Tile90; 6] = [
        Tile90 { consumers: 2, block_n: 256 },
        Tile90 { consumers: 2, block_n: 192 },
        Tile90 { consumers: 2, block_n: 128 },
        Tile90 { consumers: 1, block_n: 256 },
        Tile90 { consumers: 1, block_n: 192 },
        Tile90 { consumers: 1, block_n: 128 },
    ];

    pub(crate) fn block(self) -> [u32; 2] {
        [self.block_m(), self.block_n]
    }

    fn block_m(self) -> u32 {
        CONSUMER_ROWS * self.consumers
    }

    /// Clock cycles of a product: its waves, each as long as its tensor cores take at 97 % of what they can (4096 additions and
    /// multiplications per cycle and multiprocessor), and what is not hidden of a tile's results.
    pub(super) fn cycles(self, [m, n, k]: [usize; 3], rank: usize, info: &DeviceInfo) -> f64 {
        let steps = (k.div_ceil(16) + rank.div_ceil(16)) as f64;
        let tile = f64::from(self.block_m() * self.block_n) / 128.0 * steps / 0.97 + 700.0;
        let blocks = self.tiles(m, n).iter().product::<u32>() * self.cluster();
        f64::from(blocks.div_ceil(info.multiprocessors)) * tile
    }

    /// Blocks that have tiles below each other and share what they load of the right operand.
    pub(crate) fn cluster(self) -> u32 {
        self.consumers
    }

    pub(crate) fn threads(self) -> u32 {
        128 * (1 + self.consumers)
    }

    /// Of m × n results, in tiles of a cluster: down and to the right.
    pub(crate) fn tiles(self, m: usize, n: usize) -> [u32; 2] {
        [m.div_ceil((self.block_m() * self.cluster()) as usize) as u32, n.div_ceil(self.block_n as usize) as u32]
    }

    fn stage(self) -> u32 {
        2 * BLOCK_K * (self.block_m() + self.block_n)
    }

    /// As many as fit beside the results, at most six.
    fn stages(self) -> u32 {
        ((SHARED - self.results()) / (self.stage() + 16)).min(6)
    }

    fn results(self) -> u32 {
        2 * self.block_m() * self.block_n + 8 * self.block_m() / Tile90::WARP_ROWS
    }

    /// The stages with two barriers each, the results, and a barrier for each warp that computes them.
    pub(crate) fn shared(self) -> u32 {
        self.stages() * (self.stage() + 16) + self.results()
    }

    pub(crate) fn defines(self, layout: Layout) -> Vec<Define> {
        let numbers = [
            ("BLOCK_N", self.block_n),
            ("CONSUMERS", self.consumers),
            ("CLUSTER", self.cluster()),
            ("STAGES", self.stages()),
            ("SHARED_BYTES", self.shared()),
            ("W_ACROSS", u32::from(layout == Layout::Across)),
        ];
        numbers.into_iter().map(|(name, number)| (name, u64::from(number))).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan90 {
    pub(crate) tile: Tile90,
    /// Of as many blocks as `tile.cluster()`; each takes tiles as long as there are some.
    pub(crate) clusters: u32,
    /// A cluster's tiles that are walked downwards before the next to the right.
    pub(crate) raster: u32,
}

/// The columns of a tile follow n alone, so that a row's bits do not depend on how many rows there are; its rows and its order follow
/// m as well.
pub(crate) fn plan([m, n, _]: [usize; 3], info: &DeviceInfo) -> Plan90 {
    let block_n = match n {
        n if n % 256 == 0 || n >= 4096 => 256,
        n if n % 192 == 0 => 192,
        _ => 128,
    };
    Plan90::of_columns(block_n, [m, n, 0], info)
}

impl Plan90 {
    /// The columns of a tile are given.
    pub(crate) fn of_columns(block_n: u32, [m, n, k]: [usize; 3], info: &DeviceInfo) -> Plan90 {
        let [large, small] = [2, 1].map(|consumers| Tile90 { consumers, block_n });
        // With few rows it is better that all multiprocessors have some.
        let tile = if large.tiles(m, n)[0] * large.tiles(m, n)[1] * large.cluster() < info.multiprocessors {
            small
        } else {
            large
        };
        Plan90::of(tile, [m, n, k], info)
    }

    pub(super) fn of(tile: Tile90, [m, n, _]: [usize; 3], info: &DeviceInfo) -> Plan90 {
        let [down, right] = tile.tiles(m, n);
        // Where all columns fit side by side their part of the right operand stays in use; else about a square is at work.
        let raster = if right < 9 { 1 } else { 8.min(down).max(1) };
        Plan90 { tile, clusters: (down * right).min(info.multiprocessors / tile.cluster()), raster }
    }
}

/// All tiles, both ways.
pub(super) fn builds() -> Vec<Build> {
    let mut builds = Vec::new();
    for tile in Tile90::ALL {
        for layout in [Layout::Along, Layout::Across] {
            let build = Build::new(&kernels::PRODUCT90, &tile.defines(layout), tile.threads());
            builds.push(build.with("product90", tile.threads(), tile.shared(), 1).only(Arch::Sm90a));
        }
    }
    builds
}

/// Whether an adapter of this rank can ride along.
pub(super) fn carries(layout: Layout, rank: usize) -> bool {
    layout == Layout::Across || rank <= MAX_RANK
}

/// Whether the copy engine can take every operand, and the tensor cores' 64 rows and columns are filled. Never a question of m: a row's
/// bits may not depend on it.
pub(super) fn serves(product: &Product, y: &Output) -> bool {
    let [_, n, k] = product.shape;
    let (first, stride) = match y {
        Output::Rounded { first, stride, .. } => (*first, *stride),
        Output::Wide(_) if product.residual.is_some() => return false,
        Output::Wide(_) => (0, 0),
    };
    let (rank, xa_stride, b_stride) = product.extension.map_or((0, 0, 0), |e| (e.rank, e.xa.stride(), e.b.stride()));
    let [x, w] = [product.x, product.w];
    let borders = [x.first, x.stride, w.first, w.stride, first, stride, xa_stride, b_stride, n, k];
    n >= 64 && k >= 64 && carries(product.layout, rank) && borders.iter().all(|border| border % 8 == 0)
}

/// Every operand was checked to lie inside its buffer.
pub(super) fn launch(product: &Product, cuda: &Cuda, y: Output, plan: Plan90) -> Result<()> {
    let Product { layout, shape: [m, n, k], x, w, extension, bias, residual } = *product;
    if m == 0 {
        cuda.charge(Default::default);
        return Ok(());
    }
    let Plan90 { tile, clusters, raster } = plan;
    let (block_m, across) = (tile.block_m(), layout == Layout::Across);
    let right_rows = if across { BLOCK_K } else { tile.block_n } / tile.cluster();
    let map = |what, buffer: &DeviceBuffer<bf16>, first: usize, stride: usize, rows, cols, box_rows| {
        let address = buffer.address() + 2 * first as u64;
        cuda.driver().tensor_map(&MapSpec { what, address, rows, cols, stride, box_rows })
    };
    let x_map = map("x", x.buffer, x.first, x.stride, m, k, block_m)?;
    let (w_rows, w_cols) = if across { (k, n) } else { (n, k) };
    let w_map = map("w", w.buffer, w.first, w.stride, w_rows, w_cols, right_rows)?;
    let (y_map, wide) = match y {
        Output::Rounded { buffer, first, stride } => (map("y", buffer, first, stride, m, n, Tile90::WARP_ROWS)?, None),
        Output::Wide(buffer) => (x_map, Some(buffer)),
    };
    let residual_map = match residual {
        Some(residual) => map("residual", &residual.buffer, 0, residual.stride(), m, n, Tile90::WARP_ROWS)?,
        None => x_map,
    };
    let (mut xa_map, mut b_maps, mut rank, mut ends) = (x_map, [w_map; 3], 0, [n, n]);
    if let Some(Extension { xa, b, rank: own, ends: own_ends }) = extension {
        (rank, ends) = (own, own_ends);
        xa_map = map("xa", &xa.buffer, 0, xa.stride(), m, xa.cols(), block_m)?;
        // One map per part: outside of a part's rows the copy engine gives zeros.
        let b_map =
            |first: usize, rows, cols| map("b", &b.buffer, first * b.stride(), b.stride(), rows, cols, right_rows);
        let begins = [0, ends[0], ends[1], n];
        b_maps = [if across { b_map(0, rank, n)? } else { b_map(0, begins[1], rank)? }; 3];
        for part in 1..3 {
            if !across && begins[part] < begins[part + 1] {
                b_maps[part] = b_map(begins[part], begins[part + 1] - begins[part], rank)?;
            }
        }
    }
    let config = LaunchConfig::linear(clusters * tile.cluster(), tile.threads());
    let config = config.with_shared(tile.shared()).with_cluster(tile.cluster());
    let params = Product90Params {
        wide,
        bias: bias.map(|bias| &bias.buffer),
        residual: residual.is_some().into(),
        m,
        n,
        k,
        rank,
        end_0: ends[0],
        end_1: ends[1],
        raster: raster as usize,
    };
    let [b_0, b_1, b_2]: &[TensorMap; 3] = &b_maps;
    // SAFETY: `Product::launch` proved that every operand lies within its buffer, which the maps are made from.
    unsafe {
        kernels::product90(
            cuda,
            &tile.defines(layout),
            config,
            &y_map,
            &x_map,
            &w_map,
            &residual_map,
            &xa_map,
            b_0,
            b_1,
            b_2,
            &params,
        )
    }
}

#[cfg(test)]
mod tests;
