//! The dynamic maps as `kernels/optimizer.cu` looks entries up: by the cell that a magnitude's bits are in, and one exact
//! comparison.

use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};
use qlora_core::DynamicMap;

/// Bits of a float below a cell's number.
const CELL_SHIFT: u32 = 16;
/// The cell of 2^-23, which smaller magnitudes share.
const FIRST_CELL: u32 = 0x3400_0000 >> CELL_SHIFT;
const CELLS: usize = ((0x3f80_0000 >> CELL_SHIFT) - FIRST_CELL + 1) as usize;
const CELL_ROOM: usize = 2960;

/// `StateMaps` of `optimizer_block.cuh`, [unsigned, signed].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct StateMaps {
    values: [[f32; 256]; 2],
    /// Ascending; infinity beyond the last. Of the signed map those of its upper half: the lower mirrors it.
    thresholds: [[f32; 256]; 2],
    /// Thresholds below each cell.
    below: [[u8; CELL_ROOM]; 2],
}

impl StateMaps {
    /// Made once.
    pub(crate) fn get() -> &'static Self {
        static MAPS: OnceLock<Box<StateMaps>> = OnceLock::new();
        MAPS.get_or_init(|| {
            let mut maps = Box::new(Self::zeroed());
            for (index, map) in [DynamicMap::Unsigned, DynamicMap::Signed].into_iter().enumerate() {
                maps.fill(index, map);
            }
            maps
        })
    }

    fn fill(&mut self, index: usize, map: DynamicMap) {
        let book = map.codebook();
        self.values[index].copy_from_slice(book.values());
        let upper = &book.thresholds()[usize::from(book.zero_code())..];
        self.thresholds[index] = [f32::INFINITY; 256];
        self.thresholds[index][..upper.len()].copy_from_slice(upper);
        for (cell, below) in self.below[index].iter_mut().enumerate().skip(1) {
            let least = f32::from_bits((FIRST_CELL + cell.min(CELLS - 1) as u32) << CELL_SHIFT);
            *below = upper.partition_point(|&threshold| threshold < least) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `nearest_code` of `optimizer_block.cuh`.
    fn nearest_code(x: f32, signed: bool) -> u8 {
        let maps = StateMaps::get();
        let size = if signed { x.abs() } else { x.max(0.0) };
        let bits = size.to_bits() >> CELL_SHIFT;
        let cell = if bits <= FIRST_CELL { 0 } else { (bits - FIRST_CELL).min(CELLS as u32 - 1) };
        let mut rank = maps.below[usize::from(signed)][cell as usize];
        rank += u8::from(size > maps.thresholds[usize::from(signed)][usize::from(rank)]);
        match (signed, x < 0.0) {
            (false, _) => rank,
            (true, true) => 127 - rank.min(127),
            (true, false) => 127 + rank,
        }
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
            assert!(below[..CELLS].windows(2).all(|pair| pair[1] - pair[0] <= 1));
        }
    }
}
