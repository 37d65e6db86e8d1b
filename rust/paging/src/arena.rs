//! Host memory behind the pool: a few large pieces, handed out in runs that are contiguous.

use std::collections::BTreeMap;

use crate::backend::HostPlace;

/// Homes begin at multiples of this.
const ALIGNMENT: usize = 4096;

/// Which parts of the pieces are free. Pieces are never given back.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    /// (piece, offset) to bytes; neighbours are merged.
    free: BTreeMap<(usize, usize), usize>,
    /// Bytes of all pieces.
    total: usize,
}

impl Arena {
    /// What a home of `bytes` takes.
    pub(crate) fn rounded(bytes: usize) -> usize {
        bytes.next_multiple_of(ALIGNMENT)
    }

    /// Bytes of all pieces.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// New memory, behind what the piece has already.
    pub(crate) fn add(&mut self, place: HostPlace, bytes: usize) {
        self.total += bytes;
        self.give(place, bytes);
    }

    /// Is there a free run for `bytes`?
    pub(crate) fn holds(&self, bytes: usize) -> bool {
        self.free.values().any(|&run| run >= Self::rounded(bytes))
    }

    /// The smallest free run that holds `bytes`, and of these the first.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<HostPlace> {
        let bytes = Self::rounded(bytes);
        let fitting = self.free.iter().filter(|&(_, &run)| run >= bytes);
        let (&(piece, offset), &run) = fitting.min_by_key(|&(_, &run)| run)?;
        self.free.remove(&(piece, offset));
        if run > bytes {
            self.free.insert((piece, offset + bytes), run - bytes);
        }
        Some(HostPlace { piece, offset })
    }

    /// Free what `take` gave for `bytes`.
    pub(crate) fn give(&mut self, place: HostPlace, bytes: usize) {
        let HostPlace { piece, mut offset } = place;
        let mut bytes = Self::rounded(bytes);
        if let Some(next) = self.free.remove(&(piece, offset + bytes)) {
            bytes += next;
        }
        if let Some((&(before, start), &run)) = self.free.range(..(piece, offset)).next_back()
            && before == piece
            && start + run == offset
        {
            offset = start;
            bytes += run;
        }
        self.free.insert((piece, offset), bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_become_one_run_again() {
        let mut arena = Arena::default();
        arena.add(HostPlace { piece: 0, offset: 0 }, 5 * ALIGNMENT);
        let places: Vec<_> = (0..5).map(|_| arena.take(1).expect("there is room")).collect();
        assert_eq!(arena.take(1), None);
        for index in [3, 1, 2, 4, 0] {
            arena.give(places[index], 1);
        }
        assert_eq!(arena.free, BTreeMap::from([((0, 0), 5 * ALIGNMENT)]));
    }

    #[test]
    fn piece_that_grows_is_one_run() {
        let mut arena = Arena::default();
        arena.add(HostPlace { piece: 0, offset: 0 }, 2 * ALIGNMENT);
        assert!(!arena.holds(2 * ALIGNMENT + 1));
        arena.add(HostPlace { piece: 0, offset: 2 * ALIGNMENT }, 3 * ALIGNMENT);
        assert!(arena.holds(5 * ALIGNMENT));
        assert_eq!(arena.take(5 * ALIGNMENT), Some(HostPlace { piece: 0, offset: 0 }));
        assert_eq!(arena.total(), 5 * ALIGNMENT);
    }

    #[test]
    fn smallest_fitting_run_is_taken_and_pieces_never_merge() {
        let mut arena = Arena::default();
        arena.add(HostPlace { piece: 0, offset: 0 }, 4 * ALIGNMENT);
        arena.add(HostPlace { piece: 1, offset: 0 }, 2 * ALIGNMENT);
        assert_eq!(arena.take(2 * ALIGNMENT - 7), Some(HostPlace { piece: 1, offset: 0 }));
        assert_eq!(arena.take(5 * ALIGNMENT), None);
        assert_eq!(arena.take(4 * ALIGNMENT), Some(HostPlace { piece: 0, offset: 0 }));
        assert_eq!(arena.total(), 6 * ALIGNMENT);
    }
}
