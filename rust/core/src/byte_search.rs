//! How a normalized value finds its code among 17 to 256 by one look-up and one comparison.

use std::iter::Peekable;

/// A table of cells: floats of equal sign, exponent and first bits of the mantissa. A cell holds one threshold at most.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ByteSearch {
    /// Cells of floats above zero by ascending magnitude, then as many of the others. The top byte is the code of the
    /// cell's least magnitude; where the mantissa's rest exceeds the lower bits, the code lies one further from zero.
    pub(crate) entries: Vec<u32>,
    /// Bits of the mantissa's rest.
    pub(crate) shift: u32,
    /// Bits of the first cell's least magnitude; smaller ones count as this.
    pub(crate) least: u32,
    /// Bits of the last cell's greatest magnitude (it begins at 1); greater ones count as this.
    pub(crate) greatest: u32,
}

/// Of one sign. The entries that a weight's values hit stay in the first-level cache.
const MOST_CELLS: u32 = 4096;
/// 32 to 256 cells an octave.
const SHIFTS: [u32; 4] = [18, 17, 16, 15];

impl ByteSearch {
    /// For ascending thresholds in [-1, 1]; `None` where they lie too close to each other, or to zero, for a small table.
    pub(crate) fn new(thresholds: &[f32]) -> Option<Self> {
        SHIFTS.into_iter().find_map(|shift| Self::with_shift(thresholds, shift))
    }

    fn with_shift(thresholds: &[f32], shift: u32) -> Option<Self> {
        // The greatest magnitudes that do not lie beyond each threshold, which counts as below itself. A threshold at
        // zero needs none: it parts the signs.
        let above = thresholds.iter().filter(|threshold| **threshold > 0.0).map(|threshold| threshold.to_bits());
        let below = thresholds.iter().rev().filter(|threshold| **threshold < 0.0);
        let below = below.map(|threshold| (-threshold).to_bits() - 1);
        let last = 1.0f32.to_bits() >> shift;
        let nearest = above.clone().chain(below.clone()).min().map_or(last, |bits| bits >> shift);
        // The first cell also holds everything smaller, and therefore no threshold.
        let first = nearest.checked_sub(1)?;
        if last - first >= MOST_CELLS {
            return None;
        }
        let rest = (1 << shift) - 1;
        let mut entries = Vec::with_capacity(2 * (last - first + 1) as usize);
        let mut fill = |sign: u32, least: u32, bounds: &mut dyn Iterator<Item = u32>| {
            let mut bounds = bounds.peekable();
            (first..=last).all(|cell| {
                let (start, end) = (cell << shift, (cell << shift) + rest);
                let x = f32::from_bits(sign | if cell == first { least } else { start });
                let code = thresholds.partition_point(|&threshold| x > threshold) as u32;
                let bound = next_until(&mut bounds, end).map_or(rest, |bound| bound & rest);
                entries.push(code << 24 | bound);
                next_until(&mut bounds, end).is_none()
            })
        };
        let fits = fill(0, 1, &mut above.clone()) && fill(1 << 31, 0, &mut below.clone());
        fits.then_some(Self { entries, shift, least: first << shift, greatest: (last << shift) + rest })
    }
}

/// The next bound, if it is not beyond the end of its cell.
fn next_until(bounds: &mut Peekable<impl Iterator<Item = u32>>, end: u32) -> Option<u32> {
    bounds.next_if(|bound| *bound <= end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::Codebook;
    use crate::spec::QuantType;

    /// What the kernels do.
    fn encode(search: &ByteSearch, x: f32) -> u8 {
        let magnitude = (x.to_bits() & 0x7fff_ffff).clamp(search.least, search.greatest);
        let cell = ((magnitude - search.least) >> search.shift) as usize;
        let positive = x > 0.0;
        let entry = search.entries[if positive { cell } else { search.entries.len() / 2 + cell }];
        let rest = (1 << search.shift) - 1;
        let beyond = u8::from(magnitude & rest > entry & rest);
        let code = (entry >> 24) as u8;
        if positive { code + beyond } else { code - beyond }
    }

    #[test]
    fn cells_give_the_codes_of_a_plain_search_around_every_threshold_and_cell() {
        let even: Vec<f32> = (0..256).map(|index| (index as f32 - 127.5) / 127.5).collect();
        let seventeen: Vec<f32> = (0..17).map(|index| index as f32 / 16.0).collect();
        let coarse_below: Vec<f32> = [-1.0, -0.5].into_iter().chain((0..64).map(|index| index as f32 / 63.0)).collect();
        let users = [even, seventeen, coarse_below].map(|values| Codebook::user(&values).expect("valid"));
        let built_in = [QuantType::Int8, QuantType::Dynamic8, QuantType::Udynamic8]
            .map(|quant_type| Codebook::built_in(quant_type).expect("built in"));
        for book in users.into_iter().chain(built_in) {
            let search = ByteSearch::new(book.thresholds()).expect("thresholds lie far enough apart");
            assert!(search.least.is_multiple_of(1 << search.shift));
            let cells = (search.least..search.greatest).step_by(1 << (search.shift - 2)).map(f32::from_bits);
            let marks = cells.chain(book.thresholds().iter().copied()).chain([0.0, 1.0, f32::from_bits(1)]);
            for mark in marks.flat_map(|mark| [mark, -mark]) {
                for x in [mark.next_down(), mark, mark.next_up()] {
                    assert_eq!(encode(&search, x), book.encode(x), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn thresholds_that_would_need_a_large_table_have_none() {
        let dense: Vec<f32> = (0..200).map(|index| 0.5 + index as f32 * 1e-5).collect();
        for thresholds in [dense, vec![1e-30, 0.5, 0.51], vec![f32::from_bits(1)]] {
            assert!(ByteSearch::new(&thresholds).is_none(), "{thresholds:?}");
        }
    }
}
