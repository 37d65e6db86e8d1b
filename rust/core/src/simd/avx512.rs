//! AVX-512 kernels: sixteen floats at a time, thresholds found by a cell and one exact comparison.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::codebook::{CELL_MAGIC, CELLS_PER_UNIT, Cells, Codebook, FP4_CODE_BY_RANK, Search};
use crate::float::Element;
use crate::quantize::begin_block;

/// What AVX-512 needs to know of a float type.
pub(super) trait Lanes: Element {
    /// Sixteen elements as float32.
    ///
    /// # Safety
    /// Sixteen elements are readable at `from`; the processor has AVX-512.
    unsafe fn load(from: *const Self) -> __m512;

    /// Float32 bits of the largest magnitude of `len` elements.
    ///
    /// # Safety
    /// `len` elements, a multiple of 32, are readable at `from`; the processor has AVX-512.
    unsafe fn top(from: *const Self, len: usize) -> u32;

    /// Write one block: element by element what `products` holds for its code, rounded.
    ///
    /// # Safety
    /// `len` elements, a multiple of 32, are writable at `to` and half as many bytes readable at `codes`; where
    /// `streaming`, `to` is aligned to 64 bytes; the processor has AVX-512.
    unsafe fn store(codes: *const u8, products: __m512, streaming: bool, len: usize, to: *mut Self);

