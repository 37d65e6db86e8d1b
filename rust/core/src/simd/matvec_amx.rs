//! Products of packed rows with bfloat16 tokens by the processor's products of tiles, AMX.
//!
//! Weights are rounded to bfloat16 as dequantizing to it does. Elements are taken in units of 128, cut as in
//! `matvec_bf16.rs` but with a tile of 16 tokens: to the sum of a row and a token are added, one after the other, the
//! products of elements 4 w of all w below 32, those of 4 w + 1, of 4 w + 2 and of 4 w + 3, each summed by the processor
//! in its own order of float32. Subnormal numbers count as 0.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use half::bf16;

use super::Staged;
use super::amx::{DEPTH, Multiplier, ROWS, SIDE, Weights};
use super::matvec::{Ahead, Tiled};
use crate::matvec::{LINE, Strip};

const UNIT: usize = Tiled::UNIT;
/// Of a unit's codes: a line of memory.
const BYTES: usize = UNIT / 2;
const _: () = assert!(BYTES == LINE && UNIT == DEPTH && Tiled::TOGETHER == SIDE);

/// See [`Staged::strip_products`].
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and BF16 and what `M` multiplies by; the strip's parts fit each other and
/// `sums`, with at least one column.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn strip_products<M: Multiplier>(strip: &Strip<'_, Tiled>, sums: &mut [f32]) {
    let rows = strip.codes.len() / strip.bytes_per_row();
    let (tokens, units) = (sums.len() / rows, strip.token_len() / UNIT);
    // Weights are written and read in turns: the processor does not hand them from a store to a tile directly.
    let mut weights = [const { Weights([[[[bf16::ZERO; 32]; SIDE]; 4]; 2]) }; 2];
    for row in (0..rows).step_by(ROWS) {
        let here = ROWS.min(rows - row);
        for token in (0..tokens).step_by(2 * SIDE) {
            let ahead = (token == 0).then(|| Ahead::of(strip, row, here));
            // SAFETY: staged tokens are padded to whole tiles of 16; the rows are there, and the multiplier is the only one.
            let products = unsafe {
                let first = strip.tokens.as_ptr().cast::<bf16>().add(token * strip.token_len());
                let last = (tokens - token > SIDE).then(|| first.add(SIDE * strip.token_len()));
                let mut multiplier = M::new();
                decode(strip, row, here, 0, ahead, &mut weights[0]);
                for unit in 0..units {
                    if unit + 1 < units {
                        decode(strip, row, here, unit + 1, ahead, &mut weights[(unit + 1) % 2]);
                    }
                    let at = unit * UNIT * SIDE;
                    multiplier.multiply(&weights[unit % 2], first.add(at), last.map(|last| last.add(at)));
                }
                multiplier.sums()
            };
            for (r, sums) in sums[row * tokens..(row + here) * tokens].chunks_exact_mut(tokens).enumerate() {
                for (t, sum) in sums[token..].iter_mut().take(2 * SIDE).enumerate() {
                    *sum = products[t / SIDE * 2 + r / SIDE][r % SIDE][t % SIDE];
                }
            }
        }
    }
}

/// A unit of `count` rows, as bfloat16 weights.
///
/// # Safety
/// The rows and the unit, which may be a last one that is not full, lie in the strip; the processor has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn decode(
    strip: &Strip<'_, Tiled>,
    row: usize,
    count: usize,
    unit: usize,
    ahead: Option<Ahead>,
    weights: &mut Weights,
) {
    let (blocks, full) = (strip.blocks_per_row(), unit < strip.cols / UNIT);
    // A unit has two blocks or is part of one; a last one may lack its upper half.
    let block = unit * UNIT / strip.block_size;
    let next = if strip.block_size < UNIT { (block + 1).min(blocks - 1) } else { block };
    // SAFETY: the table has 16 entries.
    let table = unsafe { _mm512_loadu_ps(strip.table.as_ptr()) };
    let nibble = _mm512_set1_epi16(15);
    // The upper half of the lanes looks into the upper half of the table.
    let upper = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
    if let Some(ahead) = ahead {
        let scales = count * (next - block + 1);
        (0..scales).step_by(LINE / size_of::<f32>()).for_each(|nth| ahead.scale(block * count + nth));
    }
    for r in 0..count {
        if let Some(ahead) = ahead {
            ahead.codes(unit * count + r);
        }
        // SAFETY: the caller's promise; the tail has 64 bytes, and a row as many scales as blocks. Registers go to rows of
        // 64 bytes.
        unsafe {
            let codes = if full {
                _mm512_loadu_si512(strip.codes.as_ptr().add((row + r) * strip.bytes_per_row() + unit * BYTES).cast())
            } else {
                _mm512_loadu_si512(strip.tail::<BYTES>(row + r).as_ptr().cast())
            };
            let absmax = strip.absmax.as_ptr().add((row + r) * blocks);
            let values = |block: usize| _mm512_mul_ps(table, _mm512_set1_ps(*absmax.add(block)));
            let values: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(values(next), values(block)));
            // In each word the even elements stand in the high nibbles of its bytes.
            let words =
                [_mm512_srli_epi16::<4>(codes), codes, _mm512_srli_epi16::<12>(codes), _mm512_srli_epi16::<8>(codes)];
            for (part, words) in words.into_iter().enumerate() {
                let index = _mm512_ternarylogic_epi32::<0xea>(words, nibble, upper); // words & nibble | upper
                let to = weights.0[r / SIDE][part][r % SIDE].as_mut_ptr();
                _mm512_store_si512(to.cast(), _mm512_permutexvar_epi16(index, values));
            }
        }
    }
}
