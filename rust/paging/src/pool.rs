//! The pool: buffers are created, acquired, released and freed; everything else follows from it.

use std::collections::BTreeMap;

use crate::arena::Arena;
use crate::backend::{Backend, Lane};
use crate::buffer::{Buffer, BufferId, Mode, Page};
use crate::error::PagingError;
use crate::frames::{Frame, longest_run};
use crate::placing::Rule;
use crate::stats::{Counts, Stats};
use crate::timeline::{Activity, Span, Timeline};
use crate::trace::Trace;

/// Which page leaves, and whether any comes ahead of its use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// The order of uses is learned: fetch along it, and let the page leave whose next use is farthest. Until the order
    /// is known, and where it breaks, as [`Policy::Lru`].
    #[default]
    Trace,
    /// The page leaves that was used longest ago; nothing is fetched before it is asked for.
    Lru,
}

/// For how long a pool does without frames that it gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// [`Pool::reclaim`].
    Reclaimed,
    /// [`Pool::memory_was_freed`].
    Freed,
}

/// Buffers of one device that share a budget.
///
/// A buffer is in order for whoever acquires it, on any stream: the pool makes the stream wait for the copies and for the
/// other streams' uses that have to come first. The host waits in [`Pool::host`], [`Pool::begin_fill`],
/// [`Pool::give_back`], where timelines start and stop, and when the pool is dropped, nowhere else; [`crate::Shared`] waits
/// where nobody else has to. A buffer that was never written, or was discarded, reads as zeros.
#[derive(Debug)]
pub struct Pool<B: Backend> {
    pub(crate) backend: B,
    policy: Policy,
    pub(crate) buffers: BTreeMap<BufferId, Buffer<B::Stream, B::Event>>,
    next_id: u64,
    /// How many buffers there are of each number of pages.
    sizes: BTreeMap<usize, usize>,
    pub(crate) frames: Vec<Frame<B::Event>>,
    /// Which frames hold memory.
    pub(crate) committed: Vec<bool>,
    pub(crate) arena: Arena,
    pub(crate) trace: Trace,
    /// Counts uses.
    pub(crate) clock: u64,
    pub(crate) counts: Counts,
    /// The last fetch and the last write-back of all: they cover those before.
    pub(crate) last_in: Option<B::Event>,
    pub(crate) last_out: Option<B::Event>,
    /// Has a home been freed, so that the next owner may meet copies of the former one?
    pub(crate) homes_freed: bool,
    pub(crate) timeline: Option<Timeline<B>>,
}

pub(crate) type Outcome<T, B> = Result<T, PagingError<<B as Backend>::Error>>;

impl<B: Backend> Pool<B> {
    /// A pool over all frames of the backend.
    ///
    /// # Errors
    /// [`PagingError::Size`]: no frame at all.
    pub fn new(backend: B, policy: Policy) -> Outcome<Self, B> {
        let (frames, page) = (backend.frames(), backend.page_bytes());
        if frames == 0 || page == 0 {
            return Err(PagingError::Size(format!(
                "a budget of {frames} pages of {page} bytes holds nothing: raise the budget, or take smaller pages"
            )));
        }
        Ok(Self {
            frames: (0..frames).map(|_| Frame::Free(None)).collect(),
            committed: vec![false; frames],
            backend,
            policy,
            buffers: BTreeMap::new(),
            next_id: 0,
            sizes: BTreeMap::new(),
            arena: Arena::default(),
            trace: Trace::default(),
            clock: 0,
            counts: Counts::default(),
            last_in: None,
            last_out: None,
            homes_freed: false,
            timeline: None,
        })
    }

    /// A new buffer of zeros. `name` appears in messages.
    ///
    /// # Errors
    /// [`PagingError::Size`], [`PagingError::TooLarge`], or the backend has no host memory for it.
    pub fn create(&mut self, name: &str, bytes: usize) -> Outcome<BufferId, B> {
        let pages = self.pages_of(name, bytes)?;
        let home = self.home(bytes)?;
        let copies = self.last_in.iter().chain(&self.last_out);
        let home_guard = if self.homes_freed { copies.cloned().collect() } else { Vec::new() };
        let id = BufferId(self.next_id);
        self.next_id += 1;
        let buffer = Buffer {
            name: name.to_owned(),
            bytes,
            frozen: false,
            filling: false,
            home,
            pages: vec![Page::default(); pages],
            base: None,
            holders: Vec::new(),
            uses: Vec::new(),
            write: None,
            fetched: None,
            written_back: None,
            home_guard,
            last_use: 0,
        };
        self.buffers.insert(id, buffer);
        *self.sizes.entry(pages).or_default() += 1;
        Ok(id)
    }

