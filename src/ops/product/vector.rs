//! Arithmetic on rows, in whole vectors.

/// Σ a·b in sixteen running sums, so that the compiler may use whole vectors; the order is fixed.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    folded(sums) + rest
}

/// The sum of sixteen running sums, in pairs: four steps, not fifteen.
#[inline(always)]
pub(crate) fn folded(s: [f32; 16]) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = s[i] + s[i + 8];
    }
    for i in 0..4 {
        four[i] = eight[i] + eight[i + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The largest of sixteen running maxima, in pairs.
#[inline(always)]
fn largest(s: [f32; 16]) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = if s[i + 8] > s[i] { s[i + 8] } else { s[i] };
    }
    for i in 0..4 {
        four[i] = if eight[i + 4] > eight[i] { eight[i + 4] } else { eight[i] };
    }
    four.iter().fold(f32::NEG_INFINITY, |top, &s| if s > top { s } else { top })
}

/// The largest of `row`; −∞ where there is none.
#[inline(always)]
pub(crate) fn maximum(row: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; 16];
    let blocks = row.chunks_exact(16);
    let rest = blocks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    for block in blocks {
        for i in 0..16 {
            tops[i] = if block[i] > tops[i] { block[i] } else { tops[i] };
        }
    }
    let top = largest(tops);
    if rest > top { rest } else { top }
}

/// Σ s in sixteen running sums; the order is fixed.
#[inline(always)]
pub(crate) fn total(s: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let blocks = s.chunks_exact(16);
    let rest: f32 = blocks.remainder().iter().sum();
    for block in blocks {
        for i in 0..16 {
            sums[i] += block[i];
        }
    }
    folded(sums) + rest
}

/// y += factor·x.
#[inline(always)]
pub(crate) fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// Declares a function that is compiled for the widest vectors the processor at hand has. A release binary is built for the
/// oldest processor of its kind; the body, and what is `#[inline(always)]` in it, is compiled again for newer ones. (A closure or
/// a function passed to a helper would not do: the compiler may keep it as one function, for the oldest processor.)
/// `fn name<'a>[simd](…)` also gives the body the processor's vectors under that name.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime>$([$simd:ident])?($($argument:ident: $type:ty),* $(,)?) -> $output:ty $body:block) => {
        $(#[$meta])*
        $vis fn $name<$life>($($argument: $type),*) -> $output {
            struct Work<$life> {
                $($argument: $type,)*
                life: std::marker::PhantomData<&$life ()>,
            }
            impl<$life> pulp::WithSimd for Work<$life> {
                type Output = $output;

                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, simd: S) -> $output {
                    let Work { $($argument,)* life: _ } = self;
                    $(let $simd = simd;)?
                    let _ = simd;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Work { $($argument,)* life: std::marker::PhantomData })
        }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$life:lifetime>$([$simd:ident])?($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        simd! { $(#[$meta])* $vis fn $name<$life>$([$simd])?($($argument: $type),*) -> () $body }
    };
}
pub(crate) use simd;

/// e^x to about one unit in the last place, in arithmetic that the compiler turns into whole vectors (libm's `expf` is a call
/// per element). Cody–Waite reduction to |r| ≤ ln 2 / 2, then a polynomial of degree six (coefficients of Cephes `expf`).
/// Below -87.3 it is 0, above 88.7 infinite; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-88.0, 89.0);
    // Adding 1.5·2²³ rounds to the nearest whole number and leaves it in the lowest bits, as vectors of integers can read it.
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let e = (p * r).mul_add(r, r) + 1.0;
    // 2^n in two factors: n reaches ±128, one exponent field does not.
    let whole = (shifted.to_bits() as i32).wrapping_sub(0x4B40_0000);
    let half = whole >> 1;
    let rest = whole.wrapping_sub(half);
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    if x < -87.3 { 0.0 } else { e * scale(half) * scale(rest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_two_units() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() <= 2.5e-7, "exp({x}): found {found}, expected {expected}");
        }
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(100.0), f32::INFINITY);
    }
}
