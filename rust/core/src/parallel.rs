//! Work on several threads, from a pool of this library's own that a forked child makes anew.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::control::Control;
use crate::error::CoreError;
use crate::simd;

/// A pool belongs to one process and thread count: a forked child inherits the memory but not the threads.
///
/// NOTE: a child must not wait for a lock that a thread of its parent held at the fork, such as that of a `OnceLock`
/// being filled. So a slot is first claimed by an atomic key that holds the process id, and only its claimer's process
/// looks further.
struct Slot {
    key: AtomicU64,
    pool: OnceLock<Option<ThreadPool>>,
}

/// Pools are few: one for each thread count in use and each process in a chain of forks.
static SLOTS: [Slot; 256] = [const { Slot { key: AtomicU64::new(0), pool: OnceLock::new() } }; 256];

/// This process and a number below 2^32, as a key that is never 0 and that no forked child shares.
fn key_of(number: usize) -> u64 {
    u64::from(std::process::id()) << 32 | number as u64
}

/// The pool of this process with so many threads; `None` where the system gives no threads (or no slot is left).
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    let key = key_of(threads);
    let slot = SLOTS.iter().find(|slot| {
        let claimed = slot.key.compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire);
        claimed.map_or_else(|owner| owner == key, |_| true)
    })?;
    let name = |index| format!("qlora-rs-{index}");
    slot.pool.get_or_init(|| ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()).as_ref()
}

/// CPUs that this process may run on. Asked once per process: the answer is read from files, which costs as much as a
/// small weight takes.
fn allowed_cpus() -> usize {
    static ALLOWED: AtomicU64 = AtomicU64::new(0);
    let known = ALLOWED.load(Ordering::Relaxed);
    if known >> 32 == key_of(0) >> 32 {
        return (known & 0xffff_ffff) as usize;
    }
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    ALLOWED.store(key_of(count), Ordering::Relaxed);
    count
}

/// How many threads a call may use.
#[derive(Debug, Clone)]
pub struct Parallel {
    threads: usize,
}

impl Parallel {
    /// `num_threads` threads; 0 means all that the process may run on.
    #[must_use]
    pub fn new(num_threads: usize) -> Self {
        let threads = if num_threads == 0 { allowed_cpus() } else { num_threads };
        Self { threads: threads.min(MAX_THREADS) }
    }

    /// Number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Blocks a piece of work should have: enough to be worth a hand-over, few enough to balance.
    #[must_use]
    pub fn blocks_per_piece(&self, blocks: usize, block_size: usize) -> usize {
        let least = SMALLEST_PIECE / block_size;
        if self.threads == 1 {
            // Pieces remain, so that a wish to stop is seen.
            return (LARGEST_PIECE / block_size).max(1);
        }
        blocks.div_ceil(self.threads * PIECES_PER_THREAD).clamp(least.max(1), (LARGEST_PIECE / block_size).max(1))
    }

    /// Do every piece, in any order, with the processor's float mode at IEEE defaults.
    ///
    /// # Errors
    /// [`CoreError::Interrupted`] when `control` says so; pieces not begun by then are left out.
    pub fn for_each<T: Send>(
        &self,
        pieces: Vec<T>,
        control: &Control,
        work: impl Fn(T) + Sync + Send,
    ) -> Result<(), CoreError> {
        let guarded = |piece: T| {
            if control.check().is_ok() {
                simd::with_ieee_floats(|| work(piece));
            }
        };
        let pool = if self.threads > 1 && pieces.len() > 1 { pool(self.threads) } else { None };
        match pool {
            Some(pool) => pool.install(|| pieces.into_par_iter().for_each(guarded)),
            None => pieces.into_iter().for_each(guarded),
        }
        control.check()
    }
}

/// Elements below which a piece is not worth handing to another thread.
const SMALLEST_PIECE: usize = 1 << 15;
/// Elements above which a piece would answer Ctrl-C late.
const LARGEST_PIECE: usize = 1 << 22;
/// More pieces than threads, so that a late thread is not waited for.
const PIECES_PER_THREAD: usize = 8;
/// A bound against absurd arguments.
const MAX_THREADS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of_squares(parallel: &Parallel) -> u64 {
        let total = AtomicU64::new(0);
        parallel
            .for_each((0..100u64).collect(), &Control::default(), |piece| {
                total.fetch_add(piece * piece, Ordering::Relaxed);
            })
            .expect("nobody cancels");
        total.into_inner()
    }

    #[test]
    fn every_piece_is_done_once_for_every_thread_count() {
        for threads in [0, 1, 2, 3, 7] {
            assert_eq!(sum_of_squares(&Parallel::new(threads)), 328_350);
        }
    }

    #[test]
    fn cancelled_work_says_so() {
        let control = Control::default();
        control.cancel();
        let outcome = Parallel::new(2).for_each(vec![1, 2, 3], &control, |_| unreachable!("cancelled before"));
        assert_eq!(outcome, Err(CoreError::Interrupted));
    }
}
