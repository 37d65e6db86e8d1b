//! A tensor in slices: how it is cut, and the memory that a slice passes in.

use crate::header::Tensor;
use crate::plan::{PackStep, Step};

/// Memory for one slice, aligned for every float type.
#[derive(Debug)]
pub struct Buffer {
    words: Vec<u64>,
    bytes: usize,
}

impl Buffer {
    /// Room for slices of `bytes`.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self { words: vec![0; bytes.div_ceil(8)], bytes: 0 }
    }

    /// The slice that was read.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    /// Room for a slice of `bytes`, more than planned for if a single block needs it.
    pub fn prepare(&mut self, bytes: usize) -> &mut [u8] {
        if self.words.len() * 8 < bytes {
            self.words.resize(bytes.div_ceil(8), 0);
        }
        self.bytes = bytes;
        &mut bytemuck::cast_slice_mut(&mut self.words)[..bytes]
    }
}

/// Part of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Bytes from `offset` on.
    Bytes {
        /// Counted from the start of the tensor.
        offset: u64,
    },
    /// `rows` stored rows of one expert from `row` on, of each the columns from `col` on. Less than whole rows only
    /// where a row is longer than a slice: then one row at a time, cut between blocks where these run along rows.
    Block {
        /// Which expert.
        expert: usize,
        /// First row.
        row: usize,
        /// How many.
        rows: usize,
        /// First column.
        col: usize,
        /// How many.
        cols: usize,
    },
}

/// The pieces of a weight as it is stored, each at most `slice_bytes` (but one block at least), in storage order.
fn weight_pieces(step: &PackStep, slice_bytes: usize) -> impl Iterator<Item = Piece> + use<> {
    let (experts, (rows, cols)) = (step.experts, step.stored());
    let slice = (slice_bytes / step.float_type.size()).max(1);
    let block = step.layout.block_size();
    let rows_per_piece = (slice / cols.max(1)).max(1);
    let cols_per_piece = if cols > slice { (slice / block * block).max(block) } else { cols.max(1) };
    let empty = cols == 0;
    (0..if empty { 0 } else { experts }).flat_map(move |expert| {
        (0..rows).step_by(rows_per_piece).flat_map(move |row| {
            (0..cols).step_by(cols_per_piece).map(move |col| Piece::Block {
                expert,
                row,
                rows: rows_per_piece.min(rows - row),
                col,
                cols: cols_per_piece.min(cols - col),
            })
        })
    })
}

/// The pieces of a tensor and their sizes in bytes, in storage order.
#[must_use]
pub fn pieces(tensor: &Tensor, step: &Step, slice_bytes: usize) -> Box<dyn Iterator<Item = (Piece, usize)>> {
    match step {
        Step::Pack(step) => {
            let size = step.float_type.size();
            Box::new(weight_pieces(step, slice_bytes).map(move |piece| match piece {
                Piece::Block { rows, cols, .. } => (piece, rows * cols * size),
                Piece::Bytes { .. } => (piece, 0),
            }))
        }
        Step::Copy(_) => {
            let total = tensor.bytes();
            let offsets = (0..total).step_by(slice_bytes);
            Box::new(
                offsets.map(move |offset| (Piece::Bytes { offset }, (total - offset).min(slice_bytes as u64) as usize)),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qlora_core::{FloatType, Layout, QuantSpec, QuantType};

    use super::*;
    use crate::plan::Slot;

    fn step(experts: usize, rows: usize, cols: usize, block_size: usize) -> PackStep {
        let spec = QuantSpec::new(QuantType::Nf4, block_size, false, None).expect("valid");
        let layout = Layout::new(experts, rows, cols, &spec).expect("fits");
        let slot = Slot { shard: 0, offset: 0 };
        let (float_type, transposed) = (FloatType::Bf16, false);
        PackStep { float_type, experts, rows, cols, transposed, layout, codes: slot, absmax: slot, nested: None }
    }

    proptest! {
        #[test]
        fn pieces_cover_a_weight_in_storage_order_and_cut_rows_between_blocks_only(
            experts in 0usize..4, rows in 0usize..9, cols in 0usize..300, slice in 1usize..700,
            block_size in prop::sample::select(vec![32usize, 64, 128]),
        ) {
            let mut next = 0;
            for piece in weight_pieces(&step(experts, rows, cols, block_size), slice) {
                let Piece::Block { expert, row, rows: count, col, cols: width } = piece else { unreachable!() };
                prop_assert_eq!((expert * rows + row) * cols + col, next);
                prop_assert!(col.is_multiple_of(block_size) && (width == cols || count == 1));
                prop_assert!(count * width * 2 <= slice.max(2 * block_size.min(cols)).max(2));
                next += count * width;
            }
            prop_assert_eq!(next, experts * rows * cols);
        }
    }
}
