//! Matrix products on a GPU: which tile, how many stages, in which order; `kernels/product.cu` does the rest. On Hopper, where it is
//! asked for, `hopper.rs` and `kernels/product90.cu`.

mod hopper;
mod way;

pub(crate) use hopper::{Plan90, Tile90};
pub(crate) use way::Way;

use half::bf16;

use crate::backend::cuda::driver::{Arch, Define, DeviceInfo, LaunchConfig};
use crate::backend::cuda::kernels::{self, ProductParams};
use crate::backend::cuda::{Build, DeviceBuffer};
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::ops::{Cost, expect};

/// Elements of k that lie in shared memory at a time, in every tile: two steps of the tensor cores.
pub(crate) const BLOCK_K: u32 = 32;

/// What one block computes, and with how many warps. All tiles sum in the same order, so which one is taken shows in the time
/// alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) block: [u32; 2],
    pub(crate) warps: [u32; 2],
    /// Blocks that registers and shared memory of one multiprocessor must hold.
    pub(crate) blocks_per_sm: u32,
    pub(crate) max_stages: u32,
}

/// From the one that moves the fewest bytes per multiplication to those that spread a few rows over all multiprocessors.
pub(crate) const TILES: [Tile; 4] = [
    Tile { block: [128, 128], warps: [2, 2], blocks_per_sm: 2, max_stages: 4 },
    Tile { block: [64, 64], warps: [2, 2], blocks_per_sm: 4, max_stages: 6 },
    Tile { block: [64, 32], warps: [2, 2], blocks_per_sm: 4, max_stages: 8 },
    Tile { block: [16, 32], warps: [1, 2], blocks_per_sm: 8, max_stages: 8 },
];

impl Tile {
    pub(crate) fn threads(&self) -> u32 {
        32 * self.warps[0] * self.warps[1]
    }

    /// Bytes of both operands' blocks along k.
    pub(crate) fn stage(&self) -> u32 {
        2 * BLOCK_K * (self.block[0] + self.block[1])
    }

    /// As many as `blocks_per_sm` blocks find room for where a block may use `shared_per_block` bytes. A multiprocessor has
    /// 1 KB more than that, and each block costs 1 KB.
    pub(crate) fn stages(&self, shared_per_block: u32) -> u32 {
        let each = (shared_per_block + 1024) / self.blocks_per_sm - 1024;
        (each / self.stage()).clamp(2, self.max_stages)
    }

    /// What the smallest and the largest devices take, each with the blocks that the smallest must hold.
    pub(crate) fn stage_counts(&self) -> [(u32, u32); 2] {
        [(self.stages(99 << 10), self.blocks_per_sm), (self.max_stages, 1)]
    }

    /// The constants of `tile.cuh`.
    pub(crate) fn defines(&self, stages: u32, shared: u32, ragged: bool) -> Vec<Define> {
        let numbers = [
            ("BLOCK_M", self.block[0]),
            ("BLOCK_N", self.block[1]),
            ("BLOCK_K", BLOCK_K),
            ("WARPS_M", self.warps[0]),
            ("WARPS_N", self.warps[1]),
            ("STAGES", stages),
            ("BLOCKS_PER_SM", self.blocks_per_sm),
            ("SHARED_BYTES", shared),
            ("RAGGED", u32::from(ragged)),
        ];
        numbers.into_iter().map(|(name, number)| (name, u64::from(number))).collect()
    }

