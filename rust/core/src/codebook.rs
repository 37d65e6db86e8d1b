//! Codebooks: the values that codes stand for, and how a normalized value finds its code.

use crate::byte_search::ByteSearch;
use crate::dynamic_map::{DynamicMap, nearest_even_thresholds};
use crate::error::CoreError;
use crate::simd::with_ieee_floats;
use crate::spec::QuantType;

/// NF4 of the `QLoRA` paper, float32 bits; the index is the code.
pub const NF4_BITS: [u32; 16] = [
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
];

/// FP4 magnitudes by code 0-7, float32 bits; codes 8-15 negate them.
const FP4_HALF_BITS: [u32; 8] =
    [0x0000_0000, 0x3baa_aaab, 0x3f2a_aaab, 0x3f80_0000, 0x3eaa_aaab, 0x3f00_0000, 0x3e2a_aaab, 0x3e80_0000];

/// FP4 thresholds on |x|. NOTE: typed decimals in the reference implementation, some ulps off the midpoints.
const FP4_THRESHOLD_BITS: [u32; 7] =
    [0x3b2a_aab9, 0x3db0_0000, 0x3e55_5555, 0x3e95_5555, 0x3ed5_5556, 0x3f15_5550, 0x3f55_5555];

/// FP4 code of the k-th smallest magnitude.
pub const FP4_CODE_BY_RANK: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// How a normalized value is compared with the thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// The code is the number of thresholds below x.
    Ascending,
    /// The number of thresholds below |x| is a rank, [`FP4_CODE_BY_RANK`] gives the code, bit 3 is set iff x < 0.
    SignedMagnitude,
}

/// A table of 2 to 256 values and the thresholds between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    values: Vec<f32>,
    thresholds: Vec<f32>,
    search: Search,
    zero_code: u8,
    nibble_search: Option<NibbleSearch>,
    byte_search: Option<ByteSearch>,
}

impl Codebook {
    /// The table of a built-in type; `None` for [`QuantType::Codebook`], which the user defines.
    #[must_use]
    pub fn built_in(quant_type: QuantType) -> Option<Self> {
        let values: Vec<f32> = match quant_type {
            QuantType::Nf4 => NF4_BITS.iter().map(|&bits| f32::from_bits(bits)).collect(),
            QuantType::Int4 => (-7i8..=7).map(|level| f32::from(level) / 7.0).collect(),
            QuantType::Int8 => (-127i8..=127).map(|level| f32::from(level) / 127.0).collect(),
            QuantType::Fp4 => {
                let half = FP4_HALF_BITS.map(f32::from_bits);
                let values = half.iter().copied().chain(half.iter().map(|value| -value)).collect();
                let thresholds = FP4_THRESHOLD_BITS.iter().map(|&bits| f32::from_bits(bits)).collect();
                return Some(Self::new(values, thresholds, Search::SignedMagnitude));
            }
            QuantType::Dynamic8 => return Some(DynamicMap::Signed.codebook().clone()),
            QuantType::Udynamic8 => return Some(DynamicMap::Unsigned.codebook().clone()),
            QuantType::Codebook => return None,
        };
        // float32 midpoints, as the reference implementation has them; x > t goes up, so a tie goes down.
        let thresholds = values.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect();
        Some(Self::new(values, thresholds, Search::Ascending))
    }

    /// A table whose thresholds are those of [`nearest_even_thresholds`].
    pub(crate) fn nearest_even(values: &[f32]) -> Self {
        Self::new(values.to_vec(), nearest_even_thresholds(values), Search::Ascending)
    }

    /// A user's table.
    ///
    /// Its thresholds lie midway between the decimals that the values were written in (the shortest that name each
    /// float32), so that {0.3, 0.5} sends 4/10, whose float32 lies just above 0.4, to 0.5.
    ///
    /// # Errors
    /// [`CoreError::Spec`] unless it holds 2 to 256 finite, ascending, distinct values within [-1, 1].
    pub fn user(values: &[f32]) -> Result<Self, CoreError> {
        // Subnormal values must not depend on the caller's float mode.
        with_ieee_floats(|| Self::from_user(values))
    }

