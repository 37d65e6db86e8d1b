//! How a buffer gets into frames: which run of them it takes, who has to leave for it, and what waits for what.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::backend::{Backend, Lane};
use crate::buffer::{Buffer, BufferId, runs};
use crate::error::PagingError;
use crate::frames::{End, Frame, Guard, Price, cheapest};
use crate::pool::{Pool, Until};
use crate::timeline::{Activity, Timeline};

/// Whom a buffer that is fetched may push out. Acquired buffers stay in any case.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rule<'a> {
    /// It is needed now: anybody.
    Demand,
    /// As `Demand`, but its content is not.
    Room,
    /// It is used in so many uses from now: only who is used later than that.
    Ahead(usize),
    /// The caller asked for it: not those that were asked for before it, nor, where the order is known, who is used
    /// before it.
    Wish(&'a [BufferId]),
}

/// A buffer in frames, and in how many uses it is used next where it may be pushed out.
type Seen<'a, B> = (BufferId, &'a Buffer<<B as Backend>::Stream, <B as Backend>::Event>, Option<usize>);

impl Rule<'_> {
    fn is_urgent(self) -> bool {
        matches!(self, Self::Demand | Self::Room)
    }
}

impl<B: Backend> Pool<B> {
    /// Bring all pages of a buffer into frames in a row; false where the rule leaves no room.
    pub(crate) fn fetch(&mut self, id: BufferId, rule: Rule<'_>) -> Result<bool, PagingError<B::Error>> {
        let mut refused = None;
        let start = loop {
            match (self.choose(id, rule), refused) {
                (Some(start), _) => match self.commit_run(start, self.buffer(id)?.pages.len()) {
                    Ok(()) => break start,
                    // Those frames are now withheld: others, which hold memory already, may serve.
                    Err(error) => refused = Some(error),
                },
                (None, Some(error)) if rule.is_urgent() => return Err(error.into()),
                (None, _) => return Ok(false),
            }
        };
        let base = self.buffer(id)?.base;
        let count = self.buffer(id)?.pages.len();
        let mut leaving: BTreeMap<BufferId, Vec<usize>> = BTreeMap::new();
        for offset in 0..count {
            if let Frame::Owned(owner, page) = self.frames[(start + offset) % self.frames.len()]
                && owner != id
            {
                leaving.entry(owner).or_default().push(page);
            }
        }
        if base.is_some_and(|base| base != start) {
            leaving.insert(id, self.buffer(id)?.pages_where(|page| page.resident));
        }
        for (owner, mut pages) in leaving {
            // A run that passes the end of the ring may meet a buffer's last pages before its first ones.
            pages.sort_unstable();
            self.counts.evicted_pages += pages.len() as u64;
            self.vacate(owner, &pages)?;
        }
        self.fill(id, start, !matches!(rule, Rule::Room))?;
        Ok(true)
    }

    /// The frame from which on taking frames for this buffer costs least.
    fn choose(&self, id: BufferId, rule: Rule<'_>) -> Option<usize> {
        let buffer = self.buffers.get(&id)?;
        let pages = buffer.pages.len();
        let end = if 2 * pages > self.largest() { End::Low } else { End::High };
        let prices = self.prices(id, rule);
        let key = |price: Price| (price.weight, price.dirty, price.evicted);
        let anywhere = cheapest(&prices, pages, end, key);
        let Some(base) = buffer.base else { return anywhere.map(|(start, _)| start) };
        // Where some of its pages are still in place, only the others have to be fetched.
        let refetched = Price::of_refetching(buffer.pages_where(|page| page.resident).len());
        let in_place = (0..pages)
            .map(|offset| prices[(base + offset) % prices.len()])
            .try_fold(Price::default(), |sum, price| Some(sum + price?));
        match (in_place, anywhere) {
            (Some(stay), Some((start, price))) => Some(if key(stay) <= key(price + refetched) { base } else { start }),
            (Some(_), None) => Some(base),
            (None, anywhere) => anywhere.map(|(start, _)| start),
        }
    }

    /// Of each frame, for a buffer that is to be placed.
    pub(crate) fn prices(&self, id: BufferId, rule: Rule<'_>) -> Vec<Option<Price>> {
        let own_use = self.trace.next_use(id);
        // The frames of one buffer mostly lie in a row.
        let mut last: Option<Seen<'_, B>> = None;
        let mut price = |frame: &Frame<B::Event>| match *frame {
            Frame::Withheld(_) => None,
            Frame::Free(_) => Some(Price::default()),
            Frame::Owned(owner, _) if owner == id => Some(Price::default()),
            Frame::Owned(owner, page) => {
                let (_, buffer, next_use) = match last {
                    Some(known) if known.0 == owner => known,
                    _ => {
                        let buffer = self.buffers.get(&owner)?;
                        (owner, buffer, self.movable(owner, buffer, rule, own_use))
                    }
                };
                last = Some((owner, buffer, next_use));
                next_use.map(|next_use| Price::of_page(next_use, buffer.pages[page].dirty))
            }
        };
        self.frames.iter().map(&mut price).collect()
    }