    /// Write 32 elements, rounded: 0-3, 8-11, 16-19, 24-27 from the first vector, the others from the second.
    ///
    /// # Safety
    /// 32 elements are writable at `to`, which is aligned to 64 bytes where `streaming`; the processor has AVX-512.
    unsafe fn put(products: [__m512; 2], streaming: bool, to: *mut Self);
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn top(from: *const Self, len: usize) -> u32 {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut tops = [_mm512_setzero_si512(); 2];
        for element in (0..len).step_by(32) {
            for (half, top) in tops.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let bits = unsafe { _mm512_loadu_si512(from.add(element + 16 * half).cast()) };
                *top = _mm512_max_epu32(*top, _mm512_and_si512(bits, magnitude));
            }
        }
        _mm512_reduce_max_epu32(_mm512_max_epu32(tops[0], tops[1]))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(codes: *const u8, products: __m512, streaming: bool, len: usize, to: *mut Self) {
        for element in (0..len).step_by(16) {
            // SAFETY: the caller's promise.
            let bytes = _mm512_cvtepu8_epi64(unsafe { _mm_loadl_epi64(codes.add(element / 2).cast()) });
            // The permutation looks at the lowest four bits: even element from the high nibble, odd from the low.
            let index = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
            let values = _mm512_castps_si512(_mm512_permutexvar_ps(index, products));
            // SAFETY: the caller's promise.
            unsafe { put(values, streaming, to.add(element).cast()) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn put(products: [__m512; 2], streaming: bool, to: *mut Self) {
        let [a, b] = products.map(|products| _mm512_castps_si512(products));
        let (low, high) = (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
        // SAFETY: the caller's promise.
        unsafe {
            put(_mm512_permutex2var_epi64(a, low, b), streaming, to.cast());
            put(_mm512_permutex2var_epi64(a, high, b), streaming, to.add(16).cast());
        }
    }
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise; a bf16 has two bytes.
        let words = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn top(from: *const Self, len: usize) -> u32 {
        // SAFETY: the caller's promise.
        u32::from(unsafe { top_word(from.cast(), len) }) << 16
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(codes: *const u8, products: __m512, streaming: bool, len: usize, to: *mut Self) {
        let table = _mm512_cvtepi32_epi16(round_to_bf16(products));
        // SAFETY: the caller's promise.
        unsafe { store_words(codes, table, streaming, len, to.cast()) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn put(products: [__m512; 2], streaming: bool, to: *mut Self) {
        let [a, b] = products.map(|products| round_to_bf16(products));
        // SAFETY: the caller's promise.
        unsafe { put(_mm512_packus_epi32(a, b), streaming, to.cast()) };
    }
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise; an f16 has two bytes.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn top(from: *const Self, len: usize) -> u32 {
        // SAFETY: the caller's promise.
        let word = unsafe { top_word(from.cast(), len) };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(word)))).to_bits()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn store(codes: *const u8, products: __m512, streaming: bool, len: usize, to: *mut Self) {
        let table = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(products);
        // SAFETY: the caller's promise.
        unsafe { store_words(codes, table, streaming, len, to.cast()) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn put(products: [__m512; 2], streaming: bool, to: *mut Self) {
        let [a, b] = products.map(|products| _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(products));
        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        // SAFETY: the caller's promise.
        unsafe { put(_mm512_permutexvar_epi64(order, both), streaming, to.cast()) };
    }
}

/// The nearest bfloat16 of each product, in the lower half of its lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn round_to_bf16(products: __m512) -> __m512i {
    // NOTE: vcvtneps2bf16 flushes subnormals. A NaN here is the canonical one, which this rounding keeps.
    let bits = _mm512_castps_si512(products);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm512_srli_epi32::<16>(rounded)
}

/// Largest magnitude of 16-bit floats, which without sign order like their bits.
///
/// # Safety
/// `len` words, a multiple of 32, are readable at `from`; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn top_word(from: *const u16, len: usize) -> u16 {
    let magnitude = _mm512_set1_epi16(0x7fff);
    let mut top = _mm512_setzero_si512();
    for element in (0..len).step_by(32) {
        // SAFETY: the caller's promise.
        let words = unsafe { _mm512_loadu_si512(from.add(element).cast()) };
        top = _mm512_max_epu16(top, _mm512_and_si512(words, magnitude));
    }
    let top = _mm256_max_epu16(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64::<1>(top));
    let top = _mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    // The instruction finds the least word, so the complement's least is the largest.
    let least = _mm_minpos_epu16(_mm_xor_si128(top, _mm_set1_epi16(-1)));
    !(_mm_cvtsi128_si32(least).cast_unsigned() as u16)
}

/// Look a block's codes up in a table of 16 words.
///
/// # Safety
/// As [`Lanes::store`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn store_words(codes: *const u8, table: __m256i, streaming: bool, len: usize, to: *mut u16) {
    // Twice the same 16 words: the permutation's fifth index bit then makes no difference.
    let table = _mm512_broadcast_i64x4(table);
    for element in (0..len).step_by(32) {
        // SAFETY: the caller's promise.
        let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.add(element / 2).cast()) });
        let index = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        let values = _mm512_permutexvar_epi16(index, table);
        // SAFETY: the caller's promise.
        unsafe { put(values, streaming, to.add(element).cast()) };
    }
}

/// # Safety
/// 64 bytes are writable at `to`, which is aligned to 64 bytes where `streaming`; the processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn put(values: __m512i, streaming: bool, to: *mut __m512i) {
    // SAFETY: the caller's promise.
    unsafe {
        if streaming {
            _mm512_stream_si512(to, values);
        } else {
            _mm512_storeu_si512(to, values);
        }
    }
}

/// Dequantize full blocks.
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL; there are `block_size` elements and half as many bytes for each of
/// `absmax`, and `block_size` is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn decode_blocks<T: Lanes>(
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    table: &[f32; 16],
    streaming: bool,
    out: &mut [T],
) {
    let streaming = streaming && (out.as_ptr() as usize).is_multiple_of(64);
    // SAFETY: the table has 16 entries.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    for (block, &absmax) in absmax.iter().enumerate() {
        // A block has at most 16 different elements: they are made once and then only looked up.
        let products = if absmax == 0.0 {
            _mm512_setzero_ps()
        } else if absmax.is_finite() {
            _mm512_mul_ps(table, _mm512_set1_ps(absmax))
        } else {
            _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc0_0000))
        };
        let element = block * block_size;
        // SAFETY: the lengths that the caller promises; 32 elements or more of a block are whole lines of 64 bytes.
        unsafe {
            let (from, to) = (codes.as_ptr().add(element / 2), out.as_mut_ptr().add(element));
            if streaming {
                T::store(from, products, true, block_size, to);
            } else {
                T::store(from, products, false, block_size, to);
            }
        }
    }
    if streaming {
        // Streamed stores become visible to other threads in no order before this.
        _mm_sfence();
    }
}