    /// Clock cycles of an m × n × k product, roughly: what ranks tiles, not a prediction.
    fn clocks(&self, [m, n, k]: [usize; 3], info: &DeviceInfo) -> f64 {
        /// Multiplications and additions per clock that mma.sync reaches on a multiprocessor, and bytes that it draws from L2.
        const FLOPS: f64 = 2048.0;
        const BYTES: f64 = 40.0;
        /// From asking memory for a block until it lies in shared memory, and from barrier to barrier at least.
        const LATENCY: f64 = 1200.0;
        const BARRIER: f64 = 100.0;
        let [bm, bn] = self.block.map(f64::from);
        let work = (2.0 * bm * bn * f64::from(BLOCK_K) / FLOPS).max(f64::from(self.stage()) / BYTES);
        let least = (LATENCY / f64::from(self.stages(info.shared_per_block) - 1)).max(BARRIER);
        // A tenth of what is hidden still counts: of two tiles that wait for memory the smaller is better.
        let wave = |resident: f64| least.max(resident * work) + 0.1 * resident * work;
        let blocks = m.div_ceil(self.block[0] as usize) * n.div_ceil(self.block[1] as usize);
        let sms = info.multiprocessors.max(1) as usize;
        let full = sms * self.blocks_per_sm as usize;
        let rest = (blocks % full).div_ceil(sms);
        let waves = (blocks / full) as f64 * wave(f64::from(self.blocks_per_sm));
        let last = if rest > 0 { wave(rest as f64) } else { 0.0 };
        (waves + last) * k.div_ceil(BLOCK_K as usize) as f64
    }
}

/// Every tile, both ways, of whole chunks and ragged, as a vocabulary that is no multiple of 8 makes the head's.
pub(crate) fn builds() -> Vec<Build> {
    let mut builds = Vec::new();
    for (tile, layout) in TILES.into_iter().flat_map(|tile| [(tile, Layout::Along), (tile, Layout::Across)]) {
        for (stages, blocks) in tile.stage_counts() {
            for ragged in [false, true] {
                let plan = Plan { tile, stages, blocks: 1, raster: 1 };
                let (threads, shared) = (tile.threads(), plan.shared());
                let build = Build::new(&kernels::PRODUCT, &plan.defines(layout, ragged), threads);
                builds.push(build.with("product", threads, shared, blocks));
            }
        }
    }
    builds.extend(hopper::builds());
    builds
}

/// How one product is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) tile: Tile,
    pub(crate) stages: u32,
    pub(crate) blocks: u32,
    /// Tiles that are walked downwards before the next to the right.
    pub(crate) raster: u32,
}

impl Plan {
    /// Shared memory of a block: the stages, or in their place the rounded tile.
    fn shared(&self) -> u32 {
        let [m, n] = self.tile.block;
        (self.stages * self.tile.stage()).max(2 * m * n)
    }

    fn defines(&self, layout: Layout, ragged: bool) -> Vec<Define> {
        let mut defines = self.tile.defines(self.stages, self.shared(), ragged);
        defines.push(("W_ACROSS", u64::from(layout == Layout::Across)));
        defines
    }
}

/// Tile and order for m × n results over k. Never a split of k: a row's bits may not depend on the number of rows.
pub(crate) fn plan(shape: [usize; 3], info: &DeviceInfo) -> Plan {
    raster(fastest(&TILES, shape, info).0, shape, info)
}

/// The tile that takes the fewest clocks, the first of equals, and the clocks.
pub(crate) fn fastest<const N: usize>(tiles: &[Tile; N], shape: [usize; 3], info: &DeviceInfo) -> (Tile, f64) {
    let timed = |tile: &Tile| (*tile, tile.clocks(shape, info));
    tiles.iter().map(timed).fold((tiles[0], f64::INFINITY), |best, next| if next.1 < best.1 { next } else { best })
}

/// The order in which a product's tiles are walked: those at work together should share rows of both operands, so they
/// form about a square.
pub(crate) fn raster(tile: Tile, [m, n, _]: [usize; 3], info: &DeviceInfo) -> Plan {
    let [tiles_m, tiles_n] = [m.div_ceil(tile.block[0] as usize), n.div_ceil(tile.block[1] as usize)];
    let together = f64::from(info.multiprocessors * tile.blocks_per_sm);
    let side = (together * f64::from(tile.block[1]) / f64::from(tile.block[0])).sqrt().ceil();
    let raster = (side as u32).clamp(1, tiles_m.max(1) as u32);
    Plan { tile, stages: tile.stages(info.shared_per_block), blocks: (tiles_m * tiles_n) as u32, raster }
}

/// How the right operand lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// (n, k): x·wᵀ
    Along,
    /// (k, n): x·w
    Across,
}

