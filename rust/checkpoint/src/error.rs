//! What can go wrong with files.

use std::io;
use std::path::{Path, PathBuf};

use qlora_core::CoreError;
use thiserror::Error;

/// Errors of this crate; the messages are meant for users.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what it says it is.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in it, what was expected, what was found.
        what: String,
    },
    /// A wish that cannot be met.
    #[error("{0}")]
    Unsupported(String),
    /// A weight holds NaN or infinite values.
    #[error(
        "{}: tensor {tensor:?} holds {count} NaN or infinite value(s), the first at flat index {first}; \
         mend the weight, or leave it as it is by skipping it",
        path.display()
    )]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many.
        count: u64,
        /// Flat row-major index of the first one in the whole tensor.
        first: u64,
    },
    /// From the numbers.
    #[error(transparent)]
    Core(#[from] CoreError),
}

impl CheckpointError {
    /// Name the file in a system error.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_owned(), source }
    }

    /// A file that is not what it says.
    pub(crate) fn format(path: &Path, what: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), what: what.into() }
    }
}
