//! Products of packed rows with bfloat16 tokens by the processor's own products of pairs, AVX512-BF16.
//!
//! A row is cut into units of 64 elements. Lane l of 16 adds, unit by unit, the products of elements 4 l and 4 l + 2,
//! then those of 4 l + 1 and 4 l + 3, with table entries rounded to bfloat16; where a block ends, its sum times the
//! scale is added, fused, to that of the blocks before. The lanes are added as in `matvec.rs`. Subnormal bfloat16 count
//! as 0.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use half::bf16;

use super::Staged;
use crate::matvec::Strip;

const UNIT: usize = bf16::UNIT;
const BYTES: usize = UNIT / 2;

/// See [`Staged::strip_products`].
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and BF16; the strip's parts fit each other and `sums`, with at least one
/// column.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn strip_products(strip: &Strip<'_, bf16>, sums: &mut [f32]) {
    // SAFETY: the caller's promise. Of the usual block size the compiler knows that it is one unit.
    unsafe {
        match strip.block_size {
            UNIT => strip_products_by::<1>(strip, sums),
            _ => strip_products_by::<0>(strip, sums),
        }
    }
}

/// Blocks have `PER_BLOCK` units, or any number where it is 0.
///
/// # Safety
/// As [`strip_products`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn strip_products_by<const PER_BLOCK: usize>(strip: &Strip<'_, bf16>, sums: &mut [f32]) {
    let tokens = strip.tokens.len() / strip.token_len();
    let rows = sums.len() / tokens;
    let mut row = 0;
    // SAFETY: the caller's promise, for rows and tokens that are there.
    unsafe {
        if tokens == 1 {
            while row + 8 <= rows {
                tile::<8, 1, PER_BLOCK>(strip, row, 0, 1, sums);
                row += 8;
            }
        }
        while row + 2 <= rows {
            tiles::<2, PER_BLOCK>(strip, row, tokens, sums);
            row += 2;
        }
        if row < rows {
            tiles::<1, PER_BLOCK>(strip, row, tokens, sums);
        }
    }
}

/// All tokens of `R` rows.
///
/// # Safety
/// As [`strip_products`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn tiles<const R: usize, const PER_BLOCK: usize>(
    strip: &Strip<'_, bf16>,
    row: usize,
    tokens: usize,
    sums: &mut [f32],
) {
    let mut token = 0;
    while token < tokens {
        // SAFETY: the caller's promise.
        unsafe {
            match tokens - token {
                1 => tile::<R, 1, PER_BLOCK>(strip, row, token, tokens, sums),
                2 => tile::<R, 2, PER_BLOCK>(strip, row, token, tokens, sums),
                3 => tile::<R, 3, PER_BLOCK>(strip, row, token, tokens, sums),
                _ => tile::<R, 4, PER_BLOCK>(strip, row, token, tokens, sums),
            }
        }
        token += 4;
    }
}

