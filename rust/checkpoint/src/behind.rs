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
/// Bytes that were written since, when some are asked to leave: most are on the disk after the first, and what takes
/// longer gets a second chance.
const AGES: [u64; 2] = [64 << 20, 256 << 20];

/// Follow what is `written` until nobody writes any more, without waiting for the disk.
///
/// NOTE: the same request does both: it begins to write what is dirty, and drops what is not. `RWF_DONTCACHE` would do
/// without a thread, but the first system that has it, Linux 6.14, can lose a page that is written on again meanwhile.
pub fn write_behind(writer: &Writer, written: Receiver<Extent>, control: &Control) {
    let request = |extent: &Extent| {
        drop_pages(writer.file(extent.slot.shard), extent.slot.offset, NonZeroU64::new(extent.bytes));
    };
    let mut waiting = AGES.map(Waiting::new);
    for extent in written {
        if control.check().is_err() {
            return;
        }
        let mut due = vec![extent];
        for waiting in &mut waiting {
            due.iter().for_each(request);
            due = waiting.exchange(due);
        }
        due.iter().for_each(request);
    }
}

/// What was asked to leave, oldest first, until so many bytes came after it.
struct Waiting {
    age: u64,
    bytes: u64,
    extents: VecDeque<Extent>,
}

impl Waiting {
    fn new(age: u64) -> Self {
        Self { age, bytes: 0, extents: VecDeque::new() }
    }

    /// Take some in; returns those that have waited long enough.
    fn exchange(&mut self, extents: Vec<Extent>) -> Vec<Extent> {
        self.bytes += extents.iter().map(|extent| extent.bytes).sum::<u64>();
        self.extents.extend(extents);
        let mut old = Vec::new();
        while self.bytes > self.age
            && let Some(oldest) = self.extents.pop_front()
        {
            self.bytes -= oldest.bytes;
            old.push(oldest);
        }
        old
    }
}
