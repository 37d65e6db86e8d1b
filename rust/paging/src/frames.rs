//! The ring of frames: who is where, and which run of them costs least to take.

use std::ops::{Add, Sub};
use std::sync::Arc;

use crate::buffer::BufferId;
use crate::pool::Until;

/// What must have passed before a vacated frame is written to; shared by the frames that were vacated together.
pub(crate) type Guard<E> = Arc<[E]>;

/// One frame of device memory.
#[derive(Debug)]
pub(crate) enum Frame<E> {
    /// Given back to the device, or refused by it: holds no memory and takes no page.
    Withheld(Until),
    /// Holds no page.
    Free(Option<Guard<E>>),
    /// Holds a page of a buffer.
    Owned(BufferId, usize),
}

/// What taking frames costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Price {
    /// The sooner a page is used again, the more: 2^32 over the number of uses until then.
    pub weight: u64,
    /// Pages that have to be written back first.
    pub dirty: u64,
    /// Pages that lose their place.
    pub evicted: u64,
}

impl Price {
    /// Of a page that is used again in so many uses.
    pub(crate) fn of_page(next_use: usize, dirty: bool) -> Self {
        let weight = (1 << 32) / next_use.max(1) as u64;
        Self { weight, dirty: u64::from(dirty), evicted: 1 }
    }

    /// Of pages that have to be fetched again at once.
    pub(crate) fn of_refetching(pages: usize) -> Self {
        Self { weight: (pages as u64) << 32, ..Self::default() }
    }
}

impl Add for Price {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weight: self.weight + other.weight,
            dirty: self.dirty + other.dirty,
            evicted: self.evicted + other.evicted,
        }
    }
}

impl Sub for Price {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            weight: self.weight - other.weight,
            dirty: self.dirty - other.dirty,
            evicted: self.evicted - other.evicted,
        }
    }
}

/// At which end of the ring equally cheap runs are taken, so that large and small buffers keep apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The first frame.
    Low,
    /// The last one.
    High,
}

/// The cheapest run of `pages` frames in a ring where each has a price (`None`: must not be taken): its first frame and
/// its price, by `key`.
pub(crate) fn cheapest<K: Ord>(
    prices: &[Option<Price>],
    pages: usize,
    end: End,
    key: impl Fn(Price) -> K,
) -> Option<(usize, Price)> {
    let frames = prices.len();
    if pages == 0 || pages > frames {
        return None;
    }
    let mut sum = Price::default();
    let mut barred = 0;
    for price in &prices[..pages] {
        match price {
            Some(price) => sum = sum + *price,
            None => barred += 1,
        }
    }
    let mut best: Option<(usize, Price)> = None;
    for start in 0..frames {
        if barred == 0 {
            let better = best.is_none_or(|(_, least)| match end {
                End::Low => key(sum) < key(least),
                End::High => key(sum) <= key(least),
            });
            // A run that passes the ring's end would stand in the way at both ends: only for a better price.
            let passes = start + pages > frames;
            if better && !(passes && best.is_some_and(|(_, least)| key(sum) == key(least))) {
                best = Some((start, sum));
            }
        }
        match prices[start] {
            Some(price) => sum = sum - price,
            None => barred -= 1,
        }
        match prices[(start + pages) % frames] {
            Some(price) => sum = sum + price,
            None => barred += 1,
        }
    }
    best
}

/// The longest run of frames that may be taken.
pub(crate) fn longest_run(prices: &[Option<Price>]) -> usize {
    let frames = prices.len();
    let mut longest = 0;
    let mut run = 0;
    for index in 0..2 * frames {
        run = if prices[index % frames].is_some() { run + 1 } else { 0 };
        longest = longest.max(run.min(frames));
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(values: &[i64]) -> Vec<Option<Price>> {
        let price = |&value: &i64| u64::try_from(value).ok().map(|weight| Price { weight, ..Price::default() });
        values.iter().map(price).collect()
    }

    fn start(values: &[i64], pages: usize, end: End) -> Option<usize> {
        cheapest(&weights(values), pages, end, |price| price.weight).map(|(start, _)| start)
    }

    #[test]
    fn cheapest_run_equals_a_plain_search_and_may_pass_the_end() {
        assert_eq!(start(&[5, 1, 1, 9, 0], 2, End::Low), Some(1));
        assert_eq!(start(&[1, 9, 9, 9, 0], 2, End::Low), Some(4));
        assert_eq!(start(&[1, -1, 9, -1, 0], 2, End::Low), Some(4));
        assert_eq!(start(&[1, -1, 9, -1, 0], 3, End::Low), None);
        assert_eq!(start(&[3, 4], 2, End::High), Some(0));
        assert_eq!(start(&[3, 4], 3, End::Low), None);
    }

    #[test]
    fn equal_prices_are_settled_at_either_end() {
        assert_eq!(start(&[0; 7], 3, End::Low), Some(0));
        assert_eq!(start(&[0; 7], 3, End::High), Some(4));
    }

    #[test]
    fn longest_run_counts_across_the_end_and_never_more_than_there_is() {
        assert_eq!(longest_run(&weights(&[0, -1, 0, 0, 0])), 4);
        assert_eq!(longest_run(&weights(&[0, 0])), 2);
        assert_eq!(longest_run(&weights(&[-1])), 0);
    }
}
