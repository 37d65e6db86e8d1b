//! Products of float32 rows with float32 tokens, in one order of sums.
//!
//! Lane l of 16 adds the products of elements l, l + 16, l + 32, ..., each by a fused multiply-add; at the end lane l + 8
//! is added to l, then l + 4, l + 2 and l + 1.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use super::{SimdLevel, matvec_avx2, matvec_avx512};
use crate::matvec::{LANES, add_lanes};

/// `sums` (rows, tokens) of `rows` and `tokens`, each of `len` elements, a multiple of 16 above 0.
pub(super) fn products(level: SimdLevel, rows: &[f32], tokens: &[f32], len: usize, sums: &mut [f32]) {
    assert!(level <= SimdLevel::detected(), "the processor has no {}", level.as_str());
    assert!(len > 0 && len.is_multiple_of(LANES));
    let (count, all) = (rows.len() / len, tokens.len() / len);
    assert!(rows.len() == count * len && tokens.len() == all * len && sums.len() == count * all);
    match level {
        SimdLevel::Scalar => {
            for (row, sums) in rows.chunks_exact(len).zip(sums.chunks_exact_mut(all)) {
                for (token, sum) in tokens.chunks_exact(len).zip(sums) {
                    *sum = product(row, token);
                }
            }
        }
        // SAFETY: the processor has the features and the lengths fit, as just seen.
        SimdLevel::Avx2 => unsafe { tiles_avx2(rows, tokens, len, sums) },
        // SAFETY: as above.
        SimdLevel::Avx512 => unsafe { tiles_avx512(rows, tokens, len, sums) },
    }
}

/// The truth.
fn product(row: &[f32], token: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (row, token) in row.chunks_exact(LANES).zip(token.chunks_exact(LANES)) {
        for ((sum, value), x) in lanes.iter_mut().zip(row).zip(token) {
            *sum = value.mul_add(*x, *sum);
        }
    }
    add_lanes(lanes)
}

/// `$tile::<R, T>` over all rows and tokens, with up to `$most` rows and four tokens at a time.
macro_rules! tiled {
    ($name:ident, $tile:ident, $most:literal, $features:literal) => {
        /// # Safety
        /// The processor has the features; the lengths are as [`products`] checks them.
        #[target_feature(enable = $features)]
        unsafe fn $name(rows: &[f32], tokens: &[f32], len: usize, sums: &mut [f32]) {
            let (count, all) = (rows.len() / len, tokens.len() / len);
            let mut row = 0;
            while row < count {
                let height = if count - row >= $most { $most } else { 1 };
                for token in (0..all).step_by(4) {
                    // SAFETY: these rows and tokens are there.
                    unsafe {
                        let (w, x) = (rows.as_ptr().add(row * len), tokens.as_ptr().add(token * len));
                        let sums = &mut sums[row * all + token..];
                        match (height, all - token) {
                            (1, 1) => $tile::<1, 1>(w, x, len, all, sums),
                            (1, 2) => $tile::<1, 2>(w, x, len, all, sums),
                            (1, 3) => $tile::<1, 3>(w, x, len, all, sums),
                            (1, _) => $tile::<1, 4>(w, x, len, all, sums),
                            (_, 1) => $tile::<$most, 1>(w, x, len, all, sums),
                            (_, 2) => $tile::<$most, 2>(w, x, len, all, sums),
                            (_, 3) => $tile::<$most, 3>(w, x, len, all, sums),
                            _ => $tile::<$most, 4>(w, x, len, all, sums),
                        }
                    }
                }
                row += height;
            }
        }
    };
}

tiled!(tiles_avx512, tile_avx512, 4, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
tiled!(tiles_avx2, tile_avx2, 1, "avx2,fma,f16c");

/// `R` rows with `T` tokens; sums of a row lie `all` before those of the next.
///
/// # Safety
/// The rows and tokens are there; the processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tile_avx512<const R: usize, const T: usize>(
    rows: *const f32,
    tokens: *const f32,
    len: usize,
    all: usize,
    sums: &mut [f32],
) {
    let mut lanes = [[_mm512_setzero_ps(); T]; R];
    for at in (0..len).step_by(LANES) {
        let mut x = [_mm512_setzero_ps(); T];
        for (t, x) in x.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *x = unsafe { _mm512_loadu_ps(tokens.add(t * len + at)) };
        }
        for (r, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let row = unsafe { _mm512_loadu_ps(rows.add(r * len + at)) };
            for (sum, x) in lanes.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(row, x, *sum);
            }
        }
    }
    for (r, lanes) in lanes.iter().enumerate() {
        for (t, lanes) in lanes.iter().enumerate() {
            sums[r * all + t] = matvec_avx512::sum(*lanes);
        }
    }
}

/// As [`tile_avx512`]: lanes 0 to 7 and 8 to 15.
///
/// # Safety
/// The rows and tokens are there; the processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_avx2<const R: usize, const T: usize>(
    rows: *const f32,
    tokens: *const f32,
    len: usize,
    all: usize,
    sums: &mut [f32],
) {
    let mut lanes = [[[_mm256_setzero_ps(); 2]; T]; R];
    for at in (0..len).step_by(LANES) {
        for (r, lanes) in lanes.iter_mut().enumerate() {
            for (t, lanes) in lanes.iter_mut().enumerate() {
                for (half, sum) in lanes.iter_mut().enumerate() {
                    // SAFETY: the caller's promise; the offsets are 0 and 8.
                    unsafe {
                        let row = _mm256_loadu_ps(rows.add(r * len + at + 8 * half));
                        *sum = _mm256_fmadd_ps(row, _mm256_loadu_ps(tokens.add(t * len + at + 8 * half)), *sum);
                    }
                }
            }
        }
    }
    for (r, lanes) in lanes.iter().enumerate() {
        for (t, [low, high]) in lanes.iter().enumerate() {
            sums[r * all + t] = matvec_avx2::sum(_mm256_add_ps(*low, *high));
        }
    }
}