    fn from_user(values: &[f32]) -> Result<Self, CoreError> {
        if !(2..=256).contains(&values.len()) {
            return Err(CoreError::Spec(format!("a codebook holds 2 to 256 values; this one has {}", values.len())));
        }
        if let Some(bad) = values.iter().find(|value| !(-1.0..=1.0).contains(*value)) {
            return Err(CoreError::Spec(format!("codebook values lie within [-1, 1]; got {bad}")));
        }
        if let Some(at) = values.windows(2).position(|pair| pair[0] >= pair[1]) {
            return Err(CoreError::Spec(format!(
                "codebook values are ascending and distinct; entry {} is {}, entry {} is {}",
                at,
                values[at],
                at + 1,
                values[at + 1]
            )));
        }
        let decimals: Vec<f64> = values.iter().map(|value| shortest_decimal(*value)).collect();
        let thresholds = decimals.windows(2).map(|pair| floor_to_f32(f64::midpoint(pair[0], pair[1]))).collect();
        Ok(Self::new(values.iter().map(|value| value + 0.0).collect(), thresholds, Search::Ascending))
    }

    fn new(values: Vec<f32>, thresholds: Vec<f32>, search: Search) -> Self {
        let mut zero = 0;
        for (index, value) in values.iter().enumerate() {
            if value.abs() < values[zero].abs() {
                zero = index;
            }
        }
        let nibble_search = (values.len() <= 16).then(|| NibbleSearch::new(&thresholds));
        let byte_search = if nibble_search.is_some() { None } else { ByteSearch::new(&thresholds) };
        Self { values, thresholds, search, zero_code: zero as u8, nibble_search, byte_search }
    }

    /// float32 values, indexed by code.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Ascending; a value above the k-th belongs to a later entry.
    #[must_use]
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// How thresholds are compared.
    #[must_use]
    pub fn search(&self) -> Search {
        self.search
    }

    /// Bits that one code takes in storage: 4 up to 16 entries, else 8.
    #[must_use]
    pub fn bits(&self) -> u8 {
        if self.values.len() <= 16 { 4 } else { 8 }
    }

    /// Code of the entry nearest zero (the lower of two): what zero blocks and padding hold.
    #[must_use]
    pub fn zero_code(&self) -> u8 {
        self.zero_code
    }

    /// Code of a normalized value (|x| at most about 1, not NaN).
    #[inline]
    #[must_use]
    pub fn encode(&self, x: f32) -> u8 {
        match self.search {
            Search::Ascending => self.thresholds.partition_point(|&threshold| x > threshold) as u8,
            Search::SignedMagnitude => {
                let rank = self.thresholds.partition_point(|&threshold| x.abs() > threshold);
                FP4_CODE_BY_RANK[rank] | (u8::from(x < 0.0) << 3)
            }
        }
    }

    /// What vector code searches in; `None` for byte codes.
    #[must_use]
    pub(crate) fn nibble_search(&self) -> Option<&NibbleSearch> {
        self.nibble_search.as_ref()
    }

    /// The same for byte codes; `None` for nibbles, and where a table would be large.
    #[must_use]
    pub(crate) fn byte_search(&self) -> Option<&ByteSearch> {
        self.byte_search.as_ref()
    }
}

/// Thresholds arranged for vector code, of a codebook of at most 16 values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NibbleSearch {
    /// Padded to 16 with infinity, which nothing exceeds.
    pub(crate) thresholds: [f32; 16],
    /// A table of 32 cells, where no cell holds two thresholds.
    pub(crate) cells: Option<Cells>,
}

/// Cell k of [-1, 1] holds the x whose 15 x rounds to k - 16. Rounding is monotone, so an x above its cell's own
/// threshold is above all thresholds of the cells before, and no others: one exact comparison is left to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cells {
    /// The cell's own threshold, infinity where it has none.
    pub(crate) thresholds: [f32; 32],
    /// Thresholds of the cells before.
    pub(crate) below: [i32; 32],
}

