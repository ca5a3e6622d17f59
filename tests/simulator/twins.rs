//! Each function of `kernels/sim.h` against the PTX ISA's formula for the instruction in whose place it stands.

use ares::backend::cuda::driver::{Arch, LaunchConfig};
use bytemuck::Pod;
use half::bf16;

use crate::harness::{device, device_of, download, launch, scrambled, source, upload};

/// The `len` values that `kernel` makes of `inputs`: by a thread for each, or by one warp with shared memory.
fn run<T: Pod>(kernel: &str, len: usize, inputs: &[&[u32]], each: bool) -> Option<Vec<T>> {
    let driver = device(0)?;
    let mut args = vec![upload(&driver, &vec![7u32; len])];
    args.extend(inputs.iter().map(|input| upload(&driver, input)));
    args.extend(each.then_some(len as u64));
    let blocks = if each { len.div_ceil(32) as u32 } else { 1 };
    let config = LaunchConfig::linear(blocks, 32).with_shared(if each { 0 } else { 512 });
    launch(&driver, source("simulator/twins.cu"), kernel, config, &args).unwrap();
    Some(download(&driver, args[0], len))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// Every upper half with lower halves around the tie: to nearest, ties to even, NaN to 0x7fff.
#[test]
fn rounding_to_bf16() {
    let lower = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let bits: Vec<u32> = (0..1u32 << 16).flat_map(|high| lower.map(|low| high << 16 | low)).collect();
    let n = bits.len();
    let expected = |bits: u32| {
        let value = f32::from_bits(bits);
        if value.is_nan() { 0x7fff } else { u32::from(bf16::from_f32(value).to_bits()) }
    };
    let Some(one) = run::<u32>("round_one", n, &[&bits], true) else { return };
    let two = run::<u32>("round_two", n, &[&bits], true).unwrap();
    for i in 0..n {
        assert_eq!(one[i], expected(bits[i]), "{:#x}", bits[i]);
        assert_eq!(two[i], expected(bits[i]) | expected(bits[n - 1 - i]) << 16, "element {i}");
    }
}

/// ex2.approx.ftz: 2 ulp; subnormal results are zero.
#[test]
fn powers_of_two() {
    let mut x: Vec<f32> = (-1600..1300).map(|i| i as f32 * 0.1).collect();
    x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1e-40, 128.0, -126.0, -126.5]);
    let Some(found) = run::<f32>("powers", x.len(), &[&bits(&x)], true) else { return };
    for (&x, found) in x.iter().zip(found) {
        let exact = f64::from(x).exp2();
        if exact.is_nan() {
            assert!(found.is_nan());
        } else if exact < f64::from(f32::MIN_POSITIVE) {
            assert_eq!(found.to_bits(), 0, "2^{x}");
        } else if exact > f64::from(f32::MAX) {
            assert_eq!(found, f32::INFINITY, "2^{x}");
        } else {
            assert!((f64::from(found) / exact - 1.0).abs() <= 2.0 * f64::from(f32::EPSILON), "2^{x}: {found} {exact}");
        }
    }
}

/// rcp.approx.ftz: 1 ulp; subnormal numbers count as zero.
#[test]
fn reciprocals() {
    let mut x: Vec<f32> = (-1000..1000).map(|i| 1.013_f32.powi(i) * if i % 2 == 0 { 1e13 } else { -1e-13 }).collect();
    x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1e-40, 5e-39, -5e-39, f32::MAX, -3e38]);
    let Some(found) = run::<f32>("reciprocals", x.len(), &[&bits(&x)], true) else { return };
    for (&x, found) in x.iter().zip(found) {
        let flushed = if x.is_subnormal() { 0.0_f32.copysign(x) } else { x };
        let exact = 1.0 / f64::from(flushed);
        if exact.is_nan() || exact.is_infinite() || exact.abs() < f64::from(f32::MIN_POSITIVE) {
            let expected = if (exact as f32).is_subnormal() { 0.0_f32.copysign(x) } else { exact as f32 };
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "1/{x}: {found}");
        } else {
            assert!((f64::from(found) / exact - 1.0).abs() <= f64::from(f32::EPSILON), "1/{x}: {found} {exact}");
        }
    }
}

