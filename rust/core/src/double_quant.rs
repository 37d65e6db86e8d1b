//! Scales of scales: the float32 scales of each expert as 8-bit codes, a scale per 256 blocks, and an offset.

use crate::control::Control;
use crate::dequantize::dequantize_block;
use crate::dynamic_map::DynamicMap;
use crate::error::CoreError;
use crate::float::CANONICAL_NAN;
use crate::layout::NESTED_BLOCK_SIZE;
use crate::optimizer_state::encode_block;
use crate::parallel::Parallel;
use crate::simd::{Kernels, SimdLevel, simd_level, with_ieee_floats};

/// Code of 0 in the signed dynamic map.
const ZERO: u8 = 127;

/// Quantize `absmax`, the scales of one or several experts back to back.
///
/// `offset` is each expert's mean; a group's scale is the largest distance from it. A scale that is NaN or infinite
/// counts as absent from the mean and makes its group's scale NaN.
///
/// # Errors
/// [`CoreError::Shape`] when the lengths do not fit; [`CoreError::Interrupted`].
pub fn double_quantize(
    absmax: &[f32],
    blocks_per_expert: usize,
    codes: &mut [u8],
    scale: &mut [f32],
    offset: &mut [f32],
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let level = simd_level()?;
    let groups = blocks_per_expert.div_ceil(NESTED_BLOCK_SIZE);
    let experts = offset.len();
    if absmax.len() != experts * blocks_per_expert || codes.len() != absmax.len() || scale.len() != experts * groups {
        return Err(CoreError::Shape(format!(
            "{experts} expert(s) of {blocks_per_expert} blocks do not fit {} scales, {} codes and {} group scales",
            absmax.len(),
            codes.len(),
            scale.len()
        )));
    }
    if blocks_per_expert == 0 {
        offset.fill(0.0);
        return Ok(());
    }
    let experts = absmax.chunks(blocks_per_expert).zip(codes.chunks_mut(blocks_per_expert));
    for ((absmax, codes), (scale, offset)) in experts.zip(scale.chunks_mut(groups).zip(offset)) {
        *offset = with_ieee_floats(|| tree_mean(absmax));
        let centre = *offset;
        // Some 64 groups a piece: a group is only a few microseconds of work.
        let per_piece = 64 * NESTED_BLOCK_SIZE;
        let pieces: Vec<_> =
            absmax.chunks(per_piece).zip(codes.chunks_mut(per_piece)).zip(scale.chunks_mut(64)).collect();
        parallel.for_each(pieces, control, |((absmax, codes), scale)| {
            let groups = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks_mut(NESTED_BLOCK_SIZE));
            for ((absmax, codes), scale) in groups.zip(scale) {
                *scale = quantize_group(level, absmax, centre, codes);
            }
        })?;
    }
    Ok(())
}

/// Codes of one group, and its scale.
fn quantize_group(level: SimdLevel, absmax: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    if !absmax.iter().all(|value| value.is_finite()) {
        codes.fill(ZERO);
        return CANONICAL_NAN;
    }
    let mut centred = [0.0; NESTED_BLOCK_SIZE];
    for (centred, value) in centred.iter_mut().zip(absmax) {
        *centred = value - offset;
    }
    encode_block(level, DynamicMap::Signed, &centred[..absmax.len()], codes)
}

