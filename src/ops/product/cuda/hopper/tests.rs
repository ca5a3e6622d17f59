//! Every tile on the simulator: the bits of the sm_80 tiles, which sum in the same order. And that faults of the kernel are seen.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::backend::Tensor;
use crate::backend::cuda::compiler::KernelOptions;
use crate::backend::cuda::sim::SimDriver;
use crate::ops::product::cuda::Operand;
use crate::ops::product::cuda::tests::{every_way_of, matrix};

type Rows = (Vec<f32>, Vec<f32>);

const SHAPE: [usize; 3] = [150, 136, 200];

fn device(options: &KernelOptions, seed: u64) -> Option<Cuda> {
    let required = std::env::var_os("ARES_REQUIRE_SIM").is_some();
    match SimDriver::open(Arch::Sm90a, options, Some(seed)) {
        Ok(driver) => Some(Cuda::with_tier(driver, Some("sm_90a")).unwrap()),
        Err(error) => {
            assert!(!required, "{error}");
            None
        }
    }
}

fn by_first_architecture(cuda: &Cuda, layout: Layout, shape: [usize; 3], rank: usize) -> Rows {
    every_way_of(cuda, layout, shape, rank, |product, y| {
        product.launch(cuda, y, super::super::plan(product.shape, cuda.info()))
    })
    .unwrap()
}

/// `clusters` share the tiles.
fn by_tile(cuda: &Cuda, layout: Layout, shape: [usize; 3], rank: usize, tile: Tile90, clusters: u32) -> Result<Rows> {
    every_way_of(cuda, layout, shape, rank, |product, y| {
        assert!(serves(product, &y));
        let tiles: u32 = tile.tiles(product.shape[0], product.shape[1]).iter().product();
        launch(product, cuda, y, Plan90 { tile, clusters: clusters.min(tiles), raster: 2 })
    })
}

#[test]
fn every_tile_gives_the_bits_of_the_first_architecture() {
    for seed in [0, 1, 2] {
        let Some(cuda) = device(&KernelOptions::default().or_environment(), seed) else { return };
        for (layout, shape, rank) in [
            (Layout::Along, SHAPE, 8),
            (Layout::Along, [300, 264, 72], 40),
            (Layout::Along, [64, 64, 64], 16),
            (Layout::Across, SHAPE, 8),
            (Layout::Across, [300, 264, 72], 40),
            (Layout::Across, [150, 136, 72], 136),
        ] {
            let expected = by_first_architecture(&cuda, layout, shape, rank);
            for tile in Tile90::ALL {
                let found = by_tile(&cuda, layout, shape, rank, tile, 1 + seed as u32).unwrap();
                assert_eq!(found, expected, "{layout:?} {shape:?} {tile:?} seed {seed}");
            }
        }
    }
}

/// Nothing that changes a row's sums follows the number of rows.
#[test]
fn the_plan_spreads_few_rows_and_shares_many() {
    let h200 = &DeviceInfo::h200();
    for (n, block_n) in [(2048, 256), (1536, 256), (17920, 256), (1152, 192), (896, 128), (151_936, 256), (64, 128)] {
        for m in [1, 64, 300, 16384] {
            let Plan90 { tile, clusters, raster } = plan([m, n, 1536], h200);
            assert_eq!(tile.block_n, block_n, "{m} x {n}");
            assert!(clusters >= 1 && clusters * tile.cluster() <= 132 && (1..=8).contains(&raster), "{m} x {n}");
        }
    }
    assert_eq!(plan([16384, 1536, 1536], h200).tile.consumers, 2);
    assert_eq!(plan([64, 1536, 1536], h200).tile.consumers, 1);
    for tile in Tile90::ALL {
        assert!(tile.shared() <= SHARED && tile.stages() >= 3, "{tile:?}");
    }
}