/// Cells per unit of x.
pub(crate) const CELLS_PER_UNIT: f32 = 15.0;
/// Added to a float of small magnitude it leaves that, rounded, plus 16 in the lowest bits of the sum.
pub(crate) const CELL_MAGIC: f32 = 12_582_912.0 + 16.0;

impl NibbleSearch {
    fn new(thresholds: &[f32]) -> Self {
        let mut padded = [f32::INFINITY; 16];
        padded[..thresholds.len()].copy_from_slice(thresholds);
        Self { thresholds: padded, cells: Cells::new(thresholds) }
    }
}

impl Cells {
    fn new(thresholds: &[f32]) -> Option<Self> {
        let mut cells = Self { thresholds: [f32::INFINITY; 32], below: [0; 32] };
        for &threshold in thresholds {
            let cell = (threshold.mul_add(CELLS_PER_UNIT, CELL_MAGIC).to_bits() & 31) as usize;
            if cells.thresholds[cell] != f32::INFINITY {
                return None;
            }
            cells.thresholds[cell] = threshold;
            for below in &mut cells.below[cell + 1..] {
                *below += 1;
            }
        }
        Some(cells)
    }
}

/// The float64 of the shortest decimal that names this float32.
fn shortest_decimal(value: f32) -> f64 {
    (0..9)
        .filter_map(|digits| format!("{value:.digits$e}").parse::<f64>().ok())
        .find(|decimal| (*decimal as f32).to_bits() == value.to_bits())
        .expect("nine significant digits name a float32")
}

/// The largest float32 that is not above `value`.
#[must_use]
pub fn floor_to_f32(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) > value { nearest.next_down() } else { nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_the_entry_nearest_zero_and_the_lower_of_two() {
        assert_eq!(Codebook::built_in(QuantType::Nf4).expect("built in").zero_code(), 7);
        assert_eq!(Codebook::built_in(QuantType::Fp4).expect("built in").zero_code(), 0);
        assert_eq!(Codebook::user(&[-1.0, -0.25, 0.25, 1.0]).expect("valid").zero_code(), 1);
    }

    #[test]
    fn built_in_thresholds_send_a_tie_down_and_the_next_float_up() {
        for quant_type in [QuantType::Nf4, QuantType::Int4, QuantType::Int8] {
            let book = Codebook::built_in(quant_type).expect("built in");
            for (code, &threshold) in book.thresholds().iter().enumerate() {
                assert_eq!(book.encode(threshold), code as u8);
                assert_eq!(book.encode(threshold.next_up()), code as u8 + 1);
            }
        }
    }

    #[test]
    fn fp4_sign_bit_is_set_only_below_zero() {
        let book = Codebook::built_in(QuantType::Fp4).expect("built in");
        assert_eq!((book.encode(-0.0), book.encode(-1e-9), book.encode(1e-9)), (0, 8, 0));
        for (code, &value) in book.values().iter().enumerate().filter(|(code, _)| *code != 8) {
            assert_eq!(book.encode(value), code as u8);
        }
    }

    #[test]
    fn user_thresholds_lie_between_the_decimals_that_were_written() {
        let book = Codebook::user(&[-1.0, 0.3, 0.5, 1.0]).expect("valid");
        assert_eq!([1.0f32, -0.3, 0.5, 0.4].map(|x| book.encode(x)), [3, 1, 2, 2]);
        // Exactly representable midpoints: a tie goes down.
        let book = Codebook::user(&[-1.0, -0.5, 0.0, 0.5, 1.0]).expect("valid");
        assert_eq!([-0.75f32, -0.25, 0.25, 0.75].map(|x| book.encode(x)), [0, 1, 2, 3]);
    }

    #[test]
    fn impossible_tables_are_refused_with_the_reason() {
        for (values, reason) in [
            (vec![0.0], "2 to 256"),
            (vec![0.5, 0.5], "ascending"),
            (vec![-1.5, 0.0], "[-1, 1]"),
            (vec![f32::NAN, 0.0], "[-1, 1]"),
        ] {
            let error = Codebook::user(&values).expect_err("refused");
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
