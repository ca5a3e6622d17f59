//! The twins of `kernels/hopper.cuh` against the PTX ISA's layouts, written down once more here.

use ares::backend::cuda::driver::{LaunchConfig, MapSpec};
use ares::backend::cuda::source::Source;
use half::bf16;

use crate::harness::{SEEDS, device, download, launch_bytes, path, scrambled, source, source_of, upload};

/// Shared memory of every kernel of `hopper.cu`.
const SHARED: u32 = 4 * 4 * 256 * 8 + 16;
const BOX_COLS: usize = 64;

fn config(threads: u32) -> LaunchConfig {
    LaunchConfig::linear(1, threads).with_shared(SHARED)
}

/// With one line changed.
fn planted(name: &str, line: &str, to: &str) -> &'static Source {
    let sound = source(name);
    assert_eq!(sound.text.matches(line).count(), 1, "{line}");
    Box::leak(Box::new(Source { text: sound.text.replace(line, to).leak(), file: sound.file, kernels: sound.kernels }))
}

fn halves(words: &[u32]) -> Vec<u16> {
    bytemuck::cast_slice(words).to_vec()
}

/// "128B swizzle": bits 4 to 6 of a byte's address, exclusive or bits 7 to 9. In elements of two bytes.
fn swizzled(element: usize) -> usize {
    element ^ (element >> 6 & 7) << 3
}

/// Boxes inside of a matrix, over each of its edges, and outside.
#[test]
fn boxes_lie_permuted_and_are_zero_outside() {
    let (rows, cols, stride) = (37usize, 72usize, 80usize);
    for seed in SEEDS {
        let Some(driver) = device(seed) else { return };
        let matrix = halves(&scrambled(rows * stride / 2, 3));
        let x = upload(&driver, bytemuck::cast_slice::<u16, u32>(&matrix));
        for box_rows in [1usize, 8, 24] {
            let spec = MapSpec { what: "x", address: x, rows, cols, stride, box_rows: box_rows as u32 };
            let map = driver.tensor_map(&spec).unwrap();
            for (row, col) in [(0i32, 0i32), (5, 8), (30, 16), (-3, 64), (2, -64), (40, 0)] {
                let count = box_rows * BOX_COLS / 2;
                let words = count as u32;
                let y = upload(&driver, &vec![7u32; count]);
                let args: [&[u8]; 5] = [
                    bytemuck::bytes_of(&y),
                    map.bytes(),
                    bytemuck::bytes_of(&row),
                    bytemuck::bytes_of(&col),
                    bytemuck::bytes_of(&words),
                ];
                launch_bytes(&driver, source("simulator/hopper.cu"), "load_one", config(32), &args).unwrap();
                let found = halves(&download::<u32>(&driver, y, count));
                let inside = |r: i32, c: i32| (0..rows as i32).contains(&r) && (0..cols as i32).contains(&c);
                let at = |r: i32, c: i32| if inside(r, c) { matrix[r as usize * stride + c as usize] } else { 0 };
                for i in 0..box_rows * BOX_COLS {
                    let (r, c) = ((i / BOX_COLS) as i32, (i % BOX_COLS) as i32);
                    assert_eq!(
                        found[swizzled(i)],
                        at(row + r, col + c),
                        "seed {seed}, box at ({row}, {col}), element {i}"
                    );
                }
                // The same box back into a matrix of its own: what lies outside is left out.
                let y = upload(&driver, &vec![u32::MAX; rows * stride / 2]);
                let back = driver.tensor_map(&MapSpec { what: "y", address: y, ..spec }).unwrap();
                let image = upload(&driver, bytemuck::cast_slice::<u16, u32>(&found));
                let args: [&[u8]; 5] = [
                    back.bytes(),
                    bytemuck::bytes_of(&image),
                    bytemuck::bytes_of(&row),
                    bytemuck::bytes_of(&col),
                    bytemuck::bytes_of(&words),
                ];
                launch_bytes(&driver, source("simulator/hopper.cu"), "store_one", config(32), &args).unwrap();
                let found = halves(&download::<u32>(&driver, y, rows * stride / 2));
                for i in 0..rows * stride {
                    let (r, c) = ((i / stride) as i32, (i % stride) as i32);
                    let part =
                        (row..row + box_rows as i32).contains(&r) && (col..col + 64).contains(&c) && inside(r, c);
                    assert_eq!(
                        found[i],
                        if part { matrix[i] } else { u16::MAX },
                        "seed {seed}, box at ({row}, {col}), ({r}, {c})"
                    );
                }
            }
        }
    }
}

