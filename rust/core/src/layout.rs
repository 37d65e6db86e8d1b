//! Where a weight's codes and scales lie: rows are aligned, a block never crosses a row.

use crate::error::CoreError;
use crate::spec::QuantSpec;

/// Consecutive blocks of one expert whose scales share a scale, when doubly quantized.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// Sizes of a weight of shape (experts, rows, columns) under a spec; every product is known not to overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    experts: usize,
    rows: usize,
    cols: usize,
    block_size: usize,
    bits: u8,
}

impl Layout {
    /// # Errors
    /// [`CoreError::Shape`] when the number of elements does not fit the machine's words.
    pub fn new(experts: usize, rows: usize, cols: usize, spec: &QuantSpec) -> Result<Self, CoreError> {
        // A size of 0 makes the whole 0, but not an expert or a row, whose sizes are asked for too.
        let product = |bound: usize, size: &usize| bound.checked_mul(*size.max(&1));
        if [experts, rows, cols].iter().try_fold(8, product).is_none() {
            return Err(CoreError::Shape(format!("a weight of shape ({experts}, {rows}, {cols}) is too large")));
        }
        Ok(Self { experts, rows, cols, block_size: spec.block_size(), bits: spec.codebook().bits() })
    }

    /// Leading dimension(s).
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of one expert.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements that share a scale.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Bits that a code takes in storage: 4 or 8.
    #[must_use]
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Elements of the weight.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.experts * self.rows * self.cols
    }

    /// Bytes of a row's codes.
    #[must_use]
    pub fn bytes_per_row(&self) -> usize {
        if self.bits == 8 { self.cols } else { self.cols.div_ceil(2) }
    }

    /// Blocks of a row.
    #[must_use]
    pub fn blocks_per_row(&self) -> usize {
        self.cols.div_ceil(self.block_size)
    }

    /// Blocks of one expert.
    #[must_use]
    pub fn blocks_per_expert(&self) -> usize {
        self.rows * self.blocks_per_row()
    }

    /// Scale groups of one expert.
    #[must_use]
    pub fn groups_per_expert(&self) -> usize {
        self.blocks_per_expert().div_ceil(NESTED_BLOCK_SIZE)
    }

    /// Bytes of all codes.
    #[must_use]
    pub fn code_bytes(&self) -> usize {
        self.experts * self.rows * self.bytes_per_row()
    }

    /// Blocks of all experts.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.experts * self.blocks_per_expert()
    }

    /// Scale groups of all experts.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.experts * self.groups_per_expert()
    }

    /// The same bytes seen with the longest rows that blocks allow, which is how they are worked on.
    #[must_use]
    pub fn runs(&self) -> Runs {
        let rows = self.experts * self.rows;
        let flat = self.cols.is_multiple_of(self.block_size) && rows > 0;
        let (rows, cols) = if flat { (1, rows * self.cols) } else { (rows, self.cols) };
        Runs {
            row_len: cols,
            blocks_per_row: cols.div_ceil(self.block_size),
            bytes_per_row: if self.bits == 8 { cols } else { cols.div_ceil(2) },
            blocks: rows * cols.div_ceil(self.block_size),
            block_size: self.block_size,
            nibbles: self.bits == 4,
        }
    }
}

/// Where the blocks of a weight begin, by their number in storage order.
#[derive(Debug, Clone, Copy)]
pub struct Runs {
    /// Elements of a row.
    pub row_len: usize,
    /// Blocks of a row.
    pub blocks_per_row: usize,
    /// Code bytes of a row.
    pub bytes_per_row: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Elements of a full block.
    pub block_size: usize,
    /// Two codes a byte?
    pub nibbles: bool,
}

impl Runs {
    /// First element of a block (of the end, for `block == self.blocks`).
    #[must_use]
    pub fn element(&self, block: usize) -> usize {
        if self.blocks == 0 {
            return 0;
        }
        (block / self.blocks_per_row) * self.row_len + (block % self.blocks_per_row) * self.block_size
    }

    /// First code byte of a block (of the end, for `block == self.blocks`).
    #[must_use]
    pub fn byte(&self, block: usize) -> usize {
        if self.blocks == 0 {
            return 0;
        }
        let within = (block % self.blocks_per_row) * self.block_size;
        (block / self.blocks_per_row) * self.bytes_per_row + if self.nibbles { within / 2 } else { within }
    }

    /// Elements of a block: `block_size`, or less at the end of a row.
    #[must_use]
    pub fn len(&self, block: usize) -> usize {
        self.block_size.min(self.row_len - (block % self.blocks_per_row) * self.block_size)
    }

    /// Cut `blocks` into consecutive pieces of about `per_piece` blocks.
    #[must_use]
    pub fn pieces(&self, per_piece: usize) -> Vec<std::ops::Range<usize>> {
        let step = per_piece.max(1);
        (0..self.blocks).step_by(step).map(|first| first..self.blocks.min(first + step)).collect()
    }

    /// Consecutive full blocks of one row from `first` on, at most to `last`; 0 if `first` is a short one.
    #[must_use]
    pub fn full_blocks(&self, first: usize, last: usize) -> usize {
        let in_row = first % self.blocks_per_row;
        let full_in_row = self.row_len / self.block_size;
        full_in_row.saturating_sub(in_row).min(last - first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::QuantType;

    #[test]
    fn no_size_of_an_empty_weight_overflows_either() {
        let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
        for (experts, rows, cols) in [(0, 1 << 32, 1 << 32), (1 << 61, 1, 0), (0, 0, usize::MAX), (1 << 40, 1 << 30, 0)]
        {
            assert!(
                matches!(Layout::new(experts, rows, cols, &spec), Err(CoreError::Shape(_))),
                "{experts} {rows} {cols}"
            );
        }
        let largest = Layout::new(0, 1 << 30, 1 << 30, &spec).expect("fits");
        assert_eq!((largest.groups(), largest.blocks_per_expert()), (0, 1 << 54));
    }
}
