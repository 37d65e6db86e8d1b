//! Output on its way to the disk while the next is made, and out of the page cache once it is there.
//!
//! Left to itself the system begins when a tenth of the memory is dirty, so that the last sync waits for gigabytes.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::mpsc::Receiver;

use qlora_core::Control;

use crate::page_cache::drop_pages;
use crate::plan::Extent;
use crate::writer::Writer;

/// Bytes of which to hear at a time.
pub const WORTH_TELLING: u64 = 4 << 20;
/// Bytes that the disk has in work before they are asked to leave: what is not written by then stays.
const IN_FLIGHT: u64 = 64 << 20;

/// Follow what is `written` until nobody writes any more, without waiting for the disk.
///
/// NOTE: the same request does both: it begins to write what is dirty, and drops what is not. `RWF_DONTCACHE` would do
/// without a thread, but the first system that has it, Linux 6.14, can lose a page that is written on again meanwhile.
pub fn write_behind(writer: &Writer, written: Receiver<Extent>, control: &Control) {
    let request = |Extent { slot, bytes }: Extent| {
        drop_pages(writer.file(slot.shard), slot.offset, NonZeroU64::new(bytes));
    };
    let mut in_flight = VecDeque::new();
    let mut bytes = 0;
    for extent in written {
        if control.check().is_err() {
            return;
        }
        request(extent);
        in_flight.push_back(extent);
        bytes += extent.bytes;
        while bytes > IN_FLIGHT
            && let Some(oldest) = in_flight.pop_front()
        {
            bytes -= oldest.bytes;
            request(oldest);
        }
    }
}
