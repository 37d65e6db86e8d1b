//! What can go wrong with numbers.

use thiserror::Error;

/// Errors of this crate; the messages are meant for users.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CoreError {
    /// The weight holds NaN or infinite values.
    #[error(
        "the weight holds {count} NaN or infinite value(s), the first at flat index {first}; \
         mend the weight, or pass nonfinite=\"propagate\" to turn their blocks into NaN"
    )]
    NonFinite {
        /// How many.
        count: u64,
        /// Flat row-major index of the first one in the slice that was given.
        first: u64,
    },
    /// A data type, block size or codebook that cannot be.
    #[error("{0}")]
    Spec(String),
    /// Sizes that do not fit together.
    #[error("{0}")]
    Shape(String),
    /// A stored code that the codebook does not have.
    #[error("code {code} at flat index {first} lies outside the codebook of {entries} values: the codes are damaged")]
    Code {
        /// The offending code.
        code: u8,
        /// Flat index of the first element that has such a code.
        first: u64,
        /// Entries in the codebook.
        entries: usize,
    },
    /// `QLORA_RS_SIMD` asks for what this processor cannot do.
    #[error("{0}")]
    Simd(String),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
}