/// Part of a matrix: `first` is its first element, rows lie `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) buffer: &'a DeviceBuffer<bf16>,
    pub(crate) first: usize,
    pub(crate) stride: usize,
}

impl<'a> Operand<'a> {
    pub(crate) fn of(tensor: &'a Tensor<Cuda>) -> Operand<'a> {
        Operand { buffer: &tensor.buffer, first: 0, stride: tensor.stride() }
    }

    /// From element `first` on.
    pub(crate) fn from(self, first: usize) -> Operand<'a> {
        Operand { first: self.first + first, ..self }
    }
}

/// LoRA's operands, appended along k: xa (m, parts·rank) with b (n, rank) or, across, (rank, n).
#[derive(Clone, Copy)]
pub(crate) struct Extension<'a> {
    pub(crate) xa: &'a Tensor<Cuda>,
    pub(crate) b: &'a Tensor<Cuda>,
    pub(crate) rank: usize,
    /// Where the first and the second part of n end.
    pub(crate) ends: [usize; 2],
}

/// y = x·w, and what is added to it.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) layout: Layout,
    pub(crate) shape: [usize; 3], // m, n, k
    pub(crate) x: Operand<'a>,
    pub(crate) w: Operand<'a>,
    pub(crate) extension: Option<Extension<'a>>,
    pub(crate) bias: Option<&'a Tensor<Cuda>>,     // (1, n)
    pub(crate) residual: Option<&'a Tensor<Cuda>>, // (m, n), rows as far apart as y's
}