    /// Pages of the largest buffer.
    pub(crate) fn largest(&self) -> usize {
        self.sizes.last_key_value().map_or(0, |(&pages, _)| pages)
    }

    /// How many pages a buffer of so many bytes takes; an error where it cannot be.
    pub(crate) fn pages_of(&self, name: &str, bytes: usize) -> Outcome<usize, B> {
        let page_bytes = self.backend.page_bytes();
        let (pages, frames) = (bytes.div_ceil(page_bytes), self.frames.len());
        if bytes == 0 {
            return Err(PagingError::Size(format!("buffer {name:?} has no bytes")));
        }
        if pages > frames {
            let (name, budget) = (name.to_owned(), frames * page_bytes);
            return Err(PagingError::TooLarge { name, pages, bytes, frames, budget });
        }
        Ok(pages)
    }

    /// From now on the buffer is only read, and never written back (but once, where it was written on the device).
    ///
    /// # Errors
    /// [`PagingError::Freed`]; [`PagingError::InUse`] while it is acquired for writing.
    pub fn freeze(&mut self, id: BufferId) -> Outcome<(), B> {
        let buffer = self.buffer(id)?;
        if buffer.is_held_for_writing() {
            return Err(in_use("freeze", buffer));
        }
        self.buffer_mut(id)?.frozen = true;
        Ok(())
    }

