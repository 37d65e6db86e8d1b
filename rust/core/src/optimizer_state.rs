//! Float32 values in blocks of 256 as 8-bit codes of a dynamic map: what 8-bit optimizers keep between steps.
//!
//! The first moment, and whatever else has a sign, goes by the signed map; the second moment by the unsigned one. Zero
//! stays zero, so that a parameter whose gradient is always 0 does not move. Both directions work on the calling thread:
//! an optimizer's step cuts its tensors at multiples of 256 and does each piece wholly.

use crate::dequantize::dequantize_block;
use crate::dynamic_map::DynamicMap;
use crate::error::CoreError;
use crate::quantize::quantize_block;
use crate::simd::{Kernels, SimdLevel, simd_level, with_ieee_floats};

/// Values that share a scale.
pub const STATE_BLOCK_SIZE: usize = 256;

/// Quantize `values` into as many `codes` and a scale for each 256 of them in `absmax`; the last block may be shorter.
///
/// A code is that of the nearest entry to `value * (1 / absmax)`, a tie to the even one. A block with NaN (else infinity)
/// gets that as its scale and comes back as NaN. A negative value under the unsigned map becomes 0.
///
/// # Errors
/// [`CoreError::Shape`] when the lengths do not fit.
pub fn quantize_state(map: DynamicMap, values: &[f32], codes: &mut [u8], absmax: &mut [f32]) -> Result<(), CoreError> {
    quantize_state_at(simd_level()?, map, values, codes, absmax)
}

/// [`quantize_state`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`quantize_state`].
pub fn quantize_state_at(
    level: SimdLevel,
    map: DynamicMap,
    values: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), CoreError> {
    check(values.len(), codes.len(), absmax.len())?;
    let full = values.len() / STATE_BLOCK_SIZE;
    let (body, tail) = values.split_at(full * STATE_BLOCK_SIZE);
    let (codes, last_codes) = codes.split_at_mut(body.len());
    with_ieee_floats(|| {
        f32::encode(level, body, STATE_BLOCK_SIZE, map.codebook(), codes, &mut absmax[..full]);
        if let Some(last) = absmax.get_mut(full) {
            *last = quantize_block(tail, map.codebook(), last_codes);
        }
    });
    Ok(())
}

/// One block, in the float mode of the caller. Returns its scale.
pub(crate) fn encode_block(level: SimdLevel, map: DynamicMap, values: &[f32], codes: &mut [u8]) -> f32 {
    if values.len() != STATE_BLOCK_SIZE {
        return quantize_block(values, map.codebook(), codes);
    }
    let mut absmax = [0.0];
    f32::encode(level, values, STATE_BLOCK_SIZE, map.codebook(), codes, &mut absmax);
    absmax[0]
}

/// The values that `codes` and the scales in `absmax` stand for: `map[code] * absmax`, one product.
///
/// # Errors
/// [`CoreError::Shape`] when the lengths do not fit.
pub fn dequantize_state(map: DynamicMap, codes: &[u8], absmax: &[f32], values: &mut [f32]) -> Result<(), CoreError> {
    dequantize_state_at(simd_level()?, map, codes, absmax, values)
}

/// [`dequantize_state`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`dequantize_state`].
pub fn dequantize_state_at(
    level: SimdLevel,
    map: DynamicMap,
    codes: &[u8],
    absmax: &[f32],
    values: &mut [f32],
) -> Result<(), CoreError> {
    check(values.len(), codes.len(), absmax.len())?;
    let table = map.table();
    let full = values.len() / STATE_BLOCK_SIZE;
    let (body, tail) = values.split_at_mut(full * STATE_BLOCK_SIZE);
    let (codes, last_codes) = codes.split_at(body.len());
    with_ieee_floats(|| {
        f32::decode(level, codes, &absmax[..full], STATE_BLOCK_SIZE, table, false, body);
        if let Some(&last) = absmax.get(full) {
            dequantize_block(last_codes, last, table, tail);
        }
    });
    Ok(())
}