/// Mean of the finite values: a float64 sum over a fixed tree (256 consecutive values in index order, then the partial
/// sums likewise), so that it is the same for every device and thread count. 0 where there is none.
fn tree_mean(values: &[f32]) -> f32 {
    let count = values.iter().filter(|value| value.is_finite()).count();
    if count == 0 {
        return 0.0;
    }
    let finite = |value: &f32| {
        if value.is_finite() { f64::from(*value) } else { 0.0 }
    };
    let mut sums = Vec::with_capacity(values.len().div_ceil(NESTED_BLOCK_SIZE));
    // Eight independent sums side by side, each in index order: one alone would wait for its own additions.
    let eights = values.chunks_exact(8 * NESTED_BLOCK_SIZE);
    let rest = eights.remainder();
    for eight in eights {
        let mut partial = [0.0f64; 8];
        for index in 0..NESTED_BLOCK_SIZE {
            for (chunk, sum) in partial.iter_mut().enumerate() {
                *sum += finite(&eight[chunk * NESTED_BLOCK_SIZE + index]);
            }
        }
        sums.extend(partial);
    }
    sums.extend(rest.chunks(NESTED_BLOCK_SIZE).map(|chunk| chunk.iter().map(finite).fold(0.0, |a, b| a + b)));
    while sums.len() > 1 {
        sums = sums.chunks(NESTED_BLOCK_SIZE).map(|chunk| chunk.iter().fold(0.0, |a, b| a + b)).collect();
    }
    (sums[0] / count as f64) as f32
}

/// Float32 scales of blocks `first..first + out.len()` of one expert: `map[code] * scale + offset`, each step rounded.
pub(crate) fn decode_scales(level: SimdLevel, codes: &[u8], scale: &[f32], offset: f32, first: usize, out: &mut [f32]) {
    let map = DynamicMap::Signed;
    let mut done = 0;
    while done < out.len() {
        let block = first + done;
        let here = (out.len() - done).min(NESTED_BLOCK_SIZE - block % NESTED_BLOCK_SIZE);
        let scale = scale[block / NESTED_BLOCK_SIZE];
        let (codes, out) = (&codes[block..block + here], &mut out[done..done + here]);
        let whole = here - here % 32;
        if whole > 0 {
            f32::decode(level, &codes[..whole], &[scale], whole, map.table(), false, &mut out[..whole]);
        }
        dequantize_block(&codes[whole..], scale, map.table(), &mut out[whole..]);
        for value in out {
            *value += offset;
        }
        done += here;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(absmax: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
        let mut codes = vec![0; absmax.len()];
        let mut scale = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
        let mut offset = [0.0];
        let parallel = Parallel::new(3);
        double_quantize(absmax, absmax.len(), &mut codes, &mut scale, &mut offset, &parallel, &Control::default())
            .expect("fits");
        (codes, scale, offset[0])
    }

    #[test]
    fn restored_scales_are_within_half_a_step_of_the_widest_cell() {
        let absmax: Vec<f32> = (0..1000).map(|i| 1.0 + 0.3 * ((i * 37 % 101) as f32 / 101.0)).collect();
        let (codes, scale, offset) = run(&absmax);
        let mut restored = vec![0.0; absmax.len()];
        decode_scales(simd_level().expect("set"), &codes, &scale, offset, 0, &mut restored);
        for (index, (a, b)) in absmax.iter().zip(&restored).enumerate() {
            assert!((a - b).abs() <= 0.0072 * scale[index / NESTED_BLOCK_SIZE] + 1e-6, "{index}: {a} {b}");
        }
    }

    #[test]
    fn equal_scales_are_kept_exactly_and_subnormal_ones_do_not_divide_by_zero() {
        let (codes, scale, offset) = run(&[0.5; 300]);
        assert!(
            codes.iter().all(|&code| code == ZERO)
                && scale.iter().all(|&s| s == 0.0)
                && offset.to_bits() == 0.5f32.to_bits()
        );
        let tiny = f32::from_bits(3);
        let (codes, ..) = run(&[0.0, tiny]);
        assert_ne!(codes[0], codes[1]);
    }

    #[test]
    fn a_nonfinite_scale_poisons_its_group_only() {
        let mut absmax = vec![1.0; 600];
        absmax[300] = f32::INFINITY;
        absmax[301] = f32::NAN;
        let (codes, scale, offset) = run(&absmax);
        assert_eq!(offset.to_bits(), 1.0f32.to_bits());
        assert!(scale[0] == 0.0 && scale[1].to_bits() == 0x7fc0_0000 && scale[2] == 0.0);
        assert!(codes.iter().all(|&code| code == ZERO));
    }
}