/// PTX ISA, stmatrix: lane l of matrix m holds elements 2·(l%4) and the next of row l/4, which goes to where lane 8m + l/4 says.
#[test]
fn matrices_to_shared_memory() {
    let words = scrambled(4 * 32, 5);
    let run = |order: &[u32]| {
        let driver = device(0)?;
        let (y, x, order) = (upload(&driver, &[7u32; 128]), upload(&driver, &words), upload(&driver, order));
        let args = [&y, &x, &order].map(bytemuck::bytes_of);
        let done = launch_bytes(&driver, source("simulator/hopper.cu"), "store_matrices", config(32), &args);
        Some(done.map(|()| download::<u32>(&driver, y, 128)))
    };
    let mut order: Vec<u32> = (0..32).map(|i| (i * 13 + 5) % 32).collect();
    let Some(found) = run(&order) else { return };
    let found = found.unwrap();
    for (i, &word) in words.iter().enumerate() {
        let (matrix, lane) = (i / 32, i % 32);
        assert_eq!(found[4 * order[8 * matrix + lane / 4] as usize + lane % 4], word, "matrix {matrix}, lane {lane}");
    }
    order[9] = order[2];
    let error = run(&order).unwrap().unwrap_err().to_string();
    assert!(error.contains("thread (2,0,0) wrote: expected a barrier in between"), "{error}");
}

/// PTX ISA, matrix descriptor: addresses, leading and stride byte offsets without their low four bits; 1 << 62 is the 128-byte swizzle.
fn descriptor(start: usize, leading: usize, stride: usize) -> u64 {
    1 << 62 | (stride as u64 >> 4) << 32 | (leading as u64 >> 4) << 16 | start as u64 >> 4
}

/// PTX ISA, canonical layouts with a 128-byte swizzle, T = 8 elements of 16 bits. Along k: ((8, n), (T, 2)) with strides ((8T, SBO), (1,
/// T)); across: ((T, 8, n), (8, k)) with strides ((1, T, LBO), (8T, SBO)). Elements from the beginning, before the swizzle.
fn along(outer: usize, k: usize, stride: usize) -> usize {
    outer % 8 * 64 + outer / 8 * (stride / 2) + k
}

fn across(outer: usize, k: usize, leading: usize, stride: usize) -> usize {
    outer % 64 + outer / 64 * (leading / 2) + k % 8 * 64 + k / 8 * (stride / 2)
}