#[test]
fn exchanges_within_a_warp() {
    let x: Vec<u32> = scrambled(32, 3).iter().map(|v| v & 0x7f7f_ffff).collect(); // no NaN, whose bits a float may lose
    let lanes: Vec<u32> = (0..32).map(|i| (i * 11 + 3) % 32).collect();
    let Some(found) = run::<u32>("exchanges", 128, &[&x, &lanes], false) else { return };
    let odd = (0..32).filter(|&i| x[i] % 2 == 1).fold(0u32, |bits, i| bits | 1 << i);
    for i in 0..32 {
        let (direct, crossed) = (x[lanes[i] as usize], x[i ^ 5]);
        assert_eq!(found[i], direct, "lane {i}");
        assert_eq!(found[32 + i], crossed, "lane {i}");
        assert_eq!(found[64 + i], odd, "lane {i}");
        assert_eq!(found[96 + i], direct ^ crossed, "lane {i}");
    }
}

#[test]
fn additions_to_shared_memory() {
    let x: Vec<u32> = scrambled(32, 5);
    let Some(found) = run::<u32>("additions", 64, &[&x], false) else { return };
    for i in 0..32 {
        let sum = (i % 4..32).step_by(4).fold(0u32, |sum, j| sum.wrapping_add(x[j]));
        assert_eq!((found[i], found[32 + i]), (sum, x[i].count_ones()), "lane {i}");
    }
}

/// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": element i of a lane's a, b, c lies at these
/// (row, column), with group = lane / 4 and inner = lane % 4.
mod fragment {
    pub fn a(lane: usize, i: usize) -> (usize, usize) {
        let row = if i < 2 || (4..6).contains(&i) { lane / 4 } else { lane / 4 + 8 };
        let col = if i < 4 { lane % 4 * 2 + i % 2 } else { lane % 4 * 2 + i % 2 + 8 };
        (row, col)
    }

    pub fn b(lane: usize, i: usize) -> (usize, usize) {
        let row = if i < 2 { lane % 4 * 2 + i % 2 } else { lane % 4 * 2 + i % 2 + 8 };
        (row, lane / 4)
    }

    pub fn c(lane: usize, i: usize) -> (usize, usize) {
        let row = if i < 2 { lane / 4 } else { lane / 4 + 8 };
        (row, lane % 4 * 2 + i % 2)
    }
}

/// (16, 8) = a (16, 16) · b (16, 8) + c.
fn product(arch: Arch, a: &[bf16], b: &[bf16], c: &[f32]) -> Option<Vec<f32>> {
    let (mut ra, mut rb, mut rc) = (vec![0u32; 128], vec![0u32; 64], vec![0.0f32; 128]);
    let at_a = |(row, col): (usize, usize)| a[row * 16 + col];
    let at_b = |(row, col): (usize, usize)| b[row * 8 + col];
    for lane in 0..32 {
        for r in 0..4 {
            ra[r * 32 + lane] = pair(at_a(fragment::a(lane, 2 * r)), at_a(fragment::a(lane, 2 * r + 1)));
            let (row, col) = fragment::c(lane, r);
            rc[r * 32 + lane] = c[row * 8 + col];
        }
        for r in 0..2 {
            rb[r * 32 + lane] = pair(at_b(fragment::b(lane, 2 * r)), at_b(fragment::b(lane, 2 * r + 1)));
        }
    }
    let driver = device_of(arch, 0)?;
    let args = [upload(&driver, &[7u32; 128]), upload(&driver, &ra), upload(&driver, &rb), upload(&driver, &rc)];
    launch(&driver, source("simulator/twins.cu"), "product", LaunchConfig::linear(1, 32), &args).unwrap();
    let (found, mut d) = (download::<f32>(&driver, args[0], 128), vec![f32::NAN; 128]);
    for (i, found) in found.into_iter().enumerate() {
        let (row, col) = fragment::c(i % 32, i / 32);
        d[row * 8 + col] = found;
    }
    Some(d)
}

#[test]
fn tensor_core_products() {
    // Small eighths: every product and sum is exact, so that each element must be right to the bit.
    let small = |len: usize, seed: u32| scrambled(len, seed).into_iter().map(|v| (v % 127) as f32 / 8.0 - 7.5);
    let a: Vec<bf16> = small(16 * 16, 1).map(bf16::from_f32).collect();
    let b: Vec<bf16> = small(16 * 8, 2).map(bf16::from_f32).collect();
    let c: Vec<f32> = small(16 * 8, 3).collect();
    let Some(found) = product(Arch::Sm80, &a, &b, &c) else { return };
    for (i, found) in found.into_iter().enumerate() {
        let (row, col) = (i / 8, i % 8);
        let sum: f64 = (0..16).map(|k| a[row * 16 + k].to_f64() * b[k * 8 + col].to_f64()).sum();
        assert_eq!(f64::from(found), sum + f64::from(c[i]), "D[{row}][{col}]");
    }
}

