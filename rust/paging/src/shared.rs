//! A pool for several threads: while one waits for the device or for host memory, the others go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::{Backend, HostMemory};
use crate::buffer::BufferId;
use crate::pool::{Outcome, Pool, Until};
use crate::stats::Stats;
use crate::timeline::{Span, Timeline};

/// Bytes of host memory that are prepared between two reports of progress.
const PREPARED_AT_ONCE: usize = 1 << 30;

/// A [`Pool`] behind a lock that nobody holds while waiting for long.
#[derive(Debug)]
pub struct Shared<B: Backend> {
    pool: Mutex<Pool<B>>,
    /// Memory of the device has been freed, which the pool was not told yet.
    memory_freed: AtomicBool,
}

impl<B: Backend> Shared<B> {
    /// Shares a pool.
    pub fn new(pool: Pool<B>) -> Self {
        Self { pool: Mutex::new(pool), memory_freed: AtomicBool::new(false) }
    }

    fn lock(&self) -> Outcome<MutexGuard<'_, Pool<B>>, B> {
        B::usable()?;
        // A panic in the bookkeeping cannot be mended, but it must not become a second one here.
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if self.memory_freed.swap(false, Ordering::Relaxed) {
            pool.memory_was_freed();
        }
        Ok(pool)
    }

    /// Brief work with the pool, during which other threads wait.
    ///
    /// # Errors
    /// The work's; or this process cannot use the backend.
    pub fn with<T>(&self, work: impl FnOnce(&mut Pool<B>) -> Outcome<T, B>) -> Outcome<T, B> {
        work(&mut *self.lock()?)
    }

    /// As [`Pool::create`].
    ///
    /// # Errors
    /// As there.
    pub fn create(&self, name: &str, bytes: usize) -> Outcome<BufferId, B> {
        let room = self.with(|pool| {
            pool.pages_of(name, bytes)?;
            Ok(pool.has_home_for(bytes))
        })?;
        if !room {
            let (least, wish) = Pool::<B>::piece_sizes(bytes);
            match self.grow_host(wish, |_| true) {
                Err(_) if least < wish => self.grow_host(least, |_| true)?,
                other => other?,
            };
        }
        self.with(|pool| pool.create(name, bytes))
    }

    /// Prepare host memory for buffers of so many bytes together ahead of their creation, `progress` being told how many
    /// bytes are ready and ending it by false. Whatever is ready can be used at once. Returns the bytes made ready.
    ///
    /// # Errors
    /// The host has no more; what was made ready stays.
    pub fn reserve_host(&self, bytes: usize, progress: impl FnMut(usize) -> bool) -> Outcome<usize, B> {
        self.grow_host(Pool::<B>::piece_sizes(bytes).0, progress)
    }

    fn grow_host(&self, bytes: usize, mut progress: impl FnMut(usize) -> bool) -> Outcome<usize, B> {
        let (piece, memory) = self.with(|pool| pool.reserve_host(bytes))?;
        let mut ready = 0;
        while ready < bytes && progress(ready) {
            let next = bytes.min(ready + PREPARED_AT_ONCE);
            memory.prepare(ready..next)?;
            self.with(|pool| {
                pool.add_host(piece, ready..next);
                Ok(())
            })?;
            ready = next;
        }
        Ok(ready)
    }

    /// As [`Pool::host`].
    ///
    /// # Errors
    /// As there.
    pub fn host(&self, id: BufferId) -> Outcome<u64, B> {
        let copies = self.with(|pool| pool.copies_to_home(id))?;
        Self::wait_for(&copies)?;
        self.with(|pool| pool.host(id))
    }

    /// As [`Pool::begin_fill`].
    ///
    /// # Errors
    /// As there.
    pub fn begin_fill(&self, id: BufferId) -> Outcome<u64, B> {
        let copies = self.with(|pool| pool.copies_of(id))?;
        Self::wait_for(&copies)?;
        self.with(|pool| pool.begin_fill(id))
    }

    /// As [`Pool::spare_bytes`].
    ///
    /// # Errors
    /// This process cannot use the backend.
    pub fn spare_bytes(&self) -> Outcome<usize, B> {
        self.with(|pool| Ok(pool.spare_bytes()))
    }

    /// As [`Pool::give_back`].
    ///
    /// # Errors
    /// As there.
    pub fn give_back(&self, bytes: usize, until: Until) -> Outcome<usize, B> {
        let uses = self.with(|pool| pool.prepare_to_give_back(bytes))?;
        Self::wait_for(&uses)?;
        self.with(|pool| pool.give_back(bytes, until))
    }

    /// As [`Pool::stop_timeline`].
    ///
    /// # Errors
    /// As there.
    pub fn stop_timeline(&self) -> Outcome<Vec<Span<B::Stream>>, B> {
        let timeline = self.with(|pool| Ok(pool.take_timeline()))?;
        Ok(timeline.map(Timeline::finish).transpose()?.unwrap_or_default())
    }

    /// Counts so far, and how the pool stands.
    ///
    /// # Errors
    /// This process cannot use the backend.
    pub fn stats(&self) -> Outcome<Stats, B> {
        self.with(|pool| Ok(pool.stats()))
    }

    /// As [`Pool::memory_was_freed`], from the next call on; locks nothing.
    pub fn memory_was_freed(&self) {
        self.memory_freed.store(true, Ordering::Relaxed);
    }

    fn wait_for(events: &[B::Event]) -> Outcome<(), B> {
        events.iter().try_for_each(|event| B::synchronize(event).map_err(Into::into))
    }
}