/// Where the results go.
pub(crate) enum Output<'a> {
    /// Rounded; from element `first` on, rows `stride` apart.
    Rounded { buffer: &'a mut DeviceBuffer<bf16>, first: usize, stride: usize },
    /// As they are summed, packed.
    Wide(&'a mut DeviceBuffer<f32>),
}

impl<'a> Output<'a> {
    /// Bytes of a result.
    fn element(&self) -> u64 {
        match self {
            Output::Rounded { .. } => 2,
            Output::Wide(_) => 4,
        }
    }

    pub(crate) fn of(tensor: &'a mut Tensor<Cuda>) -> Output<'a> {
        let stride = tensor.stride();
        Output::Rounded { buffer: &mut tensor.buffer, first: 0, stride }
    }
}

impl<'a> Product<'a> {
    pub(crate) fn new(layout: Layout, shape: [usize; 3], x: Operand<'a>, w: Operand<'a>) -> Product<'a> {
        Product { layout, shape, x, w, extension: None, bias: None, residual: None }
    }

    /// Whether some chunk of eight elements begins off a 16-byte border or ends inside.
    fn ragged(&self, y_first: usize) -> bool {
        let [_, n, k] = self.shape;
        let rank = self.extension.map_or(0, |e| e.rank);
        ![self.x.first, self.w.first, self.x.stride, self.w.stride, y_first, n, k, rank].iter().all(|v| v % 8 == 0)
    }

    /// Every operand lies inside its buffer.
    fn check(&self, op: &'static str, y: &Output) -> Result<()> {
        let [m, n, k] = self.shape;
        let (w_rows, w_cols) = if self.layout == Layout::Along { (n, k) } else { (k, n) };
        within(op, "x", self.x, m, k)?;
        within(op, "w", self.w, w_rows, w_cols)?;
        if let Some(Extension { xa, b, rank, ends }) = self.extension {
            let parts = if self.layout == Layout::Along { 1 + ends.iter().filter(|&&end| end < n).count() } else { 1 };
            expect(op, "xa", xa.shape(), (m, parts * rank))?;
            expect(op, "b", b.shape(), if self.layout == Layout::Along { (n, rank) } else { (rank, n) })?;
        }
        if let Some(bias) = self.bias {
            expect(op, "bias", bias.shape(), (1, n))?;
        }
        let stride = match y {
            Output::Rounded { buffer, first, stride } => {
                within(op, "y", Operand { buffer, first: *first, stride: *stride }, m, n)?;
                *stride
            }
            Output::Wide(buffer) => {
                expect(op, "y holds its results", buffer.len() >= m * n, true)?;
                n
            }
        };
        if let Some(residual) = self.residual {
            expect(op, "residual", (residual.shape(), residual.stride()), ((m, n), stride))?;
        }
        Ok(())
    }

    /// Operands in and results out once, of `size` bytes each.
    fn cost(&self, size: u64) -> Cost {
        let [m, n, k] = self.shape.map(|n| n as u64);
        let (rank, width) = self.extension.map_or((0, 0), |e| (e.rank as u64, e.xa.cols() as u64));
        let residual = if self.residual.is_some() { m * n } else { 0 };
        Cost { flops: 2 * m * n * (k + rank), bytes: 2 * (m * (k + width) + n * (k + rank) + residual) + size * m * n }
    }

    /// Overwrites `y`.
    pub(crate) fn run(&self, cuda: &Cuda, op: &'static str, y: Output) -> Result<()> {
        self.check(op, &y)?;
        if cuda.tier() == Arch::Sm90a && hopper::serves(self, &y) {
            cuda.charge(|| self.cost(y.element()));
            return hopper::launch(self, cuda, y, hopper::plan(self.shape, cuda.info()));
        }
        self.launch(cuda, y, plan(self.shape, cuda.info()))
    }

    /// All operands were checked.
    fn launch(&self, cuda: &Cuda, y: Output, plan: Plan) -> Result<()> {
        let [m, n, k] = self.shape;
        cuda.charge(|| self.cost(y.element()));
        let (y, wide, first, stride) = match y {
            Output::Rounded { buffer, first, stride } => (Some(buffer), None, first, stride),
            Output::Wide(buffer) => (None, Some(buffer), 0, n),
        };
        let defines = plan.defines(self.layout, self.ragged(first));
        let config = LaunchConfig::linear(plan.blocks, plan.tile.threads()).with_shared(plan.shared());
        let Product { x, w, extension, bias, residual, .. } = *self;
        let (rank, ends) = extension.map_or((0, [n, n]), |e| (e.rank, e.ends));
        let params = ProductParams {
            y,
            wide,
            x: x.buffer,
            w: w.buffer,
            xa: extension.map(|e| &e.xa.buffer),
            b: extension.map(|e| &e.b.buffer),
            bias: bias.map(|bias| &bias.buffer),
            residual: residual.map(|residual| &residual.buffer),
            y_first: first as u64,
            x_first: x.first as u64,
            w_first: w.first as u64,
            m,
            n,
            k,
            rank,
            y_stride: stride,
            x_stride: x.stride,
            w_stride: w.stride,
            xa_stride: extension.map_or(0, |e| e.xa.stride()),
            b_stride: extension.map_or(0, |e| e.b.stride()),
            end_0: ends[0],
            end_1: ends[1],
            raster: plan.raster as usize,
        };
        // SAFETY: `check` and the two above proved that every operand lies within its buffer.
        unsafe { kernels::product(cuda, &defines, config, &params) }
    }
}

/// rows × cols from `first` on lie inside the buffer.
pub(crate) fn within(op: &'static str, what: &str, part: Operand, rows: usize, cols: usize) -> Result<()> {
    let end = if rows == 0 || cols == 0 { 0 } else { part.first + (rows - 1) * part.stride + cols };
    expect(op, what, end <= part.buffer.len() && (cols <= part.stride || rows <= 1), true)
}

/// logits (S, V) = h·wᵀ in f32: what tokens are drawn from.
pub(crate) fn logits(cuda: &Cuda, logits: &mut Tensor<Cuda, f32>, h: &Tensor<Cuda>, w: &Tensor<Cuda>) -> Result<()> {
    let shape = [h.rows(), w.rows(), w.cols()];
    expect("logits", "shape", (logits.shape(), h.cols()), ((shape[0], shape[1]), shape[2]))?;
    let product = Product::new(Layout::Along, shape, Operand::of(h), Operand::of(w));
    product.run(cuda, "logits", Output::Wide(&mut logits.buffer))
}

#[cfg(test)]
mod tests;
