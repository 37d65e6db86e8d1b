//! The dynamic maps as `kernels/optimizer.cu` looks entries up: by the cell that a magnitude's bits are in, and one exact
//! comparison.

use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};
use qlora_core::DynamicMap;

/// Bits of a float below a cell's number.
const CELL_SHIFT: u32 = 16;
/// The cell of 2^-23, which smaller magnitudes share.
const FIRST_CELL: u32 = 0x3400_0000 >> CELL_SHIFT;
const CELL_ROOM: usize = 2960;

/// `StateMaps` of `optimizer_block.cuh`, maps being [unsigned, signed].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct StateMaps {
    values: [[f32; 256]; 2],
    /// Ascending; infinity beyond the last.
    thresholds: [[f32; 256]; 2],
    /// Thresholds below each cell of the unsigned map, and of the signed one above zero and below it.
    below: [[u8; CELL_ROOM]; 3],
}

impl StateMaps {
    /// Made once.
    pub(crate) fn get() -> &'static Self {
        static MAPS: OnceLock<Box<StateMaps>> = OnceLock::new();
        MAPS.get_or_init(|| {
            let mut maps = Box::new(Self::zeroed());
            for (index, map) in [DynamicMap::Unsigned, DynamicMap::Signed].into_iter().enumerate() {
                let book = map.codebook();
                maps.values[index].copy_from_slice(book.values());
                maps.thresholds[index] = [f32::INFINITY; 256];
                maps.thresholds[index][..book.thresholds().len()].copy_from_slice(book.thresholds());
            }
            let [unsigned, signed] = [0, 1].map(|index| maps.thresholds[index]);
            let count = |thresholds: &[f32; 256], is_below: &dyn Fn(f32) -> bool| {
                thresholds.partition_point(|&threshold| is_below(threshold)) as u8
            };
            for cell in 0..CELL_ROOM {
                // The first cell goes down to zero.
                let least = if cell == 0 { 0.0 } else { edge(cell) };
                maps.below[0][cell] = count(&unsigned, &|threshold| threshold < least);
                maps.below[1][cell] = count(&signed, &|threshold| threshold < least);
                maps.below[2][cell] = count(&signed, &|threshold| threshold <= -edge(cell + 1));
            }
            maps
        })
    }
}

/// The least magnitude in a cell.
fn edge(cell: usize) -> f32 {
    f32::from_bits((FIRST_CELL + cell as u32) << CELL_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cells that values of [-1, 1] are in.
    const CELLS: usize = ((0x3f80_0000 >> CELL_SHIFT) - FIRST_CELL + 1) as usize;

    /// `nearest_code` of `optimizer_block.cuh`.
    fn nearest_code(x: f32, signed: bool) -> u8 {
        let maps = StateMaps::get();
        let size = if signed { x.abs() } else { x }.max(edge(0));
        let cell = ((size.to_bits() >> CELL_SHIFT) - FIRST_CELL) as usize;
        let code = maps.below[if signed { 1 + (x.to_bits() >> 31) as usize } else { 0 }][cell];
        code + u8::from(x > maps.thresholds[usize::from(signed)][usize::from(code)])
    }

    #[test]
    fn cells_give_the_nearest_entry_around_every_threshold_entry_and_cell() {
        for map in [DynamicMap::Unsigned, DynamicMap::Signed] {
            let book = map.codebook();
            let edges = (0..CELLS as u32).map(|cell| f32::from_bits((FIRST_CELL + cell) << CELL_SHIFT));
            let marks = book.thresholds().iter().chain(book.values()).copied().chain(edges).chain([0.0, 1e-30, 1e-40]);
            for mark in marks.flat_map(|mark| [mark, -mark]) {
                for x in [mark.next_down(), mark, mark.next_up()] {
                    if x.abs() <= 1.0 {
                        assert_eq!(nearest_code(x, map == DynamicMap::Signed), book.encode(x), "{x:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_two_thresholds_share_a_cell() {
        for below in &StateMaps::get().below {
            assert!(below[..CELLS].windows(2).all(|pair| pair[1].abs_diff(pair[0]) <= 1));
        }
    }

    /// `divide` of `optimizer_rules.cuh`.
    fn divide(x: f32, divisor: f32) -> f32 {
        let reciprocal = 1.0 / divisor;
        let round = |quotient: f32| (-divisor).mul_add(quotient, x).mul_add(reciprocal, quotient);
        let quotient = round(round(x * reciprocal));
        if x < f32::INFINITY { quotient } else { x }
    }

    #[test]
    fn quotients_by_way_of_a_reciprocal_are_those_of_a_division() {
        let mut divisors = vec![1.0, 1.0f32.next_down(), 0.5f32.next_up(), 1e-8, 0.999_999];
        for beta in [0.5f64, 0.9, 0.95, 0.99, 0.999, 0.9999] {
            divisors.extend([1, 2, 3, 7, 100, 12_345].map(|step| (1.0 - beta.powi(step)).sqrt() as f32));
        }
        let mut state = 1u32;
        for divisor in divisors.into_iter().filter(|&divisor| divisor > 0.0) {
            for x in [0.0, f32::INFINITY, 2f32.powi(-75), f32::MAX.sqrt()] {
                assert_eq!(divide(x, divisor).to_bits(), (x / divisor).to_bits(), "{x:e} / {divisor:e}");
            }
            for _ in 0..100_000 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let exponent = 127 - 75 + (state >> 8) % 138;
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = f32::from_bits(exponent << 23 | state >> 9);
                assert_eq!(divide(x, divisor).to_bits(), (x / divisor).to_bits(), "{x:e} / {divisor:e}");
            }
        }
        assert!(divide(f32::NAN, 0.5).is_nan());
    }
}
