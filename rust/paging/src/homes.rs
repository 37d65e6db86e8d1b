//! The host's side of a pool: homes of buffers, and what the host sees of them.

use std::ops::Range;

use crate::arena::Arena;
use crate::backend::{Backend, HostMemory, HostPlace};
use crate::buffer::BufferId;
use crate::error::PagingError;
use crate::pool::{Outcome, Pool, in_use};

/// Host memory is allocated in pieces of at least so many bytes: pinning a piece costs more than its bytes.
const LEAST_PIECE: usize = 64 << 20;

impl<B: Backend> Pool<B> {
    pub(crate) fn home(&mut self, bytes: usize) -> Outcome<HostPlace, B> {
        if let Some(place) = self.arena.take(bytes) {
            return Ok(place);
        }
        let (least, wish) = Self::piece_sizes(bytes);
        match self.grow_host(wish) {
            Err(_) if least < wish => self.grow_host(least)?,
            other => other?,
        }
        self.arena.take(bytes).ok_or_else(|| PagingError::Size(format!("new host memory holds no {bytes} bytes")))
    }

    /// What a piece of host memory for a buffer of so many bytes takes at least, and what is worth taking.
    pub(crate) fn piece_sizes(bytes: usize) -> (usize, usize) {
        let least = Arena::rounded(bytes);
        (least, least.max(LEAST_PIECE))
    }

    fn grow_host(&mut self, bytes: usize) -> Outcome<(), B> {
        let (piece, memory) = self.reserve_host(bytes)?;
        memory.prepare(0..bytes)?;
        self.add_host(piece, 0..bytes);
        Ok(())
    }

    /// Is there room for a home of so many bytes?
    pub(crate) fn has_home_for(&self, bytes: usize) -> bool {
        self.arena.holds(bytes)
    }

    /// Addresses for host memory, to be prepared and then given to `add_host`.
    pub(crate) fn reserve_host(&mut self, bytes: usize) -> Outcome<(usize, B::Memory), B> {
        let memory = self.backend.reserve_host(bytes)?;
        Ok((self.backend.add_host(memory.clone()), memory))
    }

    /// A part of a piece has been prepared.
    pub(crate) fn add_host(&mut self, piece: usize, range: Range<usize>) {
        self.arena.add(HostPlace { piece, offset: range.start }, range.len());
    }

    /// Queue the write-back of what the buffer's home lacks; the pages stay where they are.
    ///
    /// # Errors
    /// [`PagingError::Freed`]; [`PagingError::InUse`] while it is acquired for writing; the backend's.
    pub fn flush(&mut self, id: BufferId) -> Outcome<(), B> {
        let buffer = self.buffer(id)?;
        if buffer.is_held_for_writing() {
            return Err(in_use("write back", buffer));
        }
        let dirty = buffer.pages_where(|page| page.dirty);
        self.write_back(id, &dirty)
    }

    /// The moments after which the host can look at the buffer: write-backs of what its home lacks are queued.
    ///
    /// # Errors
    /// As `host`.
    pub(crate) fn copies_to_home(&mut self, id: BufferId) -> Outcome<Vec<B::Event>, B> {
        let buffer = self.buffer(id)?;
        if buffer.filling || buffer.is_held_for_writing() {
            return Err(in_use("look from the host at", buffer));
        }
        self.flush(id)?;
        self.copies_of(id)
    }

    /// Copies that use the buffer's home.
    pub(crate) fn copies_of(&self, id: BufferId) -> Outcome<Vec<B::Event>, B> {
        Ok(self.buffer(id)?.copies().cloned().collect())
    }

    /// Address of the buffer's content in host memory, once it is there: the host waits. It holds until the buffer is next
    /// acquired for writing.
    ///
    /// # Errors
    /// [`PagingError::Freed`]; [`PagingError::InUse`] while it is acquired for writing; the backend's.
    pub fn host(&mut self, id: BufferId) -> Outcome<u64, B> {
        let copies = self.copies_to_home(id)?;
        self.wait_for_copies(id, &copies)?;
        let page_bytes = self.backend.page_bytes();
        let Self { backend, buffers, .. } = self;
        let buffer = buffers.get_mut(&id).ok_or(PagingError::Freed(id.0))?;
        for index in buffer.pages_where(|page| !page.stored) {
            let (place, bytes) = buffer.stretch(&(index..index + 1), page_bytes);
            backend.zero_host(place, bytes);
            buffer.pages[index].stored = true;
        }
        Ok(backend.host_address(buffer.home))
    }

    /// Address in host memory at which the host gives the whole buffer new content; nobody else uses it until `end_fill`.
    /// The host waits for copies of the old content.
    ///
    /// # Errors
    /// [`PagingError::Freed`], [`PagingError::Frozen`], [`PagingError::InUse`], the backend's.
    pub fn begin_fill(&mut self, id: BufferId) -> Outcome<u64, B> {
        let buffer = self.buffer(id)?;
        if buffer.frozen {
            return Err(PagingError::Frozen { name: buffer.name.clone() });
        }
        self.drop_pages(id, "fill")?;
        let copies = self.copies_of(id)?;
        self.wait_for_copies(id, &copies)?;
        let buffer = self.buffer_mut(id)?;
        buffer.filling = true;
        let home = buffer.home;
        Ok(self.backend.host_address(home))
    }

    /// The content that the host gave the buffer is whole, or, where it is not, the buffer is zeros.
    ///
    /// # Errors
    /// [`PagingError::Freed`].
    pub fn end_fill(&mut self, id: BufferId, whole: bool) -> Outcome<(), B> {
        let buffer = self.buffer_mut(id)?;
        if std::mem::take(&mut buffer.filling) {
            buffer.pages.iter_mut().for_each(|page| page.stored = whole);
        }
        Ok(())
    }

    fn wait_for_copies(&mut self, id: BufferId, copies: &[B::Event]) -> Outcome<(), B> {
        for event in copies {
            B::synchronize(event)?;
        }
        self.buffer_mut(id)?.home_guard.clear();
        Ok(())
    }
}
