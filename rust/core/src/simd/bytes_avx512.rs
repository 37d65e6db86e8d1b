//! AVX-512 kernel for byte codes: values by permutations of the whole table. (Codes are found no faster than AVX2 does, by
//! loads from a table.)

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use super::avx512::Lanes;
use crate::dequantize::ByteTable;

/// Dequantize full blocks.
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL; there are `block_size` elements and as many bytes for each of `absmax`, and
/// `block_size` is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn decode<T: Lanes>(
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    table: &ByteTable,
    streaming: bool,
    out: &mut [T],
) {
    let streaming = streaming && (out.as_ptr() as usize).is_multiple_of(64);
    let table = Registers::new(table);
    for (block, &absmax) in absmax.iter().enumerate() {
        let elements = block * block_size..(block + 1) * block_size;
        if absmax == 0.0 || !absmax.is_finite() {
            out[elements].fill(T::narrow(crate::dequantize::decode(0.0, absmax)));
            continue;
        }
        let scale = _mm512_set1_ps(absmax);
        for element in elements.step_by(32) {
            // SAFETY: the lengths that the caller promises; 32 elements of a block are whole lines of 64 bytes.
            unsafe {
                let values = table.look_up(_mm256_loadu_si256(codes.as_ptr().add(element).cast()));
                let products = values.map(|values| _mm512_mul_ps(values, scale));
                T::put(products, streaming, out.as_mut_ptr().add(element));
            }
        }
    }
    if streaming {
        // Streamed stores become visible to other threads in no order before this.
        _mm_sfence();
    }
}

/// 256 floats in registers: the lower and the upper halves of their bits.
struct Registers {
    lower: [__m512i; 8],
    upper: [__m512i; 8],
}

impl Registers {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn new(table: &ByteTable) -> Self {
        // SAFETY: 256 words are 8 times 64 bytes.
        let load = |words: &[u16; 256]| unsafe {
            std::array::from_fn(|part| _mm512_loadu_si512(words.as_ptr().add(32 * part).cast()))
        };
        Self { lower: load(&table.lower), upper: load(&table.upper) }
    }

    /// Of 32 codes: elements 0-3, 8-11, 16-19, 24-27, and the others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn look_up(&self, codes: __m256i) -> [__m512; 2] {
        let index = _mm512_cvtepu8_epi16(codes);
        let (bit6, bit7) =
            (_mm512_movepi16_mask(_mm512_slli_epi16::<9>(index)), _mm512_movepi16_mask(_mm512_slli_epi16::<8>(index)));
        let words = |table: &[__m512i; 8]| {
            // The permutation looks at the lowest six bits.
            let of = |pair: usize| _mm512_permutex2var_epi16(table[2 * pair], index, table[2 * pair + 1]);
            let (low, high) =
                (_mm512_mask_blend_epi16(bit6, of(0), of(1)), _mm512_mask_blend_epi16(bit6, of(2), of(3)));
            _mm512_mask_blend_epi16(bit7, low, high)
        };
        let (lower, upper) = (words(&self.lower), words(&self.upper));
        [_mm512_unpacklo_epi16(lower, upper), _mm512_unpackhi_epi16(lower, upper)].map(|bits| _mm512_castsi512_ps(bits))
    }
}