    /// In how many uses a buffer that may be pushed out is used next; `None` where it may not.
    fn movable(
        &self,
        id: BufferId,
        buffer: &Buffer<B::Stream, B::Event>,
        rule: Rule<'_>,
        own_use: Option<usize>,
    ) -> Option<usize> {
        if buffer.is_held() {
            return None;
        }
        let next_use = self.next_use(id, buffer.last_use);
        // What was used last may be used on: the order does not tell how often in a row.
        let current = self.trace.last() == Some(id);
        let stays = match rule {
            Rule::Demand | Rule::Room => false,
            Rule::Ahead(ahead) => current || next_use <= ahead,
            Rule::Wish(before) => before.contains(&id) || own_use.is_some_and(|own| next_use <= own),
        };
        (!stays).then_some(next_use)
    }

    /// In how many uses a buffer is used next, `usize::MAX` being never as far as is known. While the order is unknown,
    /// how long ago it was used stands for that.
    fn next_use(&self, id: BufferId, last_use: u64) -> usize {
        match self.trace.period() {
            Some(_) => self.trace.next_use(id).unwrap_or(usize::MAX),
            None => (self.clock - last_use) as usize + 1,
        }
    }

    /// Memory for a run of frames; where there is none, the frames that lack it are withheld.
    fn commit_run(&mut self, start: usize, count: usize) -> Result<(), B::Error> {
        let frames = self.frames.len();
        let mut missing: Vec<usize> =
            (start..start + count).map(|frame| frame % frames).filter(|&frame| !self.committed[frame]).collect();
        missing.sort_unstable();
        for run in runs(&missing) {
            if self.backend.commit(run.start, run.len()).is_ok() {
                self.committed[run].fill(true);
                continue;
            }
            // There may be memory for some of them.
            for frame in run.clone() {
                if let Err(error) = self.backend.commit(frame, 1) {
                    self.frames[frame..run.end].fill_with(|| Frame::Withheld(Until::Freed));
                    return Err(error);
                }
                self.committed[frame] = true;
            }
        }
        Ok(())
    }