/// `R` rows with `T` tokens, their sums in registers.
///
/// # Safety
/// As [`strip_products`]; the rows and tokens are there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn tile<const R: usize, const T: usize, const PER_BLOCK: usize>(
    strip: &Strip<'_, bf16>,
    row: usize,
    token: usize,
    tokens: usize,
    sums: &mut [f32],
) {
    let (bytes_per_row, blocks) = (strip.bytes_per_row(), strip.blocks_per_row());
    let per_block = if PER_BLOCK > 0 { PER_BLOCK } else { strip.block_size / UNIT };
    let (units, whole) = (strip.cols / UNIT, strip.cols / UNIT / per_block);
    // SAFETY: the table has 16 entries; rows and tokens lie in the strip.
    let (table, codes, absmax, x) = unsafe {
        (
            _mm512_loadu_ps(strip.table.as_ptr()),
            strip.codes.as_ptr().add(row * bytes_per_row),
            strip.absmax.as_ptr().add(row * blocks),
            strip.tokens.as_ptr().add(token * strip.token_len()),
        )
    };
    // Twice the same 16 words: the permutation's fifth index bit then makes no difference.
    // SAFETY: 16 bfloat16 are 32 bytes.
    let table = _mm512_broadcast_i64x4(unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(table)) });
    // The rows that come next are where these end; the first tokens see them.
    let ahead = if token == 0 { R * bytes_per_row } else { 0 };
    let mut accumulators = [[_mm512_setzero_ps(); R]; T];
    for block in 0..blocks {
        let mut of_block = [[_mm512_setzero_ps(); R]; T];
        let first = block * per_block;
        for unit in first..first + if block < whole { per_block } else { units - first } {
            let mut bytes = [_mm256_setzero_si256(); R];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: a full unit's 32 bytes lie in the row. Prefetching may name any address.
                unsafe {
                    let from = codes.add(r * bytes_per_row + unit * BYTES);
                    *bytes = _mm256_loadu_si256(from.cast());
                    if ahead > 0 && unit.is_multiple_of(2) {
                        let next = from.wrapping_add(ahead).cast();
                        // These rows, the next and a token would not fit the first-level cache together.
                        if T == 1 { _mm_prefetch::<_MM_HINT_T1>(next) } else { _mm_prefetch::<_MM_HINT_T0>(next) }
                    }
                }
            }
            // SAFETY: a staged token has 64 elements for each unit.
            unsafe { step(&bytes, table, x.add(unit * UNIT), strip.token_len(), &mut of_block) };
        }
        if block + 1 == blocks && units * UNIT < strip.cols {
            let mut bytes = [_mm256_setzero_si256(); R];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: the tail has 32 bytes.
                *bytes = unsafe { _mm256_loadu_si256(strip.tail::<BYTES>(row + r).as_ptr().cast()) };
            }
            // SAFETY: as above; tokens are padded to whole units.
            unsafe { step(&bytes, table, x.add(units * UNIT), strip.token_len(), &mut of_block) };
        }
        for r in 0..R {
            // SAFETY: a row has as many scales as blocks.
            let scale = _mm512_set1_ps(unsafe { *absmax.add(r * blocks + block) });
            for (sum, of_block) in accumulators.iter_mut().zip(&of_block) {
                sum[r] = _mm512_fmadd_ps(of_block[r], scale, sum[r]);
            }
        }
    }
    for (t, accumulators) in accumulators.iter().enumerate() {
        for (r, lanes) in accumulators.iter().enumerate() {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(*lanes), _mm512_extractf32x8_ps::<1>(*lanes));
            sums[(row + r) * tokens + token + t] = super::matvec_avx2::sum(eight);
        }
    }
}

/// One unit: 64 weights of each row, before their scale, with those of each token.
///
/// # Safety
/// 64 elements are readable at `x` and at every `stride` elements after it; the processor has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn step<const R: usize, const T: usize>(
    bytes: &[__m256i; R],
    table: __m512i,
    x: *const bf16,
    stride: usize,
    sums: &mut [[__m512; R]; T],
) {
    let (mut even, mut odd) = ([table; R], [table; R]);
    for r in 0..R {
        let index = _mm512_cvtepu8_epi16(bytes[r]);
        even[r] = _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(index), table);
        odd[r] = _mm512_permutexvar_epi16(index, table);
    }
    for (t, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise; 32 bfloat16 are 64 bytes.
        let (x_even, x_odd) = unsafe {
            let x = x.add(t * stride);
            (pairs(_mm512_loadu_si512(x.cast())), pairs(_mm512_loadu_si512(x.add(UNIT / 2).cast())))
        };
        for r in 0..R {
            // SAFETY: as above.
            let (even, odd) = unsafe { (pairs(even[r]), pairs(odd[r])) };
            sums[r] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sums[r], even, x_even), odd, x_odd);
        }
    }
}

/// # Safety
/// The processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, of which any are valid.
    unsafe { std::mem::transmute(words) }
}
