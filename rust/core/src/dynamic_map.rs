//! The signed 8-bit dynamic map, in which doubly quantized scales are stored.

use std::sync::OnceLock;

use crate::codebook::floor_to_f32;

/// 256 ascending float32 values: linear within each of seven decades, plus 0 and 1.
#[must_use]
pub fn dynamic_map_signed() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut values = vec![0.0f32, 1.0];
        for exponent in 0..7i32 {
            let steps = 1usize << exponent;
            let step = (1.0f32 - 0.1) / steps as f32;
            let bound = |index: usize| -> f32 {
                if index < steps.div_ceil(2) {
                    step.mul_add(index as f32, 0.1)
                } else {
                    (-step).mul_add((steps - index) as f32, 1.0)
                }
            };
            let decade = 10f64.powi(exponent - 6) as f32;
            for index in 0..steps {
                let value = f32::midpoint(bound(index), bound(index + 1)) * decade;
                values.extend([value, -value]);
            }
        }
        values.sort_by(f32::total_cmp);
        std::array::from_fn(|index| values[index]) // 2 + 2 * (1 + 2 + ... + 64) is 256
    })
}

/// Finds the nearest entry of the signed dynamic map; an exact tie goes to the even index.
#[derive(Debug)]
pub struct DynamicEncoder {
    /// Codes of the least float of each cell: floats of equal sign, exponent and first six bits of the mantissa. A cell
    /// holds one threshold at most.
    least: [[u8; CELLS]; 2],
    thresholds: [f32; 256],
}

/// Mantissa bits that do not tell cells apart.
const CELL_SHIFT: u32 = 17;
/// The first cell also holds all smaller magnitudes: 2^-23 lies below every threshold but those around zero.
const FIRST_CELL: u32 = ((127 - 23) << 23) >> CELL_SHIFT;
/// Up to and including the cell that begins at 1.
const CELLS: usize = 23 * 64 + 1;

impl DynamicEncoder {
    /// Made once.
    #[must_use]
    pub fn get() -> &'static Self {
        static ENCODER: OnceLock<DynamicEncoder> = OnceLock::new();
        ENCODER.get_or_init(|| {
            let mut thresholds = [f32::INFINITY; 256];
            thresholds[..255].copy_from_slice(dynamic_thresholds());
            let search = |x: f32| thresholds[..255].partition_point(|&threshold| x > threshold) as u8;
            let least = [0, 1].map(|negative| {
                std::array::from_fn(|cell| {
                    let smallest = if cell == 0 { 0 } else { (FIRST_CELL + cell as u32) << CELL_SHIFT };
                    let largest = ((FIRST_CELL + cell as u32 + 1) << CELL_SHIFT) - 1;
                    search(if negative == 1 { -f32::from_bits(largest) } else { f32::from_bits(smallest) })
                })
            });
            Self { least, thresholds }
        })
    }

    /// Code of x, which is not NaN.
    #[inline]
    #[must_use]
    pub fn encode(&self, x: f32) -> u8 {
        let bits = x.to_bits();
        let cell = ((bits & 0x7fff_ffff) >> CELL_SHIFT).clamp(FIRST_CELL, FIRST_CELL + CELLS as u32 - 1) - FIRST_CELL;
        let code = self.least[(bits >> 31) as usize][cell as usize];
        code + u8::from(x > self.thresholds[usize::from(code)])
    }
}

/// Largest float32 that still belongs to entry i rather than i + 1.
///
/// The midpoint of two float32 is exact in float64; a float32 above the returned bound lies above it, one at or below
/// does not. Where the midpoint is itself a float32, the tie belongs to the even one of i and i + 1.
#[must_use]
pub fn dynamic_thresholds() -> &'static [f32; 255] {
    static THRESHOLDS: OnceLock<[f32; 255]> = OnceLock::new();
    THRESHOLDS.get_or_init(|| {
        let map = dynamic_map_signed();
        std::array::from_fn(|lower| {
            let middle = f64::midpoint(f64::from(map[lower]), f64::from(map[lower + 1]));
            let bound = floor_to_f32(middle);
            let tie = f64::from(bound).to_bits() == middle.to_bits();
            if tie && lower % 2 == 1 { bound.next_down() } else { bound }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::fmt::Write;

    #[test]
    fn map_has_the_reference_implementations_bytes() {
        let bytes: Vec<u8> = dynamic_map_signed().iter().flat_map(|value| value.to_le_bytes()).collect();
        let hex = Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a string");
            text
        });
        assert_eq!(hex, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
    }

    #[test]
    fn nearest_entry_wins_and_an_exact_tie_goes_to_the_even_index() {
        let map = dynamic_map_signed();
        let encode_dynamic = |x| DynamicEncoder::get().encode(x);
        for lower in 0..255u8 {
            let (a, b) = (map[usize::from(lower)], map[usize::from(lower) + 1]);
            let middle = f64::midpoint(f64::from(a), f64::from(b));
            let below = floor_to_f32(middle);
            let above = below.next_up();
            assert_eq!((encode_dynamic(a), encode_dynamic(b)), (lower, lower + 1));
            assert_eq!(encode_dynamic(above), lower + 1);
            let tie = f64::from(below).to_bits() == middle.to_bits();
            let expected = if tie { lower + lower % 2 } else { lower };
            assert_eq!(encode_dynamic(below), expected);
        }
        assert_eq!(encode_dynamic(0.0), 127);
        assert_eq!(encode_dynamic(-0.0), 127);
    }

    #[test]
    fn cells_give_what_a_plain_search_gives() {
        let encoder = DynamicEncoder::get();
        // Every cell's ends and middle, and some floats beyond 1, which a rounded product can reach.
        for bits in (0..0x3f80_0040u32).step_by(1 << 12).chain(0x3f7f_ffc0..0x3f80_0040) {
            for bits in [bits, bits.wrapping_sub(1) & 0x7fff_ffff, bits + 1] {
                for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    let plain = dynamic_thresholds().partition_point(|&threshold| x > threshold) as u8;
                    assert!(x.is_nan() || encoder.encode(x) == plain, "{x}");
                }
            }
        }
    }
}
