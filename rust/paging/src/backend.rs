//! What a pool asks of a device: memory in frames, copies on two lanes of their own, events between lanes.

use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

/// A queue of work that runs in order. Lanes run beside each other; only [`Backend::wait`] orders one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane<S> {
    /// The pool's own lane for what is written into frames: copies from the host, zeros.
    In,
    /// The pool's own lane for copies from frames to the host.
    Out,
    /// A stream of the caller, on which kernels use acquired buffers.
    User(S),
}

/// A place in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPlace {
    /// Index that [`Backend::add_host`] gave.
    pub piece: usize,
    /// Bytes from the piece's start on.
    pub offset: usize,
}

/// Host memory of a pool to be: its addresses are there, more and more of it becomes usable. Clones mean the same memory.
pub trait HostMemory: Clone + Send {
    /// What can go wrong.
    type Error: std::error::Error;

    /// Make this range usable for copies, its content unspecified. Slow where memory is pinned, so it needs no pool: nobody
    /// waits for it meanwhile. Each byte is prepared once.
    ///
    /// # Errors
    /// The host gives no such memory; the message says how much of it there is.
    fn prepare(&self, range: Range<usize>) -> Result<(), Self::Error>;
}

/// A device as the pool sees it. Everything but `synchronize`, `seconds`, `commit`, `decommit` and `zero_host` only queues
/// work and returns at once: the host does not wait.
///
/// # Frames
/// Device memory is `frames` frames of `page_bytes` each, in a **ring**: they lie in a row in address space, and the
/// addresses go on behind the last one as those of frame 0, 1, ... once more. So a run of frames that passes the end of
/// the ring is contiguous for a kernel, and no frame is ever too far at the edge to be of use. On a CUDA device: reserve
/// `2 * frames * page_bytes` with `cuMemAddressReserve`; `commit` makes one handle a frame (`cuMemCreate`), maps it at
/// `i` and at `i + frames`, and sets access; `decommit` unmaps both and releases it. (What is written through one mapping
/// may be read through the other once the writing kernel or copy has ended, which the pool's events see to. A kernel that
/// was started before that, as in a programmatic dependent launch, must not read the buffer before its own wait.)
///
/// A frame holds memory only between `commit` and `decommit`. Frames are addressed by index, always below
/// [`Backend::frames`]; copies begin at a frame and may pass the ring's end, `commit` and `decommit` are given ranges
/// that do not.
///
/// # Order
/// The pool keeps to these rules, so that a backend needs no checks of its own: a frame is written on [`Lane::In`] and
/// by the caller's streams only, read on [`Lane::Out`] and by the caller's streams only; each of these that has to come
/// after another has been told to by `wait`. An event covers everything that was queued on its lane before `record`.
///
/// # Errors
/// An error may come late, from work that was queued before. After one the pool must not be trusted with data any more;
/// it can only be dropped. `commit` and `reserve_host` are exceptions: where there is no memory they change nothing, and
/// the pool goes on with what it has.
///
/// # Dropping
/// The pool has synchronized all events of callers' streams before it drops its backend. The backend waits for its own
/// two lanes, then gives all memory back.
pub trait Backend {
    /// Handle of a caller's stream.
    type Stream: Copy + Eq + Debug;
    /// A moment on a lane. Clones mean the same moment; when the last is dropped its resources can be used again.
    type Event: Clone + Debug;
    /// A moment on a lane that tells when it was.
    type Moment: Clone + Debug;
    /// Memory on the host, before and after it belongs to the backend.
    type Memory: HostMemory<Error = Self::Error>;
    /// What can go wrong.
    type Error: std::error::Error;

    /// Can this process use the backend at all? Asked before anything is locked: in a forked child the threads that hold
    /// its parent's locks do not exist.
    ///
    /// # Errors
    /// Why it cannot.
    fn usable() -> Result<(), Self::Error> {
        Ok(())
    }

    /// Bytes of a frame: the size of a page.
    fn page_bytes(&self) -> usize;

    /// How many frames the budget has.
    fn frames(&self) -> usize;

    /// Address of a frame in the caller's (device's) address space.
    fn address(&self, frame: usize) -> u64;

    /// Back frames `first .. first + count` with memory; they hold none. Their content is unspecified. All or nothing.
    ///
    /// # Errors
    /// No memory on the device, or the device's own.
    fn commit(&mut self, first: usize, count: usize) -> Result<(), Self::Error>;

    /// Give the memory of frames `first .. first + count` back; they are committed, and nothing that uses them is queued
    /// any more.
    ///
    /// # Errors
    /// The device's own.
    fn decommit(&mut self, first: usize, count: usize) -> Result<(), Self::Error>;

    /// Addresses for a piece of host memory, aligned to 4096 bytes or more; quick.
    ///
    /// # Errors
    /// The system has none.
    fn reserve_host(&self, bytes: usize) -> Result<Self::Memory, Self::Error>;

    /// Take a piece over, whose prepared parts are used from now on; it lives as long as the backend. Its index: 0, 1, ...
    fn add_host(&mut self, memory: Self::Memory) -> usize;

    /// Address of a place in host memory, in the host's address space.
    fn host_address(&self, place: HostPlace) -> u64;

    /// Fill host memory with zeros, now.
    fn zero_host(&mut self, place: HostPlace, bytes: usize);

    /// Queue on [`Lane::In`]: `bytes` from host memory into frames, from the start of `frame` on.
    ///
    /// # Errors
    /// The device's own.
    fn copy_in(&mut self, from: HostPlace, frame: usize, bytes: usize) -> Result<(), Self::Error>;

    /// Queue on [`Lane::In`]: zeros into frames, from the start of `frame` on.
    ///
    /// # Errors
    /// The device's own.
    fn zero(&mut self, frame: usize, bytes: usize) -> Result<(), Self::Error>;

    /// Queue on [`Lane::Out`]: `bytes` from the start of `frame` on into host memory.
    ///
    /// # Errors
    /// The device's own.
    fn copy_out(&mut self, frame: usize, to: HostPlace, bytes: usize) -> Result<(), Self::Error>;

    /// The moment after what is queued on this lane so far.
    ///
    /// # Errors
    /// The device's own.
    fn record(&mut self, lane: Lane<Self::Stream>) -> Result<Self::Event, Self::Error>;

    /// What is queued on this lane from now on starts after the event.
    ///
    /// # Errors
    /// The device's own.
    fn wait(&mut self, lane: Lane<Self::Stream>, event: &Self::Event) -> Result<(), Self::Error>;

    /// The host waits for the event; needs no pool, so that nobody else waits.
    ///
    /// # Errors
    /// The device's own.
    fn synchronize(event: &Self::Event) -> Result<(), Self::Error>;

    /// Is work that is queued on the caller's stream recorded instead of done (a CUDA graph is captured)?
    ///
    /// # Errors
    /// The device's own.
    fn capturing(&mut self, _stream: Self::Stream) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// How long callers' streams have stood still so far, waiting for events of [`Lane::In`]; of waits that have ended.
    /// (A device brackets such waits with two timed events, and adds up those that have passed when asked.)
    fn stall(&mut self) -> Duration;

    /// As `record`, for a timeline.
    ///
    /// # Errors
    /// The device's own.
    fn moment(&mut self, lane: Lane<Self::Stream>) -> Result<Self::Moment, Self::Error>;

    /// Seconds between two moments, of any lanes; the host waits for both. Negative where `end` was earlier.
    ///
    /// # Errors
    /// The device's own.
    fn seconds(begin: &Self::Moment, end: &Self::Moment) -> Result<f64, Self::Error>;
}
