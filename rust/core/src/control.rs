//! What a long call shares with whoever waits for it: a wish to stop, and how far it is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::CoreError;

/// Cancellation flag and progress counters of one long call.
///
/// The worker polls [`Control::check`] between pieces of work and reports with [`Control::advance`];
/// the waiting thread calls [`Control::cancel`] and reads [`Control::progress`].
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Control {
    /// Ask the worker to stop at its next check.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// [`CoreError::Interrupted`] once [`Control::cancel`] was called.
    pub fn check(&self) -> Result<(), CoreError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(CoreError::Interrupted);
        }
        Ok(())
    }

    /// Say how much work there is in all, in bytes.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Say that `bytes` more are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// (done, total) in bytes.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}