#[test]
fn products_of_a_warpgroup() {
    const N: usize = 128;
    // Small eighths: every product and sum is exact, so that each element must be right to the bit.
    let small = |len: usize, seed: u32| scrambled(len, seed).into_iter().map(|v| (v % 127) as f32 / 8.0 - 7.5);
    let a: Vec<bf16> = small(64 * 16, 1).map(bf16::from_f32).collect();
    let b: Vec<bf16> = small(N * 16, 2).map(bf16::from_f32).collect(); // (n, k)
    let d: Vec<f32> = small(64 * N, 3).collect();
    // Element i of thread t: PTX ISA, "wgmma .m64nNk16 register fragment layout for matrix D".
    let place = |t: usize, i: usize| (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2);
    // The left operand's: PTX ISA, "wgmma .m64k16 register fragment layout for matrix A", two elements a register.
    let held = |i: usize| {
        let (warp, lane, r) = (i / 128, i / 4 % 32, i % 4);
        let at = (warp * 16 + lane / 4 + r % 2 * 8) * 16 + lane % 4 * 2 + r / 2 * 8;
        u32::from(a[at].to_bits()) | u32::from(a[at + 1].to_bits()) << 16
    };
    let held: Vec<u32> = (0..512).map(held).collect();
    let start: Vec<f32> = (0..128 * 64).map(|i| place(i / 64, i % 64)).map(|(row, col)| d[row * N + col]).collect();
    // The third step of 16 along k of a, the second of b; strides that are not those of the other.
    let (a_first, a_stride) = (64, 1024);
    for (is_across, b_first, leading, stride) in [(false, 32, 0, 1024), (true, 2048, 8192, 1024), (true, 0, 4096, 2048)]
    {
        let mut image = vec![0x7fc0u16; 4 * 256 * 8 * 2];
        let b_begin = 8192;
        for row in 0..64 {
            (0..16).for_each(|k| image[swizzled(a_first / 2 + along(row, k, a_stride))] = a[row * 16 + k].to_bits());
        }
        for col in 0..N {
            for k in 0..16 {
                let at = if is_across { across(col, k, leading, stride) } else { along(col, k, stride) };
                image[swizzled((b_begin + b_first) / 2 + at)] = b[col * 16 + k].to_bits();
            }
        }
        for (seed, in_registers) in SEEDS.into_iter().flat_map(|seed| [(seed, false), (seed, true)]) {
            let run = |source| {
                let driver = device(seed)?;
                let (y, x) = (upload(&driver, &start), upload(&driver, bytemuck::cast_slice::<u16, u32>(&image)));
                let held = if in_registers { upload(&driver, &held) } else { 0 };
                let left = descriptor(a_first, 0, a_stride);
                let right = descriptor(b_begin + b_first, leading, stride);
                let (turned, words) = (u32::from(is_across), image.len() as u32 / 2);
                let args: [&[u8]; 7] = [
                    bytemuck::bytes_of(&y),
                    bytemuck::bytes_of(&x),
                    bytemuck::bytes_of(&left),
                    bytemuck::bytes_of(&right),
                    bytemuck::bytes_of(&turned),
                    bytemuck::bytes_of(&words),
                    bytemuck::bytes_of(&held),
                ];
                let done = launch_bytes(&driver, source, "multiply_one", config(128), &args);
                Some(done.map(|()| download::<f32>(&driver, y, 128 * 64)))
            };
            let Some(found) = run(source("simulator/hopper.cu")) else { return };
            let found = found.unwrap();
            for (i, &found) in found.iter().enumerate() {
                let (row, col) = place(i / 64, i % 64);
                let sum: f32 = (0..16).map(|k| a[row * 16 + k].to_f32() * b[col * 16 + k].to_f32()).sum();
                assert_eq!(
                    found,
                    sum + d[row * N + col],
                    "across {is_across}, leading {leading}, in registers {in_registers}, seed {seed}: D[{row}][{col}]"
                );
            }
            for (line, to, message) in [
                ("    warpgroup_fence();  // REGISTERS\n", "\n", "warpgroup_fence after its registers were written"),
                (
                    "    // EARLY\n",
                    "    sums[1] = 0.0f;\n",
                    "an accumulator of a product under way: expected warpgroup_wait",
                ),
                ("    // EARLY\n", "    left[1] = 0;\n", "an operand of a product under way: expected warpgroup_wait"),
            ] {
                let done = run(planted("simulator/hopper.cu", line, to)).unwrap();
                match done {
                    // In shared memory the left operand is not what was changed.
                    Ok(_) => assert!(to.contains("left") && !in_registers, "{message}"),
                    Err(error) => assert!(error.to_string().contains(message), "{error}"),
                }
            }
        }
    }
}

