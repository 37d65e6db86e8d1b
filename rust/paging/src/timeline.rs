//! What happened when: spans of time on the lanes and on callers' streams, for pictures.

use crate::backend::{Backend, Lane};
use crate::buffer::BufferId;

/// Seconds that two moments on a stream are apart with nothing between them, at most: a wait that is no longer was none.
const NO_WAIT: f64 = 1e-5;

/// What a span of time went into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity<S> {
    /// The lane in fetched a buffer, or some pages of it.
    Fetch,
    /// The lane out copied pages of a buffer to the host.
    WriteBack,
    /// A stream used a buffer, from `acquire` to `release`.
    Use(S),
    /// A stream waited for a buffer that was being fetched.
    Wait(S),
}

impl<S> Activity<S> {
    fn lane(self) -> Lane<S> {
        match self {
            Self::Fetch => Lane::In,
            Self::WriteBack => Lane::Out,
            Self::Use(stream) | Self::Wait(stream) => Lane::User(stream),
        }
    }
}

/// A span of time, in seconds since the timeline was started.
#[derive(Debug, Clone, PartialEq)]
pub struct Span<S> {
    /// What it went into.
    pub activity: Activity<S>,
    /// The buffer's name.
    pub buffer: String,
    /// First moment.
    pub begin: f64,
    /// Last moment.
    pub end: f64,
}

/// A span before its moments are times.
#[derive(Debug)]
struct Recorded<S, M> {
    activity: Activity<S>,
    buffer: String,
    begin: M,
    end: M,
}

/// Spans as they are recorded.
#[derive(Debug)]
pub(crate) struct Timeline<B: Backend> {
    start: B::Moment,
    spans: Vec<Recorded<B::Stream, B::Moment>>,
    /// Uses that have begun.
    open: Vec<(BufferId, B::Stream, B::Moment)>,
}

impl<B: Backend> Timeline<B> {
    /// The host waits for the lane in, so that nothing on the timeline is before its start.
    pub(crate) fn new(backend: &mut B) -> Result<Self, B::Error> {
        let start = backend.moment(Lane::In)?;
        B::seconds(&start, &start)?;
        Ok(Self { start, spans: Vec::new(), open: Vec::new() })
    }

    /// Now, where there is a timeline.
    pub(crate) fn begin(
        timeline: Option<&Self>,
        backend: &mut B,
        lane: Lane<B::Stream>,
    ) -> Result<Option<B::Moment>, B::Error> {
        timeline.map(|_| backend.moment(lane)).transpose()
    }

    /// The span from `begin` until now, where there is one.
    pub(crate) fn end(
        timeline: Option<&mut Self>,
        backend: &mut B,
        begin: Option<B::Moment>,
        activity: Activity<B::Stream>,
        buffer: &str,
    ) -> Result<(), B::Error> {
        if let (Some(timeline), Some(begin)) = (timeline, begin) {
            let end = backend.moment(activity.lane())?;
            timeline.spans.push(Recorded { activity, buffer: buffer.to_owned(), begin, end });
        }
        Ok(())
    }

    pub(crate) fn begin_use(&mut self, backend: &mut B, id: BufferId, stream: B::Stream) -> Result<(), B::Error> {
        let begin = backend.moment(Lane::User(stream))?;
        self.open.push((id, stream, begin));
        Ok(())
    }

    /// Ends the last use of the buffer by the stream, where it began on this timeline.
    pub(crate) fn end_use(
        &mut self,
        backend: &mut B,
        id: BufferId,
        stream: B::Stream,
        buffer: &str,
    ) -> Result<(), B::Error> {
        let Some(index) = self.open.iter().rposition(|&(of, by, _)| (of, by) == (id, stream)) else { return Ok(()) };
        let (_, _, begin) = self.open.remove(index);
        Self::end(Some(self), backend, Some(begin), Activity::Use(stream), buffer)
    }

    /// All spans, by their beginning; the host waits for the last. Uses that have not ended are left out.
    pub(crate) fn finish(self) -> Result<Vec<Span<B::Stream>>, B::Error> {
        let mut spans = Vec::with_capacity(self.spans.len());
        for Recorded { activity, buffer, begin, end } in self.spans {
            let (begin, end) = (B::seconds(&self.start, &begin)?, B::seconds(&self.start, &end)?);
            if matches!(activity, Activity::Wait(_)) && end - begin < NO_WAIT {
                continue;
            }
            spans.push(Span { activity, buffer, begin, end });
        }
        spans.sort_by(|a, b| a.begin.total_cmp(&b.begin));
        Ok(spans)
    }
}