/// Rows from one to several tiles, no part of an adapter to three, what is added and what is not, rounded and in f32: the bits of the
/// sm_80 tiles, in which a row's do not depend on how many there are.
#[test]
fn every_height_tail_and_epilogue() {
    let Some(cuda) = device(&KernelOptions::default().or_environment(), 0) else { return };
    let (n, k, rank) = (264, 136, 12);
    for (layout, parts) in [Layout::Along, Layout::Across].into_iter().flat_map(|l| (0..4).map(move |parts| (l, parts)))
    {
        let across = layout == Layout::Across;
        if across && parts > 1 {
            continue;
        }
        let ends = [if parts > 1 { 72 } else { n }, if parts > 2 { 200 } else { n }];
        let (w, b) = if across { ((k, n), (rank, n)) } else { ((n, k), (n, rank)) };
        let (w, b, bias) = (matrix(&cuda, 1, w.0, w.1), matrix(&cuda, 2, b.0, b.1), matrix(&cuda, 3, 1, n));
        for m in [1, 63, 129, 300] {
            let (x, xa) = (matrix(&cuda, 4, m, k), matrix(&cuda, 5, m, rank * parts.max(1)));
            let residual = matrix(&cuda, 6, m, n);
            let product = Product {
                extension: (parts > 0).then_some(Extension { xa: &xa, b: &b, rank, ends }),
                bias: (parts != 1).then_some(&bias),
                residual: (parts % 2 == 1).then_some(&residual),
                ..Product::new(layout, [m, n, k], Operand::of(&x), Operand::of(&w))
            };
            let rounded = |run: &dyn Fn(Output) -> Result<()>| {
                let mut y = matrix(&cuda, 7, m, n);
                run(Output::of(&mut y)).unwrap();
                y.read(&cuda).unwrap()
            };
            let wide = |run: &dyn Fn(Output) -> Result<()>| {
                let mut y = Tensor::<Cuda, f32>::from_host(&cuda, m, n, &vec![f32::NAN; m * n]).unwrap();
                run(Output::Wide(&mut y.buffer)).unwrap();
                y.read(&cuda).unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>()
            };
            let first = |y: Output| product.launch(&cuda, y, super::super::plan([m, n, k], cuda.info()));
            let expected = (rounded(&first), product.residual.is_none().then(|| wide(&first)));
            for tile in Tile90::ALL {
                let clusters = tile.tiles(m, n).iter().product::<u32>().min(3);
                let own = |y: Output| launch(&product, &cuda, y, Plan90 { tile, clusters, raster: 8 });
                let found = (rounded(&own), product.residual.is_none().then(|| wide(&own)));
                assert_eq!(found, expected, "{layout:?}, {m} rows, {parts} parts, {tile:?}");
            }
        }
    }
}