/// The one validator that both drivers ask.
#[test]
fn a_map_that_the_copy_engine_cannot_have_is_refused() {
    let Some(driver) = device(0) else { return };
    let good = MapSpec { what: "w", address: 4096, rows: 10, cols: 64, stride: 64, box_rows: 8 };
    driver.tensor_map(&good).unwrap();
    for (spec, rule) in [
        (MapSpec { address: 4104, ..good }, "expected an address that is a multiple of 16 for w, found 0x1008"),
        (MapSpec { rows: 0, ..good }, "expected 1 to 2^32 rows for w, found 0"),
        (MapSpec { cols: 0, ..good }, "expected 1 to 2^32 columns for w, found 0"),
        (
            MapSpec { stride: 68, ..good },
            "expected rows a multiple of 16 bytes apart, less than 2^40 for w, found 136 bytes",
        ),
        (
            MapSpec { stride: 56, ..good },
            "expected rows no nearer than they are long for w, found 64 columns, 56 apart",
        ),
        (MapSpec { box_rows: 257, ..good }, "expected a box of 1 to 256 rows for w, found 257"),
        (MapSpec { box_rows: 0, ..good }, "expected a box of 1 to 256 rows for w, found 0"),
    ] {
        let message = driver.tensor_map(&spec).unwrap_err().to_string();
        assert!(message.contains(rule), "{message}");
    }
}

/// What threads tell each other through barriers; and each of its steps left out.
#[test]
fn one_warp_tells_another() {
    let sound = source("simulator/hopper.cu");
    let x = scrambled(32, 7);
    let run = |source: &'static Source, seed, turns: u32| {
        let driver = device(seed)?;
        let (y, x) = (upload(&driver, &[7u32; 96]), upload(&driver, &x));
        let args: [&[u8]; 3] = [bytemuck::bytes_of(&y), bytemuck::bytes_of(&x), bytemuck::bytes_of(&turns)];
        let done = launch_bytes(&driver, source, "relay", config(64), &args);
        Some(done.map(|()| download::<u32>(&driver, y, 96)))
    };
    for seed in 0..20 {
        // Once so often that the simulator's time is used up and begins anew.
        let turns = if seed == 1 { 45_000 } else { 3 };
        let Some(found) = run(sound, seed, turns) else { return };
        let last = turns - 3;
        let expected: Vec<u32> = (0..96).map(|i| x[(i % 32 + 1) % 32].wrapping_add(last + i as u32 / 32)).collect();
        assert_eq!(found.unwrap(), expected, "seed {seed}");
    }
    for (line, to, message) in [
        ("            warp_barrier();  // BEFORE\n", "\n", "wrote: expected a barrier in between"),
        ("            barrier_wait(barriers[0], turn % 2);  // WAIT\n", "\n", "expected a barrier in between"),
        ("            barrier_arrive(barriers[1]);  // BACK\n", "\n", "for 32 more arrivals and 0 more bytes"),
        ("barrier_init(barriers[1], WARP)", "barrier_init(barriers[1], 1)", "in a deadlock"),
        ("barrier_init(barriers[0], 1)", "barrier_init(barriers[0], 2)", "for 1 more arrivals and 0 more bytes"),
    ] {
        let error = run(planted("simulator/hopper.cu", line, to), 0, 3).unwrap().unwrap_err().to_string();
        assert!(error.contains(message), "without {line:?}: expected {message:?} in\n{error}");
    }
}

