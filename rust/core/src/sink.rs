//! Where a reader's bytes go: the one thing that files and devices know of each other.

/// Part of a buffer, and where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the buffer.
    pub start: usize,
    /// How many.
    pub bytes: usize,
    /// Address of the first one's place, in whatever memory the sink fills.
    pub to: u64,
}

/// Takes bytes, a buffer at a time: the reader fills memory that the sink chose, so that nothing is copied between them.
///
/// A sink belongs to one thread. What was sent but has not arrived when a sink is dropped may be lost, but leaves nothing
/// behind that still reads or writes.
pub trait ByteSink {
    /// What can go wrong.
    type Error;

    /// A buffer of exactly `bytes` that nobody else uses; waits for one. Its content is unspecified.
    ///
    /// # Errors
    /// The sink's own; among them more `bytes` than it was made for.
    fn buffer(&mut self, bytes: usize) -> Result<&mut [u8], Self::Error>;

    /// Send parts of the buffer that was handed out last; they may arrive later.
    ///
    /// # Errors
    /// The sink's own.
    fn send(&mut self, pieces: &[Piece]) -> Result<(), Self::Error>;

    /// Wait until everything that was sent has arrived.
    ///
    /// # Errors
    /// The sink's own.
    fn finish(&mut self) -> Result<(), Self::Error>;
}