/// A change of a file of kernels that makes it wrong, what the simulator says of it ("" where only the numbers show it), and what
/// the line that it names holds ("" where none is to blame).
struct Plant {
    name: &'static str,
    file: &'static str,
    change: [&'static str; 2],
    message: &'static str,
    line: &'static str,
}

const PLANTS: &[Plant] = &[
    Plant {
        name: "the wrong parity",
        file: "tile90.cuh",
        change: ["turn.parity ^ 1)", "turn.parity)"],
        message: "for 16 more arrivals and 0 more bytes",
        line: "shared.empty[turn.stage]",
    },
    Plant {
        name: "one arrival too few empties a stage",
        file: "tile90.cuh",
        change: ["shared.empty[s], READERS", "shared.empty[s], READERS - 1"],
        message: "still read: expected warpgroup_wait or store_wait",
        line: "load_",
    },
    Plant {
        name: "memory touched before the launch before has ended",
        file: "product90.cu",
        change: ["    after_previous();\n", ""],
        message: "global memory that the launch before may still be at work on: expected after_previous() first",
        line: "load_box",
    },
    Plant {
        name: "more registers than there are",
        file: "tile90.cuh",
        change: ["registers_up_to<232>", "registers_up_to<240>"],
        message: "66560 are asked for by all threads together, of 65536",
        line: "",
    },
    Plant {
        name: "registers of one warp's own",
        file: "tile90.cuh",
        change: [
            "if constexpr (CONSUMERS == 2) registers_down_to<40>();",
            "if (threadIdx.x < 96) registers_down_to<40>();",
        ],
        message: "of its warpgroup for 40",
        line: "",
    },
    Plant {
        name: "one arrival too many",
        file: "tile90.cuh",
        change: ["shared.empty[s], READERS", "shared.empty[s], READERS + 1"],
        message: "for 1 more arrivals and 0 more bytes",
        line: "shared.empty[turn.stage]",
    },
    Plant {
        name: "bytes short",
        file: "tile90.cuh",
        change: ["sizeof(Stage));", "sizeof(Stage) - 16);"],
        message: "in a deadlock",
        line: "barrier_wait(shared.",
    },
    Plant {
        name: "a stage released before it was read",
        file: "tile90.cuh",
        change: ["    warpgroup_wait<1>();\n", ""],
        message: "still read: expected warpgroup_wait or store_wait",
        line: "load_",
    },
    Plant {
        name: "no fence between the proxies",
        file: "tile90.cuh",
        change: ["    fence_async();\n", ""],
        message: "wrote: expected its fence_async, and then a barrier",
        line: "store_box(y, ",
    },
    Plant {
        name: "the fence after the barrier",
        file: "tile90.cuh",
        change: ["    fence_async();\n    warp_barrier();\n", "    warp_barrier();\n    fence_async();\n"],
        message: "wrote: expected its fence_async, and then a barrier",
        line: "store_box(y, ",
    },
    Plant {
        name: "no fence of the accumulators",
        file: "tile90.cuh",
        change: ["    warpgroup_fence();\n", ""],
        message: "expected warpgroup_fence after its registers were written",
        line: "warpgroup_multiply<W_ACROSS>(",
    },
    Plant {
        name: "accumulators read too early",
        file: "tile90.cuh",
        change: ["    warpgroup_wait<0>();\n", ""],
        message: "an accumulator of a product under way: expected warpgroup_wait",
        line: "sums[",
    },
    Plant {
        name: "stage read before it has come",
        file: "tile90.cuh",
        change: ["    barrier_wait(shared.full[turn.stage], turn.parity);\n", ""],
        message: "loads is still writing: expected barrier_wait",
        line: "warpgroup_multiply<W_ACROSS>(",
    },
    Plant {
        name: "one lane waits for all",
        file: "tile90.cuh",
        change: ["    barrier_wait(shared.full", "    if (threadIdx.x % WARP == 0) barrier_wait(shared.full"],
        message: "which a box was loaded into: expected barrier_wait",
        line: "warpgroup_multiply<W_ACROSS>(",
    },
    Plant {
        name: "one lane stores what others may not have written",
        file: "tile90.cuh",
        change: ["    fence_async();\n    warp_barrier();\n", "    fence_async();\n"],
        message: "wrote: expected a barrier in between",
        line: "store_box(y, ",
    },
    Plant {
        name: "results overwritten while they are stored",
        file: "product90.cu",
        change: ["    store_wait();\n    barrier_expect(come", "    barrier_expect(come"],
        message: "still read: expected warpgroup_wait or store_wait",
        line: "load_box(out +",
    },
    Plant {
        name: "what is added read before it has come",
        file: "product90.cu",
        change: ["if (p.residual != 0) barrier_wait(shared.added[warp], parity), parity ^= 1;", ""],
        message: "which a box was loaded into: expected barrier_wait at its barrier",
        line: "if (added) load_matrix_x4",
    },
    Plant {
        name: "a block ends while results are stored",
        file: "tile90.cuh",
        change: ["        if (threadIdx.x % WARP == 0) store_wait();\n        warp_barrier();\n", ""],
        message: "ends while a box that thread (128,0,0) stores is being read: expected store_wait",
        line: "",
    },
    Plant {
        name: "barriers that the copy engine does not know",
        file: "tile90.cuh",
        change: ["        barrier_ready();\n", ""],
        message: "expected barrier_ready after barrier_init",
        line: "load_",
    },
    Plant {
        name: "barriers used before they are made",
        file: "tile90.cuh",
        change: ["        barrier_ready();\n    }\n    all_barrier();\n", "        barrier_ready();\n    }\n"],
        message: "expected a barrier of the block after barrier_init",
        line: "load_",
    },
    Plant {
        name: "barriers that the block alone waits for",
        file: "tile90.cuh",
        change: ["        cluster_barrier();\n    }\n}", "        block_barrier();\n    }\n}"],
        message: "expected a barrier of the block after barrier_init",
        line: "load_box_for_all<CLUSTER>(",
    },
    Plant {
        name: "the other block gone",
        file: "tile90.cuh",
        change: ["    if constexpr (CLUSTER > 1) cluster_barrier();\n", ""],
        message: "expected a block that is there, found that block (",
        line: "barrier_arrive_at(",
    },
    Plant {
        name: "one block alone is told",
        file: "tile90.cuh",
        change: [
            "barrier_arrive_at(shared.empty[stage], lane)",
            "barrier_arrive_at(shared.empty[stage], cluster_rank())",
        ],
        message: "of block (1,0,0)'s warp still read",
        line: "load_",
    },
    Plant {
        name: "both blocks load the same part",
        file: "tile90.cuh",
        change: ["u32 skip = rank_of_block() * ROWS;", "u32 skip = 0;"],
        message: "loads is still writing: expected barrier_wait",
        line: "load_box_for_all<CLUSTER>(",
    },
    Plant {
        name: "leading and stride swapped",
        file: "tile90.cuh",
        change: ["BLOCK_K * 128, ATOM)", "ATOM, BLOCK_K * 128)"],
        message: "",
        line: "",
    },
    Plant {
        name: "across with the steps of along",
        file: "tile90.cuh",
        change: ["b + step * 2 * ATOM", "b + step * 32"],
        message: "",
        line: "",
    },
    Plant {
        name: "permuted by the next row",
        file: "hopper.cuh",
        change: ["^ row % 8)", "^ (row + 1) % 8)"],
        message: "",
        line: "",
    },
];

/// What is right stays green over twenty orders, what is wrong is red and named at its line.
#[test]
fn planted_faults_are_found() {
    let tile = Tile90 { consumers: 2, block_n: 128 };
    let Some(cuda) = device(&KernelOptions::default(), 0) else { return };
    let layouts = [Layout::Across, Layout::Along];
    let expected = layouts.map(|layout| by_first_architecture(&cuda, layout, SHAPE, 8));
    for seed in 0..20 {
        let cuda = device(&KernelOptions::default(), seed).unwrap();
        assert_eq!(by_tile(&cuda, layouts[0], SHAPE, 8, tile, 2).unwrap(), expected[0], "seed {seed}");
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for Plant { name, file, change: [from, to], message, line } in PLANTS {
        let folder = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").args(["-R", "."]).arg(folder.path()).current_dir(&kernels).status();
        assert!(copied.unwrap().success());
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches(from).count(), 1, "{name}: {from:?} in {file}");
        fs::write(&path, text.replace(from, to)).unwrap();
        let options = KernelOptions { kernels: Some(folder.path().into()), ..KernelOptions::default() };
        let cuda = device(&options, 0).unwrap();
        let found = by_tile(&cuda, layouts[0], SHAPE, 8, tile, 1);
        let Err(error) = found else {
            assert!(message.is_empty() && found.unwrap() != expected[0], "{name}: nothing was found");
            continue;
        };
        let error = error.to_string();
        println!("{name}: {error}");
        assert!(!message.is_empty() && error.contains(message), "{name}: expected {message:?} in\n{error}");
        // Every place that the message names, in whichever file.
        let mut named = error.split("kernels/").skip(1).filter_map(|place| {
            let (file, rest) = place.split_once(':')?;
            let number: usize = rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
            let text = fs::read_to_string(folder.path().join(file)).unwrap();
            Some(text.lines().nth(number - 1)?.contains(line))
        });
        assert!(line.is_empty() || named.any(|holds| holds), "{name}: expected a line with {line:?} in\n{error}");
    }
}
