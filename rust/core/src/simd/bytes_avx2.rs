//! AVX2 kernels for byte codes: codes by a cell and one exact comparison, values from the table in memory.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use super::avx2::{Lanes, top};
use crate::byte_search::ByteSearch;
use crate::codebook::Codebook;
use crate::quantize::begin_block;

/// Quantize full blocks. Returns whether every element was finite.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; there are `block_size` elements and as many bytes for each of `absmax`, and
/// `block_size` is a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn encode<T: Lanes>(
    input: &[T],
    block_size: usize,
    book: &Codebook,
    search: &ByteSearch,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let mut finite = true;
    for (block, absmax) in absmax.iter_mut().enumerate() {
        let elements = block * block_size..(block + 1) * block_size;
        // SAFETY: the lengths that the caller promises.
        let top = unsafe { top(input.as_ptr().add(elements.start), block_size) };
        let bytes = &mut codes[elements.clone()];
        let Some(inverse) = begin_block(top, &input[elements.clone()], book, bytes, absmax, &mut finite) else {
            continue;
        };
        let inverse = _mm256_set1_ps(inverse);
        for element in elements.step_by(8) {
            // SAFETY: the lengths that the caller promises.
            unsafe {
                let x = _mm256_mul_ps(T::load(input.as_ptr().add(element)), inverse);
                _mm_storel_epi64(codes.as_mut_ptr().add(element).cast(), find(x, search));
            }
        }
    }
    finite
}

/// Codes of eight normalized values, in the lower half.
///
/// # Safety
/// The processor has AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn find(x: __m256, search: &ByteSearch) -> __m128i {
    let number = |value: u32| _mm256_set1_epi32(value.cast_signed());
    let shift = _mm_cvtsi32_si128(search.shift.cast_signed());
    let rest = number((1 << search.shift) - 1);
    let magnitude = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x));
    let magnitude = _mm256_min_epu32(_mm256_max_epu32(magnitude, number(search.least)), number(search.greatest));
    let cell = _mm256_srl_epi32(_mm256_sub_epi32(magnitude, number(search.least)), shift);
    // All ones, or 0.
    let positive = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_setzero_ps()));
    let half = _mm256_andnot_si256(positive, number(search.entries.len() as u32 / 2));
    // SAFETY: magnitudes lie between the bounds, so cells lie in the table.
    let entry = unsafe { _mm256_i32gather_epi32::<4>(search.entries.as_ptr().cast(), _mm256_add_epi32(cell, half)) };
    let beyond = _mm256_cmpgt_epi32(_mm256_and_si256(magnitude, rest), _mm256_and_si256(entry, rest));
    // 1 for positive values, else -1; 0 for those not beyond.
    let step =
        _mm256_and_si256(beyond, _mm256_or_si256(_mm256_abs_epi32(positive), _mm256_xor_si256(positive, number(!0))));
    let code = _mm256_add_epi32(_mm256_srli_epi32::<24>(entry), step);
    let words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256::<1>(code));
    _mm_packus_epi16(words, words)
}

/// Dequantize full blocks.
///
/// # Safety
/// As [`encode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn decode<T: Lanes>(
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    table: &[f32; 256],
    out: &mut [T],
) {
    for (block, &absmax) in absmax.iter().enumerate() {
        let elements = block * block_size..(block + 1) * block_size;
        if absmax == 0.0 || !absmax.is_finite() {
            out[elements].fill(T::narrow(crate::dequantize::decode(0.0, absmax)));
            continue;
        }
        let scale = _mm256_set1_ps(absmax);
        for element in elements.step_by(8) {
            // SAFETY: the lengths that the caller promises; the table has an entry for every byte.
            unsafe {
                let index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().add(element).cast()));
                let values = _mm256_i32gather_ps::<4>(table.as_ptr(), index);
                T::put(_mm256_mul_ps(values, scale), out.as_mut_ptr().add(element));
            }
        }
    }
}
