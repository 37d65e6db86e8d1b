//! How long callers' streams wait for fetches: a timed event before each wait and one after it.

use std::sync::Arc;
use std::time::Duration;

use crate::error::CudaError;
use crate::events::{Event, Stock, Stream};

/// Waits that may be under way before they are looked at.
const MANY: usize = 64;

#[derive(Debug)]
pub(super) struct Stalls {
    timers: Arc<Stock>,
    /// Before and after each wait.
    under_way: Vec<(Event, Event)>,
    /// So many are looked at next.
    many: usize,
    total: Duration,
}

impl Stalls {
    pub(super) fn new(timers: Arc<Stock>) -> Self {
        Self { timers, under_way: Vec::new(), many: MANY, total: Duration::ZERO }
    }

    /// Makes the stream wait for the event, unless it has passed. A context is current.
    pub(super) fn hold(&mut self, stream: Stream, event: &Event) -> Result<(), CudaError> {
        if event.has_passed()? {
            return Ok(());
        }
        let begin = self.timers.record(stream, false)?;
        event.hold(stream)?;
        let end = self.timers.record(stream, false)?;
        self.under_way.push((begin, end));
        if self.under_way.len() > self.many {
            self.collect();
            // A host that is far ahead of the device would look at the same ones again and again.
            self.many = MANY.max(2 * self.under_way.len());
        }
        Ok(())
    }

    /// Adds up the waits that have ended. A context is current.
    pub(super) fn collect(&mut self) {
        let total = &mut self.total;
        self.under_way.retain(|(begin, end)| match end.has_passed() {
            Ok(passed) => {
                if passed {
                    let seconds = begin.seconds_until(end).unwrap_or_default().max(0.0);
                    *total += Duration::from_secs_f64(seconds);
                }
                !passed
            }
            // A device that has failed tells no times.
            Err(_) => false,
        });
    }

    /// Of the waits that were collected.
    pub(super) fn total(&self) -> Duration {
        self.total
    }
}