    /// Address in device memory, good for work that is queued on `stream` from now on until `release`. The buffer is
    /// contiguous there; the next time it may be elsewhere. A missing buffer is fetched, and the stream waits for it.
    ///
    /// May be called again while acquired, by the same stream in any mode, by others for reading. On a stream that is
    /// captured only what is acquired already can be, for reading or as it is: its address has to hold for every replay.
    ///
    /// # Errors
    /// [`PagingError::Freed`], [`PagingError::Frozen`], [`PagingError::InUse`], [`PagingError::Held`],
    /// [`PagingError::Capturing`], the backend's.
    pub fn acquire(&mut self, id: BufferId, stream: B::Stream, mode: Mode) -> Outcome<u64, B> {
        let buffer = self.buffer(id)?;
        if mode.writes() && buffer.frozen {
            return Err(PagingError::Frozen { name: buffer.name.clone() });
        }
        if self.backend.capturing(stream)? {
            return self.acquire_captured(id, stream, mode);
        }
        let buffer = self.buffer(id)?;
        let others = buffer.holders.iter().filter(|&&(holder, _)| holder != stream);
        if buffer.filling || others.clone().any(|&(_, theirs)| mode.writes() || theirs.writes()) {
            return Err(in_use("acquire", buffer));
        }
        let resident = buffer.is_resident();
        self.clock += 1;
        // Uses in a row are one: a layer's products, each of which acquires its weights, must not fill the view ahead.
        if self.policy == Policy::Trace && self.trace.last() != Some(id) {
            self.trace.record(id);
        }
        if resident {
            self.counts.hits += 1;
        } else {
            let rule = if mode == Mode::Overwrite { Rule::Room } else { Rule::Demand };
            if !self.fetch(id, rule)? {
                return Err(self.no_room(id));
            }
            self.counts.misses += 1;
        }
        let now = self.clock;
        let Self { backend, buffers, timeline, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        if let Some((event, waited)) = &mut buffer.fetched
            && !waited.contains(&stream)
        {
            let begin = Timeline::begin(timeline.as_ref(), backend, Lane::User(stream))?;
            backend.wait(Lane::User(stream), event)?;
            Timeline::end(timeline.as_mut(), backend, begin, Activity::Wait(stream), &buffer.name)?;
            waited.push(stream);
        }
        if mode.writes() {
            for (_, event) in buffer.uses.iter().filter(|(user, _)| *user != stream) {
                backend.wait(Lane::User(stream), event)?;
            }
            // A copy to the home may be under way and meet some of what is written now: the page will be copied again.
            buffer.pages.iter_mut().for_each(|page| page.dirty = true);
        } else if let Some((_, event)) = buffer.write.as_ref().filter(|(writer, _)| *writer != stream) {
            backend.wait(Lane::User(stream), event)?;
        }
        buffer.last_use = now;
        buffer.holders.push((stream, mode));
        let base = buffer.base.unwrap_or_default();
        if let Some(timeline) = timeline {
            timeline.begin_use(backend, id, stream)?;
        }
        self.look_ahead()?;
        Ok(self.backend.address(base))
    }

    /// What is captured runs at every replay, which the pool does not see: whoever holds the buffer keeps it in place.
    fn acquire_captured(&mut self, id: BufferId, stream: B::Stream, mode: Mode) -> Outcome<u64, B> {
        let buffer = self.buffer_mut(id)?;
        match buffer.base {
            Some(base) if buffer.is_held_for_writing() || (!mode.writes() && buffer.is_held()) => {
                buffer.holders.push((stream, mode));
                Ok(self.backend.address(base))
            }
            _ => Err(PagingError::Capturing { name: buffer.name.clone() }),
        }
    }

    /// The stream's last `acquire` of this buffer ends with what is queued on it so far.
    ///
    /// # Errors
    /// [`PagingError::Freed`], [`PagingError::NotAcquired`]; [`PagingError::Capturing`] where nobody else holds what a graph
    /// that is being captured uses; the backend's.
    pub fn release(&mut self, id: BufferId, stream: B::Stream) -> Outcome<(), B> {
        let capturing = self.backend.capturing(stream)?;
        let Self { backend, buffers, timeline, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        let Some(index) = buffer.holders.iter().rposition(|&(holder, _)| holder == stream) else {
            return Err(PagingError::NotAcquired { name: buffer.name.clone() });
        };
        if capturing {
            if buffer.holders.len() == 1 {
                return Err(PagingError::Capturing { name: buffer.name.clone() });
            }
            buffer.holders.remove(index);
            return Ok(());
        }
        if let Some(timeline) = timeline {
            timeline.end_use(backend, id, stream, &buffer.name)?;
        }
        let event = backend.record(Lane::User(stream))?;
        let (_, mode) = buffer.holders.remove(index);
        if mode.writes() {
            // It has waited for all uses before.
            buffer.uses.clear();
            buffer.write = Some((stream, event.clone()));
        } else {
            buffer.uses.retain(|(user, _)| *user != stream);
        }
        buffer.uses.push((stream, event));
        self.look_ahead()
    }

    /// Fetch buffers that will be used soon, in this order, as far as there is room beside acquired buffers and, where
    /// the order of uses is known, beside those that are used before. Those that exist no more are passed over.
    ///
    /// # Errors
    /// The backend's.
    pub fn prefetch(&mut self, ids: &[BufferId]) -> Outcome<(), B> {
        for (index, &id) in ids.iter().enumerate() {
            let Some(buffer) = self.buffers.get_mut(&id) else { continue };
            buffer.last_use = self.clock;
            if buffer.filling || buffer.is_resident() {
                continue;
            }
            if !self.fetch(id, Rule::Wish(&ids[..index]))? {
                break;
            }
            self.counts.prefetches += 1;
        }
        Ok(())
    }

    /// Fetch along the learned order.
    fn look_ahead(&mut self) -> Outcome<(), B> {
        let Some(period) = self.trace.period() else { return Ok(()) };
        // One buffer comes while the other is used, or small ones of the same size together. More would only take room
        // from those that could stay.
        let most = (2 * self.largest()).min(self.frames.len() / 2);
        let mut pages = 0;
        for ahead in 1..=period {
            let Some(id) = self.trace.predicted(ahead) else { break };
            let Some(buffer) = self.buffers.get(&id) else { continue };
            if pages > 0 && pages + buffer.pages.len() > most {
                break;
            }
            pages += buffer.pages.len();
            if buffer.filling || buffer.is_resident() {
                continue;
            }
            if !self.fetch(id, Rule::Ahead(ahead))? {
                break;
            }
            self.counts.prefetches += 1;
        }
        Ok(())
    }

    /// The content is not needed any more: nothing is written back, and the buffer is zeros again.
    ///
    /// # Errors
    /// [`PagingError::Freed`], [`PagingError::InUse`], [`PagingError::Frozen`], the backend's.
    pub fn discard(&mut self, id: BufferId) -> Outcome<(), B> {
        let buffer = self.buffer(id)?;
        if buffer.frozen {
            return Err(PagingError::Frozen { name: buffer.name.clone() });
        }
        self.drop_pages(id, "discard")
    }

    /// The buffer is gone; its frames and its home serve others once the last use has passed.
    ///
    /// # Errors
    /// [`PagingError::Freed`], [`PagingError::InUse`], the backend's.
    pub fn free(&mut self, id: BufferId) -> Outcome<(), B> {
        self.drop_pages(id, "free")?;
        self.trace.forget(id);
        if let Some(buffer) = self.buffers.remove(&id) {
            self.arena.give(buffer.home, buffer.bytes);
            if let Some(count) = self.sizes.get_mut(&buffer.pages.len()) {
                *count -= 1;
                if *count == 0 {
                    self.sizes.remove(&buffer.pages.len());
                }
            }
            self.homes_freed = true;
        }
        Ok(())
    }

    pub(crate) fn drop_pages(&mut self, id: BufferId, wish: &'static str) -> Outcome<(), B> {
        let buffer = self.buffer_mut(id)?;
        if buffer.filling || buffer.is_held() {
            return Err(in_use(wish, buffer));
        }
        let resident = buffer.pages_where(|page| page.resident);
        for page in &mut buffer.pages {
            page.dirty = false;
            page.stored = false;
        }
        self.vacate(id, &resident)
    }

    /// Give at least `bytes` of device memory back to the device, or as much as acquired buffers leave: frames that hold
    /// nothing first, then clean pages, then dirty ones, those with the farthest next use first. The host waits for their
    /// last uses. The pool keeps to what is left for as long as `until` says. Returns the bytes given back.
    ///
    /// # Errors
    /// The backend's.
    pub fn give_back(&mut self, bytes: usize, until: Until) -> Outcome<usize, B> {
        let chosen = self.least_needed(bytes.div_ceil(self.backend.page_bytes()));
        self.withhold(&chosen, until)?;
        Ok(chosen.len() * self.backend.page_bytes())
    }

    /// Queue what `give_back` will wait for; the moments after which it has nothing left to wait for, unless the pool is
    /// used meanwhile.
    pub(crate) fn prepare_to_give_back(&mut self, bytes: usize) -> Outcome<Vec<B::Event>, B> {
        let chosen = self.least_needed(bytes.div_ceil(self.backend.page_bytes()));
        self.clear_frames(&chosen)?;
        let guards = chosen.iter().filter_map(|&frame| match &self.frames[frame] {
            Frame::Free(guard) => guard.as_deref(),
            _ => None,
        });
        Ok(guards.flatten().chain(&self.last_in).cloned().collect())
    }

    /// Use the whole budget again.
    pub fn reclaim(&mut self) {
        self.take_back(&[Until::Reclaimed, Until::Freed]);
    }

    /// Somebody freed memory of the device: use again what was given back until then, or was missing.
    pub fn memory_was_freed(&mut self) {
        self.take_back(&[Until::Freed]);
    }

    fn take_back(&mut self, which: &[Until]) {
        for frame in &mut self.frames {
            if matches!(frame, Frame::Withheld(until) if which.contains(until)) {
                *frame = Frame::Free(None);
            }
        }
    }

    /// Record what happens when, until `stop_timeline`; a timeline that is being recorded is dropped. The host waits for
    /// the lane in.
    ///
    /// # Errors
    /// The backend's.
    pub fn start_timeline(&mut self) -> Outcome<(), B> {
        self.timeline = Some(Timeline::new(&mut self.backend)?);
        Ok(())
    }

    /// What was recorded; nothing where no timeline was started. The host waits for the last span.
    ///
    /// # Errors
    /// The backend's.
    pub fn stop_timeline(&mut self) -> Outcome<Vec<Span<B::Stream>>, B> {
        Ok(self.take_timeline().map(Timeline::finish).transpose()?.unwrap_or_default())
    }

    pub(crate) fn take_timeline(&mut self) -> Option<Timeline<B>> {
        self.timeline.take()
    }

    /// Counts so far, and how the pool stands.
    pub fn stats(&mut self) -> Stats {
        let page = self.backend.page_bytes();
        let count = |of: fn(&Frame<B::Event>) -> bool| self.frames.iter().filter(|frame| of(frame)).count();
        let pages: usize = self.buffers.values().map(|buffer| buffer.pages.len()).sum();
        let resident = count(|frame| matches!(frame, Frame::Owned(..)));
        let Counts { hits, misses, prefetches, evicted_pages, bytes_in, bytes_out } = self.counts;
        Stats {
            limit_bytes: count(|frame| !matches!(frame, Frame::Withheld(_))) * page,
            committed_bytes: self.committed.iter().filter(|&&committed| committed).count() * page,
            resident_bytes: resident * page,
            paged_bytes: (pages - resident) * page,
            host_bytes: self.arena.total(),
            buffers: self.buffers.len(),
            hits,
            misses,
            prefetches,
            evicted_pages,
            bytes_in,
            bytes_out,
            trace_breaks: self.trace.breaks(),
            trace_period: self.trace.period(),
            stall: self.backend.stall(),
        }
    }

    /// Which page of which buffer each frame holds; for tests and pictures.
    #[must_use]
    pub fn frame_map(&self) -> Vec<Option<(BufferId, usize)>> {
        let owner = |frame: &Frame<B::Event>| match frame {
            Frame::Owned(id, page) => Some((*id, *page)),
            _ => None,
        };
        self.frames.iter().map(owner).collect()
    }

    pub(crate) fn buffer(&self, id: BufferId) -> Outcome<&Buffer<B::Stream, B::Event>, B> {
        self.buffers.get(&id).ok_or(PagingError::Freed(id.0))
    }

    pub(crate) fn buffer_mut(&mut self, id: BufferId) -> Outcome<&mut Buffer<B::Stream, B::Event>, B> {
        self.buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))
    }

