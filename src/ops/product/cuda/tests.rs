//! Geometry, and every tile on the simulator: the same bits from each.

use super::*;
use crate::backend::Backend;
use crate::backend::cuda::compiler::KernelOptions;
use crate::backend::cuda::driver::Arch;
use crate::backend::cuda::sim::SimDriver;

fn device(arch: Arch, multiprocessors: u32, shared_per_block: u32) -> DeviceInfo {
    DeviceInfo { name: "test".into(), arch, multiprocessors, shared_per_block, memory: 1 << 35 }
}

#[test]
fn many_rows_take_the_large_tile_and_few_rows_spread() {
    let tile = |m, n, k| plan([m, n, k], &DeviceInfo::h200()).tile.block;
    assert_eq!(tile(16384, 1536, 1536), [128, 128]);
    assert_eq!(tile(16384, 8960, 1536), [128, 128]);
    assert_eq!(tile(16384, 48, 1536), [64, 64]);
    assert_eq!(tile(1, 1536, 8960), [16, 32]);
    assert!(plan([64, 1536, 1536], &DeviceInfo::h200()).blocks >= 48);
    assert!(plan([1, 17920, 1536], &DeviceInfo::h200()).blocks >= 500);
}

#[test]
fn every_tile_fits_every_device() {
    for info in [DeviceInfo::h200(), device(Arch::Sm80, 108, 163 << 10), device(Arch::Sm120, 84, 99 << 10)] {
        for tile in TILES {
            let plan = raster(tile, [1000, 1000, 1000], &info);
            let (stages, shared) = (plan.stages, plan.shared());
            assert!(stages >= 3 && shared <= 99 << 10, "{plan:?} on {info:?}");
            assert!((shared + 1024) * tile.blocks_per_sm <= info.shared_per_block + 1024, "{plan:?} on {info:?}");
            assert!(tile.threads() * tile.blocks_per_sm <= 1536, "{plan:?}");
        }
    }
    let plan = plan([4096; 3], &DeviceInfo::h200());
    assert_eq!((plan.tile.block, plan.stages, plan.shared(), plan.blocks), ([128, 128], 4, 64 << 10, 1024));
}

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| bf16::from_f32(((i * 7919 + seed * 104_729) % 1013) as f32 / 506.0 - 1.0).to_f32()).collect()
}

pub(super) fn matrix(cuda: &Cuda, seed: usize, rows: usize, cols: usize) -> Tensor<Cuda> {
    Tensor::from_host(cuda, rows, cols, &cuda.activations(&numbers(seed, rows * cols))).unwrap()
}

fn every_way(cuda: &Cuda, layout: Layout, shape: [usize; 3], rank: usize, tile: Tile) -> (Vec<f32>, Vec<f32>) {
    every_way_of(cuda, layout, shape, rank, |product, y| {
        product.launch(cuda, y, raster(tile, product.shape, cuda.info()))
    })
    .unwrap()
}

/// y of (m, n) and of its rows 3.. alone, with an adapter of two parts, bias and residual.
pub(super) fn every_way_of(
    cuda: &Cuda,
    layout: Layout,
    [m, n, k]: [usize; 3],
    rank: usize,
    launch: impl Fn(&Product, Output) -> Result<()>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let across = layout == Layout::Across;
    let (width, ends) = if across { (rank, [n, n]) } else { (2 * rank, [n / 3, n]) };
    let (x, xa, residual) = (matrix(cuda, 1, m, k), matrix(cuda, 2, m, width), matrix(cuda, 3, m, n));
    let (w, b) = if across { ((k, n), (rank, n)) } else { ((n, k), (n, rank)) };
    let (w, b, bias) = (matrix(cuda, 4, w.0, w.1), matrix(cuda, 5, b.0, b.1), matrix(cuda, 6, 1, n));
    let extension = Some(Extension { xa: &xa, b: &b, rank, ends });
    let whole = Product::new(layout, [m, n, k], Operand::of(&x), Operand::of(&w));
    let whole = Product { extension, bias: Some(&bias), residual: Some(&residual), ..whole };
    let run = |product: &Product| {
        let rows = product.shape[0];
        let unwritten = vec![f32::NAN; rows * n];
        let mut y = Tensor::from_host(cuda, rows, n, &cuda.activations(&unwritten)).unwrap();
        product.check("test", &Output::of(&mut y)).unwrap();
        launch(product, Output::of(&mut y))?;
        Ok(y.read(cuda)?.into_iter().map(bf16::to_f32).collect::<Vec<f32>>())
    };
    let x_alone = Operand::of(&x).from(3 * x.stride());
    let plain = Product::new(layout, [m - 3, n, k], x_alone, Operand::of(&w));
    Ok((run(&whole)?, run(&Product { bias: Some(&bias), ..plain })?))
}

#[test]
fn every_tile_gives_the_same_bits() {
    let Ok(driver) = SimDriver::open(Arch::Sm80, &KernelOptions::default().or_environment(), None) else { return };
    let cuda = Cuda::new(driver);
    for (layout, shape, rank) in [
        (Layout::Along, [150, 136, 72], 8),
        (Layout::Along, [37, 45, 101], 5),
        (Layout::Across, [150, 136, 72], 40),
        (Layout::Across, [37, 45, 101], 5),
    ] {
        let first = every_way(&cuda, layout, shape, rank, TILES[0]);
        for tile in &TILES[1..] {
            assert_eq!(every_way(&cuda, layout, shape, rank, *tile), first, "{layout:?} {shape:?} {tile:?}");
        }
    }
}
