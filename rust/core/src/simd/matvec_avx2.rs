//! Products of packed rows with tokens, AVX2: 8 weights at a time from two permutations of half a table and a blend.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use crate::matvec::{LANES, Strip, UNIT};

/// See [`crate::matvec::strip_products`].
///
/// # Safety
/// The processor has AVX2 and FMA; the strip's parts fit each other and `sums`, with at least one column.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn strip_products(strip: &Strip<'_, f32>, sums: &mut [f32]) {
    let tokens = strip.tokens.len() / strip.token_len();
    let rows = sums.len() / tokens;
    let mut row = 0;
    // SAFETY: the caller's promise, for rows and tokens that are there.
    unsafe {
        if tokens == 1 {
            while row + 2 <= rows {
                tile::<2, 1>(strip, row, 0, 1, sums);
                row += 2;
            }
        }
        while row < rows {
            let mut token = 0;
            while token < tokens {
                match tokens - token {
                    1 => tile::<1, 1>(strip, row, token, tokens, sums),
                    2 => tile::<1, 2>(strip, row, token, tokens, sums),
                    3 => tile::<1, 3>(strip, row, token, tokens, sums),
                    _ => tile::<1, 4>(strip, row, token, tokens, sums),
                }
                token += 4;
            }
            row += 1;
        }
    }
}

/// `R` rows with `T` tokens, their sums in registers: lanes 0 to 7 and 8 to 15.
///
/// # Safety
/// As [`strip_products`]; the rows and tokens are there.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const R: usize, const T: usize>(
    strip: &Strip<'_, f32>,
    row: usize,
    token: usize,
    tokens: usize,
    sums: &mut [f32],
) {
    let (bytes_per_row, blocks) = (strip.bytes_per_row(), strip.blocks_per_row());
    let (full, per_block) = (strip.cols / UNIT, strip.block_size / UNIT);
    // SAFETY: the table has 16 entries; rows and tokens lie in the strip.
    let (table, codes, absmax, x) = unsafe {
        (
            [_mm256_loadu_ps(strip.table.as_ptr()), _mm256_loadu_ps(strip.table.as_ptr().add(8))],
            strip.codes.as_ptr().add(row * bytes_per_row),
            strip.absmax.as_ptr().add(row * blocks),
            strip.tokens.as_ptr().add(token * strip.token_len()),
        )
    };
    let mut accumulators = [[[_mm256_setzero_ps(); 2]; T]; R];
    for block in 0..blocks {
        let mut values = [table; R];
        for (r, values) in values.iter_mut().enumerate() {
            // SAFETY: a row has as many scales as blocks.
            let absmax = _mm256_set1_ps(unsafe { *absmax.add(r * blocks + block) });
            *values = [_mm256_mul_ps(table[0], absmax), _mm256_mul_ps(table[1], absmax)];
        }
        for unit in block * per_block..full.min((block + 1) * per_block) {
            for r in 0..R {
                // SAFETY: a full unit's 16 bytes lie in the row; a staged token has 32 floats for each unit.
                unsafe {
                    let bytes = _mm_loadu_si128(codes.add(r * bytes_per_row + unit * LANES).cast());
                    step(bytes, values[r], x.add(unit * UNIT), strip.token_len(), &mut accumulators[r]);
                }
            }
        }
        if block + 1 == blocks && full * UNIT < strip.cols {
            for r in 0..R {
                // SAFETY: the tail has 16 bytes; tokens are padded to whole units.
                unsafe {
                    let bytes = _mm_loadu_si128(strip.tail::<LANES>(row + r).as_ptr().cast());
                    step(bytes, values[r], x.add(full * UNIT), strip.token_len(), &mut accumulators[r]);
                }
            }
        }
    }
    for (r, accumulators) in accumulators.iter().enumerate() {
        for (t, [low, high]) in accumulators.iter().enumerate() {
            sums[(row + r) * tokens + token + t] = sum(_mm256_add_ps(*low, *high));
        }
    }
}

/// One unit: 32 weights of a row, by the values that its block's codes stand for, with those of each token.
///
/// # Safety
/// 32 floats are readable at `x` and at every `stride` floats after it; the processor has AVX2 and FMA.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<const T: usize>(
    bytes: __m128i,
    values: [__m256; 2],
    x: *const f32,
    stride: usize,
    accumulators: &mut [[__m256; 2]; T],
) {
    for (half, bytes) in [bytes, _mm_srli_si128::<8>(bytes)].into_iter().enumerate() {
        let index = _mm256_cvtepu8_epi32(bytes);
        let even = look_up(_mm256_srli_epi32::<4>(index), values);
        let odd = look_up(index, values);
        for (t, accumulators) in accumulators.iter_mut().enumerate() {
            // SAFETY: the caller's promise; the offsets are 0, 8, 16 and 24.
            let (x_even, x_odd) = unsafe {
                let x = x.add(t * stride + 8 * half);
                (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(LANES)))
            };
            accumulators[half] = _mm256_fmadd_ps(even, x_even, accumulators[half]);
            accumulators[half] = _mm256_fmadd_ps(odd, x_odd, accumulators[half]);
        }
    }
}

/// Entries of a table of 16, by the lowest four bits of each index.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up(index: __m256i, [low, high]: [__m256; 2]) -> __m256 {
    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)); // bit 3 becomes the sign
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper)
}

/// Lane l + 4 to l, then l + 2, then l + 1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(eight: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
