//! One matrix, gathered transposed from the slices in which it is read: what is packed along the other dimension than the
//! one that its file stores in order.

use std::ops::Range;

use bytemuck::Pod;
use qlora_core::{Control, CoreError, FloatType, Floats, Parallel};

use crate::worker::floats;

/// Rows and columns of the squares that are moved at a time: both sides of one stay in the first cache.
const TILE: usize = 64;

/// A matrix (rows, cols) whose file holds it as (cols, rows).
#[derive(Debug, Default)]
pub struct Transposed {
    /// Aligned for every float type.
    words: Vec<u64>,
    rows: usize,
    cols: usize,
    bytes: usize,
}

impl Transposed {
    /// Begin a matrix of this logical shape; the memory of the one before is used again.
    pub fn begin(&mut self, rows: usize, cols: usize, float_type: FloatType) {
        (self.rows, self.cols, self.bytes) = (rows, cols, rows * cols * float_type.size());
        self.words.resize(self.bytes.div_ceil(8), 0);
    }

    /// Put in what the file holds at its `rows` and `columns`, row by row.
    ///
    /// # Errors
    /// [`CoreError::Interrupted`] when `control` says so.
    pub fn gather(
        &mut self,
        stored: &[u8],
        rows: Range<usize>,
        columns: Range<usize>,
        float_type: FloatType,
        parallel: &Parallel,
        control: &Control,
    ) -> Result<(), CoreError> {
        let cols = self.cols;
        let matrix = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut self.words)[..self.bytes];
        match float_type {
            FloatType::F32 => gather::<u32>(stored, rows, columns, matrix, cols, parallel, control),
            FloatType::Bf16 | FloatType::F16 => gather::<u16>(stored, rows, columns, matrix, cols, parallel, control),
        }
    }

    /// The bytes of the matrix, row by row.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice::<u64, u8>(&self.words)[..self.bytes]
    }

    /// Index of the first NaN or infinite value in the order of the file.
    #[must_use]
    pub fn first_nonfinite(&self, float_type: FloatType) -> Option<u64> {
        let is_finite = |index: usize| match floats(float_type, self.bytes()) {
            Floats::F32(values) => values[index].is_finite(),
            Floats::Bf16(values) => values[index].is_finite(),
            Floats::F16(values) => values[index].is_finite(),
        };
        let stored = (0..self.cols).flat_map(|col| (0..self.rows).map(move |row| (row, col)));
        stored.enumerate().find(|(_, (row, col))| !is_finite(row * self.cols + col)).map(|(index, _)| index as u64)
    }
}

/// Rows `rows` and columns `columns` of a stored matrix into `matrix`, whose rows are that one's columns.
fn gather<T: Pod + Send + Sync>(
    stored: &[u8],
    rows: Range<usize>,
    columns: Range<usize>,
    matrix: &mut [u8],
    matrix_cols: usize,
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let (stored, matrix) = (bytemuck::cast_slice::<u8, T>(stored), bytemuck::cast_slice_mut::<u8, T>(matrix));
    let width = columns.len();
    let taken = &mut matrix[columns.start * matrix_cols..columns.end * matrix_cols];
    let bands = taken.chunks_mut(TILE * matrix_cols).enumerate().collect();
    parallel.for_each(bands, control, |(band, lines): (usize, &mut [T])| {
        for first in (0..rows.len()).step_by(TILE) {
            let tile = first..(first + TILE).min(rows.len());
            for (line, values) in lines.chunks_mut(matrix_cols).enumerate() {
                let column = band * TILE + line;
                for (value, row) in values[rows.start..][tile.clone()].iter_mut().zip(tile.clone()) {
                    *value = stored[row * width + column];
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_make_up_the_transposed_matrix(
            rows in 1usize..200, cols in 1usize..200, high in 1usize..90, wide in 1usize..90, threads in 1usize..3,
        ) {
            let stored: Vec<bf16> = (0..rows * cols).map(|index| bf16::from_bits(index as u16)).collect();
            let mut matrix = Transposed::default();
            matrix.begin(cols, rows, FloatType::Bf16);
            for row in (0..rows).step_by(high) {
                for col in (0..cols).step_by(wide) {
                    let (above, beside) = (row..(row + high).min(rows), col..(col + wide).min(cols));
                    let piece: Vec<bf16> =
                        above.clone().flat_map(|r| stored[r * cols..][beside.clone()].to_vec()).collect();
                    let bytes = bytemuck::cast_slice(&piece);
                    let parallel = Parallel::new(threads);
                    matrix
                        .gather(bytes, above, beside, FloatType::Bf16, &parallel, &Control::default())
                        .expect("nobody cancels");
                }
            }
            let found: &[bf16] = bytemuck::cast_slice(matrix.bytes());
            for (index, value) in found.iter().enumerate() {
                prop_assert_eq!(value.to_bits() as usize, index % rows * cols + index / rows);
            }
        }
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_the_first_of_the_file() {
        let mut matrix = Transposed::default();
        matrix.begin(3, 2, FloatType::F32);
        // Stored as (2, 3): row 1 begins with NaN, row 0 ends with infinity.
        let stored = [1.0f32, 2.0, f32::INFINITY, f32::NAN, 5.0, 6.0];
        let bytes = bytemuck::cast_slice(&stored);
        let parallel = Parallel::new(1);
        matrix.gather(bytes, 0..2, 0..3, FloatType::F32, &parallel, &Control::default()).expect("nobody cancels");
        assert_eq!(matrix.first_nonfinite(FloatType::F32), Some(2));
        matrix.begin(1, 2, FloatType::F32);
        matrix.gather(&bytes[..8], 0..2, 0..1, FloatType::F32, &parallel, &Control::default()).expect("nobody cancels");
        assert_eq!(matrix.first_nonfinite(FloatType::F32), None);
    }
}