fn check(values: usize, codes: usize, scales: usize) -> Result<(), CoreError> {
    let expected = values.div_ceil(STATE_BLOCK_SIZE);
    if codes == values && scales == expected {
        return Ok(());
    }
    Err(CoreError::Shape(format!(
        "{values} values have as many codes and {expected} scales; got {codes} codes and {scales} scales"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: [DynamicMap; 2] = [DynamicMap::Signed, DynamicMap::Unsigned];

    /// Values over many decades, zeros among them; below zero only where the map goes there.
    fn values(map: DynamicMap, len: usize) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 24) as f32
        };
        let value = |(size, kind): (f32, f32)| {
            let value = if kind < 0.1 { 0.0 } else { 10f32.powf(-9.0 * size) };
            if map == DynamicMap::Signed && kind > 0.5 { -value } else { value }
        };
        (0..len).map(|_| value((next(), next()))).collect()
    }

    fn levels() -> impl Iterator<Item = SimdLevel> {
        SimdLevel::ALL.into_iter().filter(|level| *level <= SimdLevel::detected())
    }

    fn quantized(level: SimdLevel, map: DynamicMap, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let (mut codes, mut absmax) = (vec![0xaa; values.len()], vec![-1.0; values.len().div_ceil(STATE_BLOCK_SIZE)]);
        quantize_state_at(level, map, values, &mut codes, &mut absmax).expect("lengths fit");
        (codes, absmax)
    }

    fn restored(level: SimdLevel, map: DynamicMap, codes: &[u8], absmax: &[f32]) -> Vec<u32> {
        let mut values = vec![-1.0; codes.len()];
        dequantize_state_at(level, map, codes, absmax, &mut values).expect("lengths fit");
        values.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_nearest_entry_of_every_value() {
        for map in MAPS {
            for len in [0, 1, 255, 256, 257, 1031] {
                let values = values(map, len);
                let truth = quantized(SimdLevel::Scalar, map, &values);
                for (index, value) in values.iter().enumerate() {
                    let scale = truth.1[index / STATE_BLOCK_SIZE];
                    let x = f64::from(value * (1.0 / scale));
                    let distance = |code: u8| (f64::from(map.codebook().values()[usize::from(code)]) - x).abs();
                    let code = truth.0[index];
                    assert!(
                        [code.saturating_sub(1), code.saturating_add(1)].iter().all(|c| distance(code) <= distance(*c))
                    );
                }
                for level in levels() {
                    assert_eq!(quantized(level, map, &values), truth);
                    let expected = restored(SimdLevel::Scalar, map, &truth.0, &truth.1);
                    assert_eq!(restored(level, map, &truth.0, &truth.1), expected);
                }
            }
        }
    }

    #[test]
    fn zero_and_the_largest_value_come_back_exactly() {
        for map in MAPS {
            for level in levels() {
                let mut values = vec![0.0; 300];
                values[7] = 0.37;
                let (codes, absmax) = quantized(level, map, &values);
                let back = restored(level, map, &codes, &absmax);
                assert_eq!(back, values.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn subnormal_and_nonfinite_blocks_are_the_same_on_every_instruction_set() {
        let mut values = vec![0.25f32; 3 * STATE_BLOCK_SIZE];
        for (index, value) in values.iter_mut().enumerate().take(STATE_BLOCK_SIZE) {
            *value = f32::from_bits(index as u32);
        }
        values[300] = f32::NAN;
        values[600] = f32::NEG_INFINITY;
        for map in MAPS {
            let truth = quantized(SimdLevel::Scalar, map, &values);
            assert!(truth.1[1].is_nan() && truth.1[2].is_infinite());
            let expected = restored(SimdLevel::Scalar, map, &truth.0, &truth.1);
            assert_eq!(expected[256..], vec![0x7fc0_0000; 512]);
            for level in levels() {
                let (codes, absmax) = quantized(level, map, &values);
                assert_eq!(codes, truth.0);
                assert!(absmax.iter().zip(&truth.1).all(|(a, b)| a.to_bits() == b.to_bits()));
                assert_eq!(restored(level, map, &codes, &absmax), expected);
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let (mut codes, mut absmax) = ([0; 257], [0.0; 1]);
        let error =
            quantize_state(DynamicMap::Signed, &[0.0; 257], &mut codes, &mut absmax).expect_err("one scale short");
        assert!(error.to_string().contains("257 codes and 1 scales"), "{error}");
    }
}
