//! AVX2 kernels: eight floats at a time, thresholds found by a four-step search through permutations.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::codebook::{Codebook, FP4_CODE_BY_RANK, NibbleSearch, Search};
use crate::dequantize::decode;
use crate::float::Element;
use crate::quantize::begin_block;

/// What AVX2 needs to know of a float type.
pub(super) trait Lanes: Element {
    /// Eight elements as float32.
    ///
    /// # Safety
    /// Eight elements are readable at `from`; the processor has AVX2 and F16C.
    unsafe fn load(from: *const Self) -> __m256;

    /// Write the 32 elements that 16 code bytes stand for, by a table of 16 elements.
    ///
    /// # Safety
    /// 32 elements are writable at `to`; the processor has AVX2.
    unsafe fn store(codes: __m128i, table: &[Self; 16], to: *mut Self);

    /// Write eight products, rounded.
    ///
    /// # Safety
    /// Eight elements are writable at `to`; the processor has AVX2 and F16C.
    unsafe fn put(products: __m256, to: *mut Self);

    /// The elements nearest to 16 products.
    ///
    /// # Safety
    /// The processor has F16C.
    #[inline]
    unsafe fn round(products: [f32; 16]) -> [Self; 16] {
        products.map(Self::narrow)
    }
}

impl Lanes for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(codes: __m128i, table: &[Self; 16], to: *mut Self) {
        // SAFETY: the table has 16 elements.
        let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
        let (first, second) = unpack(codes);
        for (half, codes) in [first, second].into_iter().enumerate() {
            for (part, codes) in [codes, _mm_srli_si128::<8>(codes)].into_iter().enumerate() {
                let index = _mm256_cvtepu8_epi32(codes);
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)); // bit 3 becomes the sign
                let values = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index),
                    _mm256_permutevar8x32_ps(high, index),
                    upper,
                );
                // SAFETY: the caller's promise; the offsets are 0, 8, 16, 24.
                unsafe { _mm256_storeu_ps(to.add(16 * half + 8 * part), values) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put(products: __m256, to: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, products) };
    }
}

impl Lanes for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; a bf16 has two bytes.
        let words = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(codes: __m128i, table: &[Self; 16], to: *mut Self) {
        // SAFETY: the caller's promise; the table has 16 words.
        unsafe { store_words(codes, table.as_ptr().cast(), to.cast()) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put(products: __m256, to: *mut Self) {
        // A NaN here is the canonical one, which this rounding keeps.
        let bits = _mm256_castps_si256(products);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let words = _mm256_srli_epi32::<16>(rounded);
        let words = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        // SAFETY: the caller's promise; eight bf16 are 16 bytes.
        unsafe { _mm_storeu_si128(to.cast(), words) };
    }
}

impl Lanes for f16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; an f16 has two bytes.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(codes: __m128i, table: &[Self; 16], to: *mut Self) {
        // SAFETY: the caller's promise; the table has 16 words.
        unsafe { store_words(codes, table.as_ptr().cast(), to.cast()) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn put(products: __m256, to: *mut Self) {
        let words = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(products);
        // SAFETY: the caller's promise; eight f16 are 16 bytes.
        unsafe { _mm_storeu_si128(to.cast(), words) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn round(products: [f32; 16]) -> [Self; 16] {
        let mut words = [Self::ZERO; 16];
        for half in 0..2 {
            // SAFETY: both arrays have 16 elements. A NaN here is the canonical one, which keeps its top bits.
            unsafe {
                let eight = _mm256_loadu_ps(products.as_ptr().add(8 * half));
                let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight);
                _mm_storeu_si128(words.as_mut_ptr().add(8 * half).cast(), rounded);
            }
        }
        words
    }
}

/// 32 codes, a byte each, of 16 packed bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn unpack(bytes: __m128i) -> (__m128i, __m128i) {
    let mask = _mm_set1_epi8(15);
    let (even, odd) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), mask), _mm_and_si128(bytes, mask));
    (_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd))
}

/// Look 32 codes up in a table of 16 words, through the tables of their low and high bytes.
///
/// # Safety
/// 16 words are readable at `table` and 32 writable at `to`; the processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_words(codes: __m128i, table: *const __m128i, to: *mut __m128i) {
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (_mm_loadu_si128(table), _mm_loadu_si128(table.add(1))) };
    let mask = _mm_set1_epi16(0xff);
    let low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    let high = _mm_packus_epi16(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b));
    let (first, second) = unpack(codes);
    for (half, codes) in [first, second].into_iter().enumerate() {
        let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
        // SAFETY: the caller's promise; the offsets are 0 to 3 times 8 words.
        unsafe {
            _mm_storeu_si128(to.add(2 * half), _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128(to.add(2 * half + 1), _mm_unpackhi_epi8(low, high));
        }
    }
}

