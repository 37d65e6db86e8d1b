//! What can go wrong with a pool.

use thiserror::Error;

/// Errors of a pool over a backend whose own error is `E`; the messages are meant for users.
#[derive(Debug, Error)]
pub enum PagingError<E: std::error::Error> {
    /// A budget, page size or buffer size that cannot be.
    #[error("{0}")]
    Size(String),
    /// One object exceeds the budget.
    #[error(
        "buffer {name:?} takes {pages} pages ({bytes} bytes), but the budget holds {frames} ({budget} bytes): \
         raise the budget, or split the buffer"
    )]
    TooLarge {
        /// Whose it is.
        name: String,
        /// What it takes.
        pages: usize,
        /// The same in bytes, before rounding up to pages.
        bytes: usize,
        /// What there is.
        frames: usize,
        /// The same in bytes.
        budget: usize,
    },
    /// No room, because acquired buffers cannot be moved.
    #[error(
        "no room for buffer {name:?}: it takes {pages} pages in a row, and acquired buffers hold {held} of {frames}, \
         leaving at most {longest} in a row{given}; release some first, or raise the budget"
    )]
    Held {
        /// What was to be placed.
        name: String,
        /// Pages it takes.
        pages: usize,
        /// Pages of acquired buffers.
        held: usize,
        /// Frames of the budget.
        frames: usize,
        /// Longest run of frames that could be taken.
        longest: usize,
        /// Says how many pages were given back; empty when none.
        given: String,
    },
    /// The buffer does not exist any more.
    #[error("buffer {0} was freed: nothing can be done with it any more")]
    Freed(u64),
    /// Released more often than acquired.
    #[error("buffer {name:?} is not acquired on this stream: it was released already, or acquired on another stream")]
    NotAcquired {
        /// Which.
        name: String,
    },
    /// Somebody else uses the buffer.
    #[error("cannot {wish} buffer {name:?}: it is {by}; {way_out}")]
    InUse {
        /// What was asked for.
        wish: &'static str,
        /// Which.
        name: String,
        /// By whom, e.g. "acquired for writing".
        by: &'static str,
        /// What to do.
        way_out: &'static str,
    },
    /// What a graph captures must stay where it is.
    #[error(
        "a CUDA graph is being captured, and buffer {name:?} is not held for it: its address may be another at each replay; \
         hint: acquire it before the capture, for writing if the graph writes, and release it after the last replay"
    )]
    Capturing {
        /// Which.
        name: String,
    },
    /// A frozen buffer does not change.
    #[error("buffer {name:?} is frozen: it can be acquired for reading only")]
    Frozen {
        /// Which.
        name: String,
    },
    /// The device, its driver, or the host's memory.
    #[error("{0}")]
    Backend(#[from] E),
}