/// What the warps of each half tell each other; and each of the barrier's steps left out.
#[test]
fn warps_meet_under_a_name() {
    let x = scrambled(128, 7);
    let run = |source: &'static Source, seed, turns: u32| {
        let driver = device(seed)?;
        let (y, x) = (upload(&driver, &[7u32; 128]), upload(&driver, &x));
        let args: [&[u8]; 3] = [bytemuck::bytes_of(&y), bytemuck::bytes_of(&x), bytemuck::bytes_of(&turns)];
        let done = launch_bytes(&driver, source, "halves", config(128), &args);
        Some(done.map(|()| download::<u32>(&driver, y, 128)))
    };
    for seed in 0..20 {
        // Once so often that the simulator's time is used up and begins anew.
        let turns = if seed == 1 { 140_000 } else { 3 };
        let Some(found) = run(source("simulator/hopper.cu"), seed, turns) else { return };
        let expected: Vec<u32> = (0..128).map(|t| x[t / 64 * 64 + (t + 33) % 64].wrapping_add(turns - 1)).collect();
        assert_eq!(found.unwrap(), expected, "seed {seed}");
    }
    let written = "        named_barrier(1 + half, 64);  // WRITTEN\n";
    for (line, to, message) in [
        (written, "\n", "wrote: expected a barrier in between"),
        ("        named_barrier(1 + half, 64);  // READ\n", "\n", "read: expected a barrier in between"),
        (written, "        named_barrier(1 + t / 32, 32);\n", "expected a barrier in between"),
        (written, "        named_barrier(1 + half, 96);\n", "in a deadlock"),
        (written, "        named_barrier(1, 96 + half * 32);\n", "expected as many threads as others that are there"),
        (
            written,
            "        named_barrier(half, 64);\n",
            "expected a name of 1 to 15 and whole warps of the block, found 0",
        ),
        (written, "        named_barrier(1 + t % 2, 64);\n", "expected one name in all lanes of a warp"),
        (written, "        named_barrier(1 + half, 48);\n", "whole warps of the block, found 1 and 48 threads"),
        (written, "        if (t % 32 > 0) named_barrier(1 + half, 64);\n", "expected its whole warp at one call"),
        ("shared.words[half * 64 + (t + 33) % 64]", "shared.words[t ^ 64]", "expected a barrier in between"),
    ] {
        let error = run(planted("simulator/hopper.cu", line, to), 0, 3).unwrap().unwrap_err().to_string();
        assert!(error.contains(message), "with {to:?}: expected {message:?} in\n{error}");
    }
}

/// The guide's own example, as a reader would copy it.
#[test]
fn the_guides_example_is_right() {
    let guide = std::fs::read_to_string(path("../src/backend/cuda/guide.md")).expect("readable");
    let example = guide.split("```cuda\n").find(|part| part.contains(" small(")).expect("the example");
    let source = source_of("small.cu", example.split("```").next().unwrap());
    let (n, k) = (128usize, 320usize);
    let small = |len: usize, seed: u32| scrambled(len, seed).into_iter().map(|v| (v % 127) as f32 / 8.0 - 7.5);
    let [a, b] = [(64, 1), (n, 2)].map(|(rows, seed)| small(rows * k, seed).map(bf16::from_f32).collect::<Vec<bf16>>());
    let address = |driver: &_, values: &[bf16]| upload(driver, bytemuck::cast_slice::<bf16, u16>(values));
    for seed in 0..20 {
        let Some(driver) = device(seed) else { return };
        let y = upload(&driver, &vec![f32::NAN; 64 * n]);
        let map = |what, address, rows, box_rows| {
            driver.tensor_map(&MapSpec { what, address, rows, cols: k, stride: k, box_rows }).unwrap()
        };
        let (left, right) = (map("a", address(&driver, &a), 64, 64), map("b", address(&driver, &b), n, 128));
        let blocks = k as u32;
        let args: [&[u8]; 4] = [bytemuck::bytes_of(&y), left.bytes(), right.bytes(), bytemuck::bytes_of(&blocks)];
        let config = LaunchConfig::linear(1, 256).with_shared(2 * (64 + 128) * 128 + 32);
        launch_bytes(&driver, source, "small", config, &args).unwrap();
        let found = download::<f32>(&driver, y, 64 * n);
        for (i, &found) in found.iter().enumerate() {
            let (row, col) = (i / n, i % n);
            let sum: f32 = (0..k).map(|j| a[row * k + j].to_f32() * b[col * k + j].to_f32()).sum();
            assert_eq!(found, sum, "seed {seed}: y[{row}][{col}]");
        }
    }
}

#[test]
fn the_last_threads_of_a_large_block_are_no_barriers() {
    for seed in SEEDS {
        let Some(driver) = device(seed) else { return };
        let y = upload(&driver, &[0u32; 1024]);
        let args: [&[u8]; 1] = [bytemuck::bytes_of(&y)];
        let done = launch_bytes(&driver, source("simulator/hopper.cu"), "crowd", config(1024), &args);
        let error = done.unwrap_err().to_string();
        assert!(
            error.contains("expected a barrier in between") && error.contains("which thread ("),
            "seed {seed}: {error}"
        );
    }
}