    /// Queue copies of pages, ascending, to the buffer's home.
    pub(crate) fn write_back(&mut self, id: BufferId, pages: &[usize]) -> Result<(), PagingError<B::Error>> {
        let (frames, page_bytes) = (self.frames.len(), self.backend.page_bytes());
        let Self { backend, buffers, counts, last_out, timeline, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        let Some(base) = buffer.base.filter(|_| !pages.is_empty()) else { return Ok(()) };
        // Whoever wrote a dirty page had waited for its fetch, and so for all that was on the way in before.
        for (_, event) in &buffer.uses {
            backend.wait(Lane::Out, event)?;
        }
        let begin = Timeline::begin(timeline.as_ref(), backend, Lane::Out)?;
        for run in runs(pages) {
            let (place, bytes) = buffer.stretch(&run, page_bytes);
            backend.copy_out((base + run.start) % frames, place, bytes)?;
            counts.bytes_out += bytes as u64;
        }
        Timeline::end(timeline.as_mut(), backend, begin, Activity::WriteBack, &buffer.name)?;
        let event = backend.record(Lane::Out)?;
        for &page in pages {
            buffer.pages[page].dirty = false;
            buffer.pages[page].stored = true;
        }
        buffer.written_back = Some(event.clone());
        *last_out = Some(event);
        Ok(())
    }

    /// Take resident pages, ascending, of a buffer that nobody holds out of their frames; dirty ones are written back.
    pub(crate) fn vacate(&mut self, id: BufferId, pages: &[usize]) -> Result<(), PagingError<B::Error>> {
        let dirty: Vec<usize> = {
            let buffer = self.buffer(id)?;
            pages.iter().copied().filter(|&page| buffer.pages[page].dirty).collect()
        };
        self.write_back(id, &dirty)?;
        let frames = self.frames.len();
        let Self { buffers, frames: ring, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        let Some(base) = buffer.base else { return Ok(()) };
        let guard: Guard<B::Event> = buffer.frame_guard().into();
        for &page in pages {
            ring[(base + page) % frames] = Frame::Free(Some(Arc::clone(&guard)));
            buffer.pages[page].resident = false;
        }
        if !buffer.pages.iter().any(|page| page.resident) {
            // What was done in those frames is in their guard, and in the home if it was written. (The last fetch may
            // still be reading the home.)
            buffer.base = None;
            buffer.uses.clear();
            buffer.write = None;
        }
        Ok(())
    }

    /// Give the missing pages of a buffer their frames, which are free and have memory, and their content if asked to.
    fn fill(&mut self, id: BufferId, start: usize, content: bool) -> Result<(), PagingError<B::Error>> {
        let (count, page_bytes) = (self.frames.len(), self.backend.page_bytes());
        let Self { backend, buffers, frames, counts, last_in, clock, timeline, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        let missing = buffer.pages_where(|page| !page.resident);
        let mut guards: Vec<Guard<B::Event>> = Vec::new();
        for page in &missing {
            let frame = &mut frames[(start + page) % count];
            if let Frame::Free(Some(guard)) = std::mem::replace(frame, Frame::Owned(id, *page))
                && !guards.iter().any(|known| Arc::ptr_eq(known, &guard))
            {
                guards.push(guard);
            }
        }
        for event in guards.iter().flat_map(|guard| guard.iter()).chain(&buffer.written_back) {
            backend.wait(Lane::In, event)?;
        }
        let begin = Timeline::begin(timeline.as_ref(), backend, Lane::In)?;
        let wanted: &[usize] = if content { &missing } else { &[] };
        let (stored, blank): (Vec<_>, Vec<_>) = wanted.iter().partition(|&&page| buffer.pages[page].stored);
        for run in runs(&stored) {
            let (place, bytes) = buffer.stretch(&run, page_bytes);
            backend.copy_in(place, (start + run.start) % count, bytes)?;
            counts.bytes_in += bytes as u64;
        }
        for run in runs(&blank) {
            let (_, bytes) = buffer.stretch(&run, page_bytes);
            backend.zero((start + run.start) % count, bytes)?;
        }
        Timeline::end(timeline.as_mut(), backend, begin, Activity::Fetch, &buffer.name)?;
        let event = backend.record(Lane::In)?;
        for &page in &missing {
            buffer.pages[page].resident = true;
        }
        buffer.base = Some(start);
        buffer.last_use = *clock;
        buffer.fetched = Some((event.clone(), Vec::new()));
        *last_in = Some(event);
        Ok(())
    }

    /// What each frame costs to take from whoever has it; `None` where it has no memory or must stay.
    fn spare_frames(&self) -> Vec<Option<Price>> {
        let mut prices = self.prices(BufferId(u64::MAX), Rule::Demand);
        for (price, &committed) in prices.iter_mut().zip(&self.committed) {
            *price = price.filter(|_| committed);
        }
        prices
    }

    /// Bytes that `give_back` could give.
    #[must_use]
    pub fn spare_bytes(&self) -> usize {
        self.spare_frames().iter().flatten().count() * self.backend.page_bytes()
    }

    /// So many frames with memory that are missed least, in a row if possible: what stays should not be cut up.
    pub(crate) fn least_needed(&self, wish: usize) -> Vec<usize> {
        let prices = self.spare_frames();
        let key = |price: Price| (price.dirty, price.weight, price.evicted);
        if let Some((start, _)) = cheapest(&prices, wish, End::High, key) {
            return (start..start + wish).map(|frame| frame % prices.len()).collect();
        }
        let mut possible: Vec<_> =
            prices.iter().enumerate().filter_map(|(frame, price)| price.map(|price| (key(price), frame))).collect();
        possible.sort_unstable();
        possible.into_iter().take(wish).map(|(_, frame)| frame).collect()
    }

    /// Take the pages in these frames out of them.
    pub(crate) fn clear_frames(&mut self, chosen: &[usize]) -> Result<(), PagingError<B::Error>> {
        let mut leaving: BTreeMap<BufferId, Vec<usize>> = BTreeMap::new();
        for &frame in chosen {
            if let Frame::Owned(owner, page) = self.frames[frame] {
                leaving.entry(owner).or_default().push(page);
            }
        }
        for (owner, mut pages) in leaving {
            pages.sort_unstable();
            self.counts.evicted_pages += pages.len() as u64;
            self.vacate(owner, &pages)?;
        }
        Ok(())
    }

    /// Give the memory of these frames back to the device, once their last uses have passed.
    pub(crate) fn withhold(&mut self, chosen: &[usize], until: Until) -> Result<(), PagingError<B::Error>> {
        self.clear_frames(chosen)?;
        if let Some(event) = &self.last_in {
            B::synchronize(event)?;
        }
        let mut chosen = chosen.to_vec();
        chosen.sort_unstable();
        for run in runs(&chosen) {
            for frame in run.clone() {
                if let Frame::Free(Some(guard)) = std::mem::replace(&mut self.frames[frame], Frame::Withheld(until)) {
                    for event in guard.iter() {
                        B::synchronize(event)?;
                    }
                }
            }
            self.backend.decommit(run.start, run.len())?;
            self.committed[run].fill(false);
        }
        Ok(())
    }
}