/// Quantize full blocks. Returns whether every element was finite.
///
/// # Safety
/// As [`decode_blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn encode<T: Lanes>(
    input: &[T],
    block_size: usize,
    book: &Codebook,
    cells: &Cells,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let tables = Tables::new(cells);
    // SAFETY: the caller's promise.
    unsafe {
        match book.search() {
            Search::Ascending => encode_by::<T, false>(input, block_size, book, &tables, codes, absmax),
            Search::SignedMagnitude => encode_by::<T, true>(input, block_size, book, &tables, codes, absmax),
        }
    }
}

/// [`Cells`] in registers.
struct Tables {
    thresholds: [__m512; 2],
    below: [__m512i; 2],
    fp4: __m512i,
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn new(cells: &Cells) -> Self {
        let [a, b, c, d, e, f, g, h] = FP4_CODE_BY_RANK.map(i32::from);
        // SAFETY: each table has 32 entries.
        unsafe {
            Self {
                thresholds: [0, 16].map(|at| _mm512_loadu_ps(cells.thresholds.as_ptr().add(at))),
                below: [0, 16].map(|at| _mm512_loadu_si512(cells.below.as_ptr().add(at).cast())),
                fp4: _mm512_castsi256_si512(_mm256_setr_epi32(a, b, c, d, e, f, g, h)),
            }
        }
    }

    /// Codes of sixteen normalized values, |x| at most about 1.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn code<const SIGNED_MAGNITUDE: bool>(&self, x: __m512) -> __m512i {
        let size = if SIGNED_MAGNITUDE { _mm512_abs_ps(x) } else { x };
        let sum = _mm512_fmadd_ps(size, _mm512_set1_ps(CELLS_PER_UNIT), _mm512_set1_ps(CELL_MAGIC));
        // The permutations look at the lowest five bits, which hold the cell.
        let cell = _mm512_castps_si512(sum);
        let threshold = _mm512_permutex2var_ps(self.thresholds[0], cell, self.thresholds[1]);
        let below = _mm512_permutex2var_epi32(self.below[0], cell, self.below[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(size, threshold);
        let rank = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
        if SIGNED_MAGNITUDE {
            let code = _mm512_permutexvar_epi32(rank, self.fp4);
            let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, _mm512_setzero_ps());
            _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(8))
        } else {
            rank
        }
    }
}

/// # Safety
/// As [`decode_blocks`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn encode_by<T: Lanes, const SIGNED_MAGNITUDE: bool>(
    input: &[T],
    block_size: usize,
    book: &Codebook,
    tables: &Tables,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let mut finite = true;
    for (block, absmax) in absmax.iter_mut().enumerate() {
        let elements = block * block_size..(block + 1) * block_size;
        // SAFETY: the lengths that the caller promises.
        let top = unsafe { T::top(input.as_ptr().add(elements.start), block_size) };
        let bytes = &mut codes[elements.start / 2..elements.end / 2];
        let Some(inverse) = begin_block(top, &input[elements.clone()], book, bytes, absmax, &mut finite) else {
            continue;
        };
        let inverse = _mm512_set1_ps(inverse);
        for element in elements.step_by(32) {
            // SAFETY: the lengths that the caller promises.
            let halves = unsafe {
                let from = input.as_ptr().add(element);
                [T::load(from), T::load(from.add(16))]
            };
            let [first, second] = halves.map(|values| tables.code::<SIGNED_MAGNITUDE>(_mm512_mul_ps(values, inverse)));
            // SAFETY: the lengths that the caller promises.
            unsafe { _mm_storeu_si128(codes.as_mut_ptr().add(element / 2).cast(), pack(first, second)) };
        }
    }
    finite
}

/// 32 codes as 16 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn pack(first: __m512i, second: __m512i) -> __m128i {
    // Byte 0 and 1 of each dword hold a code of the two vectors; an even dword and the next make two bytes.
    let both = _mm512_or_si512(first, _mm512_slli_epi32::<8>(second));
    let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(both), _mm512_srli_epi64::<32>(both));
    let words = _mm512_cvtepi64_epi16(pairs);
    let order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    _mm_shuffle_epi8(words, order)
}
