//! The ways to compute a product on a device, side by side: what `ares bench products` times and predicts.

use super::hopper::{self, Plan90, Tile90};
use super::{Layout, Output, Product, TILES, Tile, raster};
use crate::backend::Cuda;
use crate::backend::cuda::driver::{Arch, DeviceInfo};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Sm80(Tile),
    Sm90a(Tile90),
}

impl Way {
    /// All that a device of this architecture can take.
    pub(crate) fn all(arch: Arch) -> Vec<Way> {
        let hopper = Tile90::ALL.iter().filter(|_| arch == Arch::Sm90a).map(|&tile| Way::Sm90a(tile));
        TILES.map(Way::Sm80).into_iter().chain(hopper).collect()
    }

    /// `sm_90a 128x256`
    pub(crate) fn name(&self) -> String {
        let (arch, [m, n]) = match self {
            Way::Sm80(tile) => (Arch::Sm80, tile.block),
            Way::Sm90a(tile) => (Arch::Sm90a, tile.block()),
        };
        format!("{arch} {m}x{n}")
    }

    /// Whether it is the one that the plan of its architecture takes.
    pub(crate) fn is_planned(&self, shape: [usize; 3], info: &DeviceInfo) -> bool {
        match self {
            Way::Sm80(tile) => super::plan(shape, info).tile == *tile,
            Way::Sm90a(tile) => hopper::plan(shape, info).tile == *tile,
        }
    }

    /// How many clock cycles are predicted; the model of the sm_80 tiles ranks them and no more.
    pub(crate) fn cycles(&self, shape: [usize; 3], rank: usize, info: &DeviceInfo) -> Option<f64> {
        match self {
            Way::Sm80(_) => None,
            Way::Sm90a(tile) => Some(tile.cycles(shape, rank, info)),
        }
    }

    /// Whether an adapter of this rank can ride along.
    pub(crate) fn carries(&self, layout: Layout, rank: usize) -> bool {
        matches!(self, Way::Sm80(_)) || hopper::carries(layout, rank)
    }

    pub(crate) fn serves(&self, product: &Product, y: &Output) -> bool {
        match self {
            Way::Sm80(_) => true,
            Way::Sm90a(_) => hopper::serves(product, y),
        }
    }

    /// Overwrites `y`.
    pub(crate) fn run(&self, product: &Product, cuda: &Cuda, y: Output) -> Result<()> {
        product.check("product", &y)?;
        match *self {
            Way::Sm80(tile) => product.launch(cuda, y, raster(tile, product.shape, cuda.info())),
            Way::Sm90a(tile) => hopper::launch(product, cuda, y, Plan90::of(tile, product.shape, cuda.info())),
        }
    }
}