    fn no_room(&self, id: BufferId) -> PagingError<B::Error> {
        let Some(buffer) = self.buffers.get(&id) else { return PagingError::Freed(id.0) };
        let held = self.buffers.values().filter(|other| other.is_held()).map(|other| other.pages.len()).sum();
        let given = self.frames.iter().filter(|frame| matches!(frame, Frame::Withheld(_))).count();
        PagingError::Held {
            name: buffer.name.clone(),
            pages: buffer.pages.len(),
            held,
            frames: self.frames.len(),
            longest: longest_run(&self.prices(id, Rule::Demand)),
            given: if given == 0 { String::new() } else { format!(" ({given} were given back)") },
        }
    }
}

pub(crate) fn in_use<S: Copy + Eq, E: Clone, X: std::error::Error>(
    wish: &'static str,
    buffer: &Buffer<S, E>,
) -> PagingError<X> {
    let (by, way_out) = match buffer {
        buffer if buffer.filling => ("being filled by the host", "wait for that"),
        buffer if buffer.is_held_for_writing() => ("acquired for writing", "release it first"),
        _ => ("acquired for reading", "release it first"),
    };
    PagingError::InUse { wish, name: buffer.name.clone(), by, way_out }
}

impl<B: Backend> Drop for Pool<B> {
    fn drop(&mut self) {
        if B::usable().is_err() {
            return;
        }
        // The frames go away with the backend: nothing may use them any more, not even frames that were vacated.
        let mut events: Vec<_> = self.buffers.values().flat_map(Buffer::frame_guard).collect();
        for frame in &self.frames {
            if let Frame::Free(Some(guard)) = frame {
                events.extend(guard.iter().cloned());
            }
        }
        // Acquired and never released: what is queued on that stream now may still use it.
        for &(stream, _) in self.buffers.values().flat_map(|buffer| &buffer.holders) {
            if !self.backend.capturing(stream).unwrap_or(true) {
                events.extend(self.backend.record(Lane::User(stream)));
            }
        }
        for event in &events {
            // A device that fails here has failed before; there is nobody to tell.
            let _ = B::synchronize(event);
        }
    }
}
