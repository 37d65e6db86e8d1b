//! What a pool has done so far.

use std::time::Duration;

/// Counts since the pool was made, and how it stands now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of frames that the pool may use now: the budget, less what was given back.
    pub limit_bytes: usize,
    /// Bytes of frames that hold memory now.
    pub committed_bytes: usize,
    /// Bytes of pages in frames now.
    pub resident_bytes: usize,
    /// Bytes of pages that are on the host only now.
    pub paged_bytes: usize,
    /// Bytes of host memory behind the pool.
    pub host_bytes: usize,
    /// Buffers that exist now.
    pub buffers: usize,
    /// Acquired buffers that were there, or on the way.
    pub hits: u64,
    /// Acquired buffers that had to be fetched then.
    pub misses: u64,
    /// Buffers that were fetched ahead.
    pub prefetches: u64,
    /// Pages that lost their frame to others.
    pub evicted_pages: u64,
    /// Bytes copied from the host.
    pub bytes_in: u64,
    /// Bytes copied to the host.
    pub bytes_out: u64,
    /// How often the learned order of uses turned out to be another.
    pub trace_breaks: u64,
    /// Uses after which the order repeats, while it is known.
    pub trace_period: Option<usize>,
    /// How long the callers' streams have waited for copies.
    pub stall: Duration,
}

/// The part of [`Stats`] that only grows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub prefetches: u64,
    pub evicted_pages: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}
