//! How long callers' streams wait for fetches: a timed event before each wait and one after it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::error::CudaError;
use crate::events::{Event, Stock, Stream};

/// Waits that may be under way before some are looked at again.
const MANY: usize = 64;

#[derive(Debug)]
pub(super) struct Stalls {
    timers: Arc<Stock>,
    under_way: VecDeque<(Event, Event)>,
    total: Duration,
}

impl Stalls {
    pub(super) fn new(timers: Arc<Stock>) -> Self {
        Self { timers, under_way: VecDeque::new(), total: Duration::ZERO }
    }

    /// Makes the stream wait for the event, unless it has passed. A context is current.
    pub(super) fn hold(&mut self, stream: Stream, event: &Event) -> Result<(), CudaError> {
        if event.has_passed()? {
            return Ok(());
        }
        let begin = self.timers.record(stream, false)?;
        event.hold(stream)?;
        let end = self.timers.record(stream, false)?;
        self.under_way.push_back((begin, end));
        if self.under_way.len() > MANY {
            self.collect();
        }
        Ok(())
    }

    /// Adds up the waits that have ended. A context is current.
    pub(super) fn collect(&mut self) {
        // Streams end theirs in any order.
        let mut rest = VecDeque::with_capacity(self.under_way.len());
        for (begin, end) in self.under_way.drain(..) {
            match end.has_passed() {
                Ok(false) => rest.push_back((begin, end)),
                Ok(true) => {
                    let seconds = begin.seconds_until(&end).unwrap_or_default().max(0.0);
                    self.total += Duration::from_secs_f64(seconds);
                }
                // A device that has failed tells no times.
                Err(_) => {}
            }
        }
        self.under_way = rest;
    }

    /// Of the waits that were collected.
    pub(super) fn total(&self) -> Duration {
        self.total
    }
}