/// c and products, cut off `places` binary places below the largest exponent, added, cut off after 24 bits.
fn cut_off(c: f32, products: &[(f64, f64)], places: i32) -> f32 {
    let exponent = |v: f64| (v.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let largest = products.iter().map(|(a, b)| exponent(*a) + exponent(*b)).chain([exponent(c.into())]).max();
    let unit = 2f64.powi(largest.unwrap() - places);
    let sum: f64 = products.iter().map(|(a, b)| (a * b / unit).trunc()).chain([(f64::from(c) / unit).trunc()]).sum();
    let near = (sum * unit) as f32;
    if f64::from(near).abs() > (sum * unit).abs() { f32::from_bits(near.to_bits() - 1) } else { near }
}

/// Numbers far apart: what a chain of roundings would keep and the devices do not.
#[test]
fn tensor_cores_cut_off() {
    let spread = |len: usize, seed: u32| {
        scrambled(len, seed).into_iter().map(|v| {
            let size = (1.0 + (v & 0x7f) as f32 / 128.0) * 2f32.powi((v >> 7 & 15) as i32 - 8);
            if v >> 20 & 1 == 1 { -size } else { size }
        })
    };
    let a: Vec<bf16> = spread(16 * 16, 1).map(bf16::from_f32).collect();
    let b: Vec<bf16> = spread(16 * 8, 2).map(bf16::from_f32).collect();
    let c: Vec<f32> = spread(16 * 8, 3).zip(spread(16 * 8, 4)).map(|(x, y)| x * (1.0 + y / 1024.0)).collect();
    for (arch, block, places) in [(Arch::Sm80, 8, 24), (Arch::Sm90a, 16, 25)] {
        let Some(found) = product(arch, &a, &b, &c) else { return };
        let mut apart = 0;
        for (i, found) in found.into_iter().enumerate() {
            let (row, col) = (i / 8, i % 8);
            let pairs: Vec<(f64, f64)> = (0..16).map(|k| (a[row * 16 + k].to_f64(), b[k * 8 + col].to_f64())).collect();
            let expected = pairs.chunks(block).fold(c[i], |sum, pairs| cut_off(sum, pairs, places));
            assert_eq!(found, expected, "{arch}: D[{row}][{col}]");
            let rounded = pairs.iter().fold(c[i], |sum, (a, b)| sum + (a * b) as f32);
            apart += usize::from(found != rounded);
        }
        assert!(apart > 32, "{arch}: {apart} of 128 differ from a chain of roundings");
    }
    // What is not finite stays so, and touches nobody else.
    let mut broken = a.clone();
    broken[3 * 16 + 5] = bf16::INFINITY;
    let (Some(sound), Some(found)) = (product(Arch::Sm90a, &a, &b, &c), product(Arch::Sm90a, &broken, &b, &c)) else {
        return;
    };
    assert!((0..128).all(|i| if i / 8 == 3 { !found[i].is_finite() } else { found[i] == sound[i] }));
}

/// PTX ISA, ldmatrix: lane l of matrix m holds elements 2·(l%4) and the next of row l/4; with .trans of column l/4.
#[test]
fn matrices_from_shared_memory() {
    let words = scrambled(32 * 4, 9);
    let order: Vec<u32> = (0..32).map(|i| (i * 13 + 5) % 32).collect();
    let half = |row: usize, col: usize| words[row * 4 + col / 2] >> (16 * (col % 2)) & 0xffff;
    let Some(found) = run::<u32>("matrices", 256, &[&words, &order], false) else { return };
    for matrix in 0..4 {
        let row = |i: usize| order[8 * matrix + i] as usize;
        for lane in 0..32 {
            let (outer, inner) = (lane / 4, lane % 4 * 2);
            let plain = half(row(outer), inner) | half(row(outer), inner + 1) << 16;
            let transposed = half(row(inner), outer) | half(row(inner + 1), outer) << 16;
            assert_eq!(found[matrix * 32 + lane], plain, "matrix {matrix}, lane {lane}");
            assert_eq!(found[128 + matrix * 32 + lane], transposed, "transposed {matrix}, lane {lane}");
        }
    }
}

#[test]
fn copies_bring_bytes_or_zeros() {
    let words = scrambled(32 * 4, 17);
    let valid: Vec<u32> = (0..32).map(|i| u32::from(i % 5 != 2)).collect();
    let Some(found) = run::<u32>("copies", 128, &[&words, &valid], false) else { return };
    for lane in 0..32 {
        let from = (lane + 1) % 32;
        for i in 0..4 {
            let expected = if valid[from] == 1 { words[4 * from + i] } else { 0 };
            assert_eq!(found[4 * lane + i], expected, "lane {lane}, word {i}");
        }
    }
}