/// Dequantize full blocks.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; there are `block_size` elements and half as many bytes for each of `absmax`,
/// and `block_size` is a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn decode_blocks<T: Lanes>(
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    table: &[f32; 16],
    out: &mut [T],
) {
    for (block, &absmax) in absmax.iter().enumerate() {
        // SAFETY: the features that the caller promises.
        let values = unsafe { T::round(table.map(|entry| decode(entry, absmax))) };
        for element in (block * block_size..(block + 1) * block_size).step_by(32) {
            // SAFETY: the lengths that the caller promises.
            unsafe {
                let bytes = _mm_loadu_si128(codes.as_ptr().add(element / 2).cast());
                T::store(bytes, &values, out.as_mut_ptr().add(element));
            }
        }
    }
}

/// Quantize full blocks. Returns whether every element was finite.
///
/// # Safety
/// As [`decode_blocks`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn encode<T: Lanes>(
    input: &[T],
    block_size: usize,
    book: &Codebook,
    search: &NibbleSearch,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let signed_magnitude = book.search() == Search::SignedMagnitude;
    let steps = Steps::new(&search.thresholds);
    let mut finite = true;
    for (block, absmax) in absmax.iter_mut().enumerate() {
        let elements = block * block_size..(block + 1) * block_size;
        // SAFETY: the lengths that the caller promises.
        let top = unsafe { top(input.as_ptr().add(elements.start), block_size) };
        let bytes = &mut codes[elements.start / 2..elements.end / 2];
        let Some(inverse) = begin_block(top, &input[elements.clone()], book, bytes, absmax, &mut finite) else {
            continue;
        };
        let inverse = _mm256_set1_ps(inverse);
        for element in elements.step_by(32) {
            let mut ranks = [_mm256_setzero_si256(); 4];
            for (part, ranks) in ranks.iter_mut().enumerate() {
                // SAFETY: the lengths that the caller promises.
                let values = unsafe { T::load(input.as_ptr().add(element + 8 * part)) };
                let x = _mm256_mul_ps(values, inverse);
                *ranks = if signed_magnitude { fp4(x, &steps) } else { steps.rank(x) };
            }
            // SAFETY: the lengths that the caller promises.
            unsafe { _mm_storeu_si128(codes.as_mut_ptr().add(element / 2).cast(), pack(ranks)) };
        }
    }
    finite
}

/// Bits of the largest magnitude.
///
/// # Safety
/// `len` elements, a multiple of 32, are readable at `from`; the processor has AVX2 and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn top<T: Lanes>(from: *const T, len: usize) -> u32 {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut top = _mm256_setzero_si256();
    for element in (0..len).step_by(8) {
        // SAFETY: the caller's promise.
        let values = unsafe { T::load(from.add(element)) };
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
    }
    let top = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    let top = _mm_max_epi32(top, _mm_shuffle_epi32::<0b01_00_11_10>(top));
    let top = _mm_max_epi32(top, _mm_shuffle_epi32::<0b10_11_00_01>(top));
    _mm_cvtsi128_si32(top).cast_unsigned()
}

/// The thresholds that each step of a search for the rank (0-15) compares with.
struct Steps {
    /// Rank at least 8?
    eights: __m256,
    /// Then 4, by the answer so far.
    fours: [__m256; 2],
    twos: __m256,
    ones: __m256,
}

impl Steps {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(t: &[f32; 16]) -> Self {
        Self {
            eights: _mm256_set1_ps(t[7]),
            fours: [_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])],
            twos: _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
            ones: _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
        }
    }

    /// Number of thresholds below x.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rank(&self, x: __m256) -> __m256i {
        // A comparison gives -1 for yes: 2 rank + 1 is rank + rank - answer.
        let above = |threshold| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, threshold));
        let double = |rank| _mm256_add_epi32(rank, rank);
        let answer = above(self.eights);
        let rank = _mm256_sub_epi32(_mm256_setzero_si256(), answer);
        let threshold = _mm256_blendv_ps(self.fours[0], self.fours[1], _mm256_castsi256_ps(answer));
        let rank = _mm256_sub_epi32(double(rank), above(threshold));
        let rank = _mm256_sub_epi32(double(rank), above(_mm256_permutevar8x32_ps(self.twos, rank)));
        _mm256_sub_epi32(double(rank), above(_mm256_permutevar8x32_ps(self.ones, rank)))
    }
}

/// FP4 codes: the rank of |x| gives three bits, bit 3 is set iff x < 0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fp4(x: __m256, steps: &Steps) -> __m256i {
    let rank = steps.rank(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x));
    let [a, b, c, d, e, f, g, h] = FP4_CODE_BY_RANK.map(i32::from);
    let code = _mm256_permutevar8x32_epi32(_mm256_setr_epi32(a, b, c, d, e, f, g, h), rank);
    let negative = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_setzero_ps()));
    _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)))
}

/// 32 codes, eight a vector, as 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pack(codes: [__m256i; 4]) -> __m128i {
    let words = [_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3])];
    // The packs work within halves of 128 bits: the dwords come out as 0 2 4 6, 1 3 5 7.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[0], words[1]), order);
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110)); // even * 16 + odd
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}
