//! Files larger than the memory, read and written without pushing everything else out of the page cache.
//!
//! It is faster, too: pages that come free are used again at once, while the processor still has them in its cache, and
//! the system need not find and clear others, which a virtual machine may have to get from its host.

use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// Places in a file at which is asked whether it is in the page cache.
const PROBES: u64 = 64;
/// More than the largest page, which may be megabytes.
const PAGE: u64 = 4 << 20;

/// Drop a stretch of a file (all from `start` on where `bytes` is none) from the page cache. What is not on the disk yet
/// stays, and is sent there.
///
/// NOTE: pages are dropped whole. One that lies across the start goes too, as it stayed with the stretch before.
pub fn drop_pages(file: &File, start: u64, bytes: Option<NonZeroU64>) {
    let before = start.min(PAGE);
    // Advice only: a file system that has none to take is read and written just the same.
    let _ = fadvise(file, start - before, bytes.map(|bytes| bytes.saturating_add(before)), Advice::DontNeed);
}

/// Is the byte at `position` in the page cache? Where the system (before Linux 4.14) or the file system cannot tell, yes.
#[must_use]
pub fn is_cached(file: &File, position: u64) -> bool {
    let mut byte = [0u8];
    preadv2(file, &mut [IoSliceMut::new(&mut byte)], position, ReadWriteFlags::NOWAIT) != Err(Errno::AGAIN)
}

/// What a reader that goes from front to back leaves of a file in the page cache: what was there before.
#[derive(Debug)]
pub struct Trail {
    /// Up to where the file is dropped; none where it stays.
    dropped: Option<u64>,
}

impl Trail {
    /// For a file of `bytes` of which nothing was read yet.
    ///
    /// NOTE: not `RWF_DONTCACHE` (Linux 6.14), which would know for each page whether it was there: it drops a page that
    /// was read in part, and the next read has to fetch that again.
    #[must_use]
    pub fn new(file: &File, bytes: u64) -> Self {
        // So that a look does not fetch what may be next, which would then be found.
        let _ = fadvise(file, 0, None, Advice::Random);
        let absent = (0..PROBES).filter(|probe| !is_cached(file, bytes / PROBES * probe)).count() as u64;
        Self { dropped: (absent > PROBES / 2).then_some(0) }
    }

    /// The reader is done with all before `position`.
    pub fn leave(&mut self, file: &File, position: u64) {
        // Not the page that it is in, which is read on.
        let end = position.saturating_sub(PAGE);
        if let Some(dropped) = self.dropped
            && let Some(bytes) = end.checked_sub(dropped).and_then(NonZeroU64::new)
        {
            drop_pages(file, dropped, Some(bytes));
            self.dropped = Some(end);
        }
    }

    /// The reader is done with the file.
    pub fn end(&self, file: &File) {
        if let Some(dropped) = self.dropped {
            drop_pages(file, dropped, None);
        }
    }
}
