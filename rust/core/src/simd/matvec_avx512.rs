//! Products of packed rows with tokens, AVX-512: 16 weights of a row at a time from a permutation of its block's values.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use super::matvec::{Ahead, Corner, tiles};
use crate::matvec::{LANES, LINE, Strip, UNIT};

/// See [`crate::matvec::strip_products`].
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL; the strip's parts fit each other and `sums`, with at least one column.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn strip_products(strip: &Strip<'_, f32>, sums: &mut [f32]) {
    // SAFETY: the caller's promise. Of the usual block size the compiler knows how long its loop is.
    unsafe {
        match strip.block_size {
            64 => strip_products_by::<2>(strip, sums),
            _ => strip_products_by::<0>(strip, sums),
        }
    }
}

/// Blocks have `PER_BLOCK` units, or any number where it is 0.
///
/// # Safety
/// As [`strip_products`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn strip_products_by<const PER_BLOCK: usize>(strip: &Strip<'_, f32>, sums: &mut [f32]) {
    let tokens = strip.tokens.len() / strip.token_len();
    let rows = sums.len() / tokens;
    let mut row = 0;
    // SAFETY: the caller's promise, for rows and tokens that are there.
    unsafe {
        if tokens == 1 {
            while row + 4 <= rows {
                tile::<4, 1, PER_BLOCK>(strip, row, 0, 1, sums);
                row += 4;
            }
        }
        while row + 4 <= rows {
            tiles::<4, PER_BLOCK>(strip, row, tokens, sums);
            row += 4;
        }
        while row < rows {
            tiles::<1, PER_BLOCK>(strip, row, tokens, sums);
            row += 1;
        }
    }
}

tiles!(tiles, tile, f32, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

/// `R` rows with `T` tokens, their sums in registers.
///
/// # Safety
/// As [`strip_products`]; the rows and tokens are there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn tile<const R: usize, const T: usize, const PER_BLOCK: usize>(
    strip: &Strip<'_, f32>,
    row: usize,
    token: usize,
    tokens: usize,
    sums: &mut [f32],
) {
    let (bytes_per_row, blocks) = (strip.bytes_per_row(), strip.blocks_per_row());
    let per_block = if PER_BLOCK > 0 { PER_BLOCK } else { strip.block_size / UNIT };
    let (units, whole) = (strip.cols / UNIT, strip.cols / UNIT / per_block);
    // SAFETY: the table has 16 entries; rows and tokens lie in the strip.
    let (table, Corner { codes, absmax, x }) =
        unsafe { (_mm512_loadu_ps(strip.table.as_ptr()), Corner::of(strip, row, token)) };
    // The first tokens see to the rows that come next.
    let ahead = (token == 0).then(|| Ahead::of(strip, row, R));
    let mut accumulators = [[_mm512_setzero_ps(); R]; T];
    for block in 0..blocks {
        let mut values = [table; R];
        for (r, values) in values.iter_mut().enumerate() {
            // SAFETY: a row has as many scales as blocks.
            *values = _mm512_mul_ps(table, _mm512_set1_ps(unsafe { *absmax.add(r * blocks + block) }));
        }
        if let Some(ahead) = ahead {
            ahead.scale(R * block);
        }
        let first = block * per_block;
        for unit in first..first + if block < whole { per_block } else { units - first } {
            let mut bytes = [_mm_setzero_si128(); R];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: a full unit's 16 bytes lie in the row.
                *bytes = unsafe { _mm_loadu_si128(codes.add(r * bytes_per_row + unit * LANES).cast()) };
                if let Some(ahead) = ahead.filter(|_| unit.is_multiple_of(LINE / LANES)) {
                    ahead.codes(unit / (LINE / LANES) * R + r);
                }
            }
            // SAFETY: a staged token has 32 floats for each unit.
            unsafe { step(&bytes, &values, x.add(unit * UNIT), strip.token_len(), &mut accumulators) };
        }
        if block + 1 == blocks && units * UNIT < strip.cols {
            let mut bytes = [_mm_setzero_si128(); R];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: the tail has 16 bytes.
                *bytes = unsafe { _mm_loadu_si128(strip.tail::<LANES>(row + r).as_ptr().cast()) };
            }
            // SAFETY: as above; tokens are padded to whole units.
            unsafe { step(&bytes, &values, x.add(units * UNIT), strip.token_len(), &mut accumulators) };
        }
    }
    for (t, accumulators) in accumulators.iter().enumerate() {
        for (r, lanes) in accumulators.iter().enumerate() {
            sums[(row + r) * tokens + token + t] = sum(*lanes);
        }
    }
}

/// Lane l + 8 to l, then l + 4, l + 2 and l + 1.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn sum(lanes: __m512) -> f32 {
    let eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
    super::matvec_avx2::sum(eight)
}

/// One unit: 32 weights of each row, by the values that its block's codes stand for, with those of each token.
///
/// # Safety
/// 32 floats are readable at `x` and at every `stride` floats after it; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn step<const R: usize, const T: usize>(
    bytes: &[__m128i; R],
    values: &[__m512; R],
    x: *const f32,
    stride: usize,
    accumulators: &mut [[__m512; R]; T],
) {
    let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
    for r in 0..R {
        // The permutation looks at the lowest four bits only.
        let index = _mm512_cvtepu8_epi32(bytes[r]);
        even[r] = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(index), values[r]);
        odd[r] = _mm512_permutexvar_ps(index, values[r]);
    }
    for (t, accumulators) in accumulators.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let (x_even, x_odd) =
            unsafe { (_mm512_loadu_ps(x.add(t * stride)), _mm512_loadu_ps(x.add(t * stride + LANES))) };
        for r in 0..R {
            let sum = _mm512_fmadd_ps(even[r], x_even, accumulators[r]);
            accumulators[r] = _mm512_fmadd_ps(odd[r], x_odd, sum);
        }
    }
}
