//! Output on its way to the disk while the next is made, and out of the page cache once it is there.
//!
//! Left to itself the system begins when a tenth of the memory is dirty, so that the last sync waits for gigabytes.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::sync::mpsc::Receiver;

use crate::error::CheckpointError;
use crate::page_cache::drop_pages;
use crate::plan::Extent;
use crate::writer::Writer;

/// Bytes of which to hear at a time.
pub const WORTH_TELLING: u64 = 4 << 20;
/// Bytes that go to the disk in one go: enough to keep it busy, little against any memory.
const SYNCED_BYTES: u64 = 64 << 20;

/// Sync what is `written`, some of it at a time, until nobody writes any more.
///
/// NOTE: `RWF_DONTCACHE` would do without a thread, but the first system that has it, Linux 6.14, can lose a page that is
/// written on again meanwhile.
///
/// # Errors
/// [`CheckpointError::Io`] naming the file: the system tells of a failed write once, be it here.
pub fn write_behind(writer: &Writer, written: Receiver<Extent>) -> Result<(), CheckpointError> {
    let mut extents: Vec<Extent> = Vec::new();
    for extent in written {
        extents.push(extent);
        if extents.iter().map(|extent| extent.bytes).sum::<u64>() < SYNCED_BYTES {
            continue;
        }
        for shard in extents.iter().map(|extent| extent.slot.shard).collect::<BTreeSet<_>>() {
            writer.sync(shard)?;
        }
        for Extent { slot, bytes } in extents.drain(..) {
            drop_pages(writer.file(slot.shard), slot.offset, NonZeroU64::new(bytes));
        }
    }
    Ok(())
}
