//! The same bits as the scalar code, several elements at a time; the only home of `unsafe` in this crate.

mod amx;
mod avx2;
mod avx512;
mod bytes_avx2;
mod bytes_avx512;
mod dense;
mod float_mode;
mod matvec;
mod matvec_amx;
mod matvec_avx2;
mod matvec_avx512;
mod matvec_bf16;
mod optim;
mod pages;

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::codebook::{Codebook, NibbleSearch};
use crate::dequantize::{Table, dequantize_block};
use crate::error::CoreError;
use crate::float::Element;
use crate::quantize::quantize_block;

pub use float_mode::with_ieee_floats;
#[cfg(test)]
pub(crate) use matvec::multiplies_bf16;
pub(crate) use matvec::{InOrder, Staged, Tiled, gains_by_bf16, multiplies_tiles};
pub(crate) use optim::update;
pub(crate) use pages::advise_large_pages;

/// Instruction sets that kernels exist for, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SimdLevel {
    /// Plain Rust: the truth.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl SimdLevel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name that `QLORA_RS_SIMD` takes.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The highest level that this processor has.
    #[must_use]
    pub fn detected() -> Self {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            (false, _) => Self::Scalar,
        }
    }
}

/// The level in use: what the processor has, or less where `QLORA_RS_SIMD` says so when first asked.
///
/// # Errors
/// [`CoreError::Simd`] when the variable names no level, or one that this processor lacks.
pub fn simd_level() -> Result<SimdLevel, CoreError> {
    static LEVEL: OnceLock<Result<SimdLevel, CoreError>> = OnceLock::new();
    LEVEL.get_or_init(|| choose(std::env::var("QLORA_RS_SIMD").ok().as_deref(), SimdLevel::detected())).clone()
}

fn choose(wish: Option<&str>, detected: SimdLevel) -> Result<SimdLevel, CoreError> {
    let Some(wish) = wish.filter(|name| !name.is_empty()) else {
        return Ok(detected);
    };
    let Some(level) = SimdLevel::ALL.into_iter().find(|level| level.as_str() == wish) else {
        return Err(CoreError::Simd(format!("QLORA_RS_SIMD is one of scalar, avx2, avx512; got {wish:?}")));
    };
    if level > detected {
        let highest = detected.as_str();
        return Err(CoreError::Simd(format!(
            "QLORA_RS_SIMD={wish}, but this processor goes up to {highest}: unset it or name {highest}"
        )));
    }
    Ok(level)
}

/// Whole blocks of codes, for one float type.
///
/// NOTE: `level` above [`SimdLevel::detected`] panics, so these are safe to call with any argument.
pub trait Kernels: Element {
    /// Quantize `absmax.len()` full blocks to the codes, nibbles or bytes, of a codebook. Returns whether every element
    /// was finite.
    fn encode(
        level: SimdLevel,
        input: &[Self],
        block_size: usize,
        book: &Codebook,
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> bool;

    /// Dequantize `absmax.len()` full blocks; `streaming` keeps the output out of the caches.
    fn decode(
        level: SimdLevel,
        codes: &[u8],
        absmax: &[f32],
        block_size: usize,
        table: &Table,
        streaming: bool,
        out: &mut [Self],
    );
}

macro_rules! kernels {
    ($($float:ty),*) => {$(
        impl Kernels for $float {
            fn encode(
                level: SimdLevel,
                input: &[Self],
                block_size: usize,
                book: &Codebook,
                codes: &mut [u8],
                absmax: &mut [f32],
            ) -> bool {
                check(level, block_size, absmax.len(), input.len(), codes.len(), book.bits());
                if level == SimdLevel::Scalar {
                    return encode_blocks(input, block_size, book, codes, absmax);
                }
                if let Some(search) = book.byte_search() {
                    // SAFETY: `check` saw that the processor has the features (AVX-512 implies AVX2) and that the
                    // lengths fit.
                    return unsafe { bytes_avx2::encode(input, block_size, book, search, codes, absmax) };
                }
                match (level, book.nibble_search()) {
                    (SimdLevel::Avx512, Some(NibbleSearch { cells: Some(cells), .. })) => {
                        // SAFETY: as above.
                        unsafe { avx512::encode(input, block_size, book, cells, codes, absmax) }
                    }
                    (_, Some(search)) => {
                        // SAFETY: as above; AVX-512 implies AVX2.
                        unsafe { avx2::encode(input, block_size, book, search, codes, absmax) }
                    }
                    (_, None) => encode_blocks(input, block_size, book, codes, absmax),
                }
            }

            fn decode(
                level: SimdLevel,
                codes: &[u8],
                absmax: &[f32],
                block_size: usize,
                table: &Table,
                streaming: bool,
                out: &mut [Self],
            ) {
                check(level, block_size, absmax.len(), out.len(), codes.len(), table.bits());
                // SAFETY: `check` saw that the processor has the features and that the lengths fit.
                unsafe {
                    match (level, table) {
                        (SimdLevel::Avx512, Table::Nibbles(table)) => {
                            avx512::decode_blocks(codes, absmax, block_size, table, streaming, out);
                        }
                        (SimdLevel::Avx512, Table::Bytes(table)) => {
                            bytes_avx512::decode(codes, absmax, block_size, table, streaming, out);
                        }
                        (SimdLevel::Avx2, Table::Nibbles(table)) => {
                            avx2::decode_blocks(codes, absmax, block_size, table, out);
                        }
                        (SimdLevel::Avx2, Table::Bytes(table)) => {
                            bytes_avx2::decode(codes, absmax, block_size, &table.values, out);
                        }
                        (SimdLevel::Scalar, _) => decode_blocks(codes, absmax, block_size, table, out),
                    }
                }
            }
        }
    )*};
}

kernels!(f32, bf16, f16);

/// What the kernels' memory accesses rest on.
fn check(level: SimdLevel, block_size: usize, blocks: usize, elements: usize, bytes: usize, bits: u8) {
    assert!(level <= SimdLevel::detected(), "the processor has no {}", level.as_str());
    assert!(block_size.is_multiple_of(32) && elements == blocks * block_size);
    assert!(8 * bytes == usize::from(bits) * elements);
}

fn encode_blocks<T: Element>(
    input: &[T],
    block_size: usize,
    book: &Codebook,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> bool {
    let mut finite = true;
    let bytes = block_size * usize::from(book.bits()) / 8;
    let blocks = input.chunks_exact(block_size).zip(codes.chunks_exact_mut(bytes));
    for ((input, codes), absmax) in blocks.zip(absmax) {
        *absmax = quantize_block(input, book, codes);
        finite &= absmax.is_finite();
    }
    finite
}

fn decode_blocks<T: Element>(codes: &[u8], absmax: &[f32], block_size: usize, table: &Table, out: &mut [T]) {
    let bytes = block_size * usize::from(table.bits()) / 8;
    let blocks = codes.chunks_exact(bytes).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), absmax) in blocks.zip(absmax) {
        dequantize_block(codes, *absmax, table, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wish_lowers_the_level_and_is_never_ignored() {
        use SimdLevel::{Avx2, Avx512, Scalar};
        assert_eq!(choose(None, Avx512), Ok(Avx512));
        assert_eq!(choose(Some(""), Avx2), Ok(Avx2));
        assert_eq!(choose(Some("avx2"), Avx512), Ok(Avx2));
        assert_eq!(choose(Some("scalar"), Scalar), Ok(Scalar));
        for (wish, reason) in [("sse", "one of scalar, avx2, avx512"), ("avx512", "goes up to avx2")] {
            let error = choose(Some(wish), Avx2).expect_err("refused");
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
