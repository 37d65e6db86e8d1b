//! A buffer: a run of pages with one home on the host, and what was last done with it.

use std::ops::Range;

use crate::backend::HostPlace;

/// Names a buffer of one pool; never used again after the buffer is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufferId(pub u64);

/// What an acquired buffer is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Its content is only read.
    Read,
    /// Its content may change, in any part; it is written back when it has to leave.
    Write,
    /// As [`Mode::Write`], but all of its content will be replaced: what it was is not fetched, and must not be read.
    Overwrite,
}

impl Mode {
    /// Does content change?
    pub(crate) fn writes(self) -> bool {
        self != Self::Read
    }
}

/// What a pool needs to know of one page.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Page {
    /// Is in its frame, or on the way there.
    pub resident: bool,
    /// The frame holds what the home does not.
    pub dirty: bool,
    /// The home holds (or is being given) the page; otherwise it is zeros that nobody wrote.
    pub stored: bool,
}

/// A buffer over streams `S` and events `E`.
#[derive(Debug)]
pub(crate) struct Buffer<S, E> {
    pub name: String,
    pub bytes: usize,
    pub frozen: bool,
    /// The host writes to its home.
    pub filling: bool,
    pub home: HostPlace,
    pub pages: Vec<Page>,
    /// Frame of page 0 while any page is resident: page `i` is in frame `base + i`, past the end of the ring too.
    pub base: Option<usize>,
    /// Who has acquired it, in order.
    pub holders: Vec<(S, Mode)>,
    /// The last use of each stream, since the last write.
    pub uses: Vec<(S, E)>,
    /// The last write, which is also among the uses.
    pub write: Option<(S, E)>,
    /// The last fetch, and the streams that have waited for it.
    pub fetched: Option<(E, Vec<S>)>,
    /// The last copy to the home.
    pub written_back: Option<E>,
    /// Copies of the home's former owners that may be under way.
    pub home_guard: Vec<E>,
    /// When it was last acquired or prefetched.
    pub last_use: u64,
}

impl<S: Copy + Eq, E: Clone> Buffer<S, E> {
    pub(crate) fn is_resident(&self) -> bool {
        self.pages.iter().all(|page| page.resident)
    }

    pub(crate) fn is_held(&self) -> bool {
        !self.holders.is_empty()
    }

    pub(crate) fn is_held_for_writing(&self) -> bool {
        self.holders.iter().any(|&(_, mode)| mode.writes())
    }

    /// Page numbers for which `of` holds.
    pub(crate) fn pages_where(&self, of: impl Fn(&Page) -> bool) -> Vec<usize> {
        self.pages.iter().enumerate().filter(|(_, page)| of(page)).map(|(index, _)| index).collect()
    }

    /// Place of a run of pages in the home, and its bytes: the last page may be cut.
    pub(crate) fn stretch(&self, run: &Range<usize>, page_bytes: usize) -> (HostPlace, usize) {
        let start = run.start * page_bytes;
        let place = HostPlace { piece: self.home.piece, offset: self.home.offset + start };
        (place, (run.end * page_bytes).min(self.bytes) - start)
    }

    /// Copies after which nobody but the host uses the home.
    pub(crate) fn copies(&self) -> impl Iterator<Item = &E> {
        let fetched = self.fetched.as_ref().map(|(event, _)| event);
        self.written_back.iter().chain(fetched).chain(&self.home_guard)
    }

    /// Everything that has to be over before the frames are written by others.
    pub(crate) fn frame_guard(&self) -> Vec<E> {
        self.uses.iter().map(|(_, event)| event).chain(&self.written_back).cloned().collect()
    }
}

/// Ascending numbers as runs without gaps.
pub(crate) fn runs(numbers: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_the_numbers_and_nothing_else() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), [0..3, 5..6, 7..9]);
    }
}
