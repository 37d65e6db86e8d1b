//! The 8-bit dynamic maps: signed, in which doubly quantized scales are stored, and unsigned, for what is never negative.

use std::sync::OnceLock;

use crate::codebook::{Codebook, floor_to_f32};
use crate::dequantize::Table;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DynamicMap {
    /// 256 ascending float32 values in [-1, 1]: linear within each of seven decades of either sign, plus 0 and 1.
    Signed,
    /// The same in [0, 1], twice as dense.
    Unsigned,
}

impl DynamicMap {
    /// The map, with a nearest entry for every float; made once.
    #[must_use]
    pub fn codebook(self) -> &'static Codebook {
        static BOOKS: [OnceLock<Codebook>; 2] = [const { OnceLock::new() }; 2];
        let signed = self == Self::Signed;
        BOOKS[usize::from(signed)].get_or_init(|| Codebook::nearest_even(&values(signed)))
    }

    /// What its codes stand for; made once.
    pub(crate) fn table(self) -> &'static Table {
        static TABLES: [OnceLock<Table>; 2] = [const { OnceLock::new() }; 2];
        TABLES[usize::from(self == Self::Signed)].get_or_init(|| Table::new(self.codebook()))
    }
}

/// Values of the signed map.
#[must_use]
#[allow(clippy::missing_panics_doc)] // the length is an invariant
pub fn dynamic_map_signed() -> &'static [f32; 256] {
    DynamicMap::Signed.codebook().values().try_into().expect("a dynamic map has 256 values")
}

/// Thresholds of the signed map: [`nearest_even_thresholds`].
#[must_use]
#[allow(clippy::missing_panics_doc)] // the length is an invariant
pub fn dynamic_thresholds() -> &'static [f32; 255] {
    DynamicMap::Signed.codebook().thresholds().try_into().expect("256 values have 255 thresholds")
}

fn values(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for exponent in 0..7i32 {
        let steps = if signed { 1usize << exponent } else { 2 << exponent };
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
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|index| values[index]) // 2 + 2 * (1 + 2 + ... + 64) is 256
}

/// Largest float32 that still belongs to entry i rather than i + 1, for ascending values.
///
/// The midpoint of two float32 is exact in float64; a float32 above the returned bound lies above it, one at or below
/// does not. Where the midpoint is itself a float32, the tie belongs to the even one of i and i + 1.
#[must_use]
pub fn nearest_even_thresholds(values: &[f32]) -> Vec<f32> {
    let bound = |(lower, pair): (usize, &[f32])| {
        let middle = f64::midpoint(f64::from(pair[0]), f64::from(pair[1]));
        let bound = floor_to_f32(middle);
        let tie = f64::from(bound).to_bits() == middle.to_bits();
        if tie && lower % 2 == 1 { bound.next_down() } else { bound }
    };
    values.windows(2).enumerate().map(bound).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::fmt::Write;

    #[test]
    fn maps_have_the_reference_implementations_bytes() {
        for (map, expected) in [
            (DynamicMap::Signed, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
            (DynamicMap::Unsigned, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
        ] {
            let bytes: Vec<u8> = map.codebook().values().iter().flat_map(|value| value.to_le_bytes()).collect();
            let hex = Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02x}").expect("writing to a string");
                text
            });
            assert_eq!(hex, expected);
        }
    }

    #[test]
    fn nearest_entry_wins_and_an_exact_tie_goes_to_the_even_index() {
        for (map, zero) in [(DynamicMap::Signed, 127), (DynamicMap::Unsigned, 0)] {
            let book = map.codebook();
            for lower in 0..255u8 {
                let (a, b) = (book.values()[usize::from(lower)], book.values()[usize::from(lower) + 1]);
                let middle = f64::midpoint(f64::from(a), f64::from(b));
                let below = floor_to_f32(middle);
                let above = below.next_up();
                assert_eq!((book.encode(a), book.encode(b)), (lower, lower + 1));
                assert_eq!(book.encode(above), lower + 1);
                let tie = f64::from(below).to_bits() == middle.to_bits();
                let expected = if tie { lower + lower % 2 } else { lower };
                assert_eq!(book.encode(below), expected);
            }
            assert_eq!((book.encode(0.0), book.encode(-0.0), book.zero_code()), (zero, zero, zero));
        }
    }
}
