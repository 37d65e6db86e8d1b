//! What is used next: training repeats itself, so the order of past uses tells that of the coming ones.
//!
//! There is no mark where a step begins. The trace looks for the past moment whose run-up is the longest match of the
//! present's: the distance to it is the period, and from then on the future is that part of the past once more. The match
//! is kept up use by use; the first one that differs breaks it, and another moment is looked for, which may be one of
//! another habit (an evaluation between steps, the last micro-batch before the optimizer).

use std::collections::{BTreeMap, VecDeque};

use crate::buffer::BufferId;

/// Equal uses in a row that make a period believable.
const LEAST_MATCH: usize = 3;
/// Equal uses beyond which two moments are not compared further.
const LONGEST_MATCH: usize = 4096;
/// Past moments that are compared with the present.
const CANDIDATES: usize = 64;
/// Uses remembered at most; a longer period is never learned.
const MEMORY: usize = 1 << 17;

/// The order of uses so far.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    uses: VecDeque<BufferId>,
    /// Number of the first use in `uses`; numbers count from the pool's beginning.
    first: usize,
    /// Numbers of each buffer's uses, ascending.
    of: BTreeMap<BufferId, VecDeque<usize>>,
    period: Option<usize>,
    breaks: u64,
}

impl Trace {
    /// A buffer is used now.
    pub(crate) fn record(&mut self, id: BufferId) {
        let now = self.first + self.uses.len();
        self.uses.push_back(id);
        self.of.entry(id).or_default().push_back(now);
        let expected = self.period.and_then(|period| self.at(now - period));
        if expected != Some(id) {
            self.breaks += u64::from(self.period.is_some());
            self.period = self.matching_period(id, now);
        }
        if self.uses.len() > MEMORY {
            self.forget_half();
        }
    }

    /// A buffer is gone: it will not be used again.
    pub(crate) fn forget(&mut self, id: BufferId) {
        // Its uses stay in the order, where they stand for nothing: numbers do not shift.
        self.of.remove(&id);
    }

    /// What was used last.
    pub(crate) fn last(&self) -> Option<BufferId> {
        self.uses.back().copied()
    }

    /// Uses after which the order repeats, while it is known.
    pub(crate) fn period(&self) -> Option<usize> {
        self.period
    }

    /// How often a known order turned out to be another.
    pub(crate) fn breaks(&self) -> u64 {
        self.breaks
    }

    /// What is used in `ahead` uses from now, 1 being the next.
    pub(crate) fn predicted(&self, ahead: usize) -> Option<BufferId> {
        let period = self.period?;
        self.at(self.now() - period + 1 + (ahead - 1) % period)
    }

    /// In how many uses a buffer is used next; `None` where that is not within the period.
    pub(crate) fn next_use(&self, id: BufferId) -> Option<usize> {
        let period = self.period?;
        let then = self.now() - period;
        let uses = self.of.get(&id)?;
        let next = uses.partition_point(|&number| number <= then);
        uses.get(next).map(|&number| number - then)
    }

    /// Number of the last use; there is one wherever a period is.
    fn now(&self) -> usize {
        self.first + self.uses.len() - 1
    }

    fn at(&self, number: usize) -> Option<BufferId> {
        self.uses.get(number.checked_sub(self.first)?).copied()
    }

    fn matching_period(&self, id: BufferId, now: usize) -> Option<usize> {
        let mut best = (LEAST_MATCH - 1, None);
        for &then in self.of.get(&id)?.iter().rev().skip(1).take(CANDIDATES) {
            let equal = (0..LONGEST_MATCH)
                .take_while(|back| then.checked_sub(*back).is_some_and(|past| self.at(past).is_some()))
                .take_while(|back| self.at(then - back) == self.at(now - back))
                .count();
            if equal > best.0 {
                best = (equal, Some(now - then));
            }
        }
        best.1
    }

    fn forget_half(&mut self) {
        let gone = self.uses.len() / 2;
        self.uses.drain(..gone);
        self.first += gone;
        for uses in self.of.values_mut() {
            let old = uses.partition_point(|&number| number < self.first);
            uses.drain(..old);
        }
        self.of.retain(|_, uses| !uses.is_empty());
        if self.period.is_some_and(|period| period >= self.uses.len()) {
            self.period = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(trace: &mut Trace, ids: impl IntoIterator<Item = u64>) {
        ids.into_iter().for_each(|id| trace.record(BufferId(id)));
    }

    fn future(trace: &Trace, count: usize) -> Vec<u64> {
        (1..=count).map(|ahead| trace.predicted(ahead).expect("a period is known").0).collect()
    }

    /// Forward, then backward.
    fn step(layers: u64) -> Vec<u64> {
        (0..layers).chain((0..layers).rev()).collect()
    }

    #[test]
    fn second_step_is_foreseen_from_its_third_use_on() {
        let mut trace = Trace::default();
        feed(&mut trace, step(7));
        assert_eq!(trace.period(), None);
        feed(&mut trace, [0, 1]);
        assert_eq!(trace.period(), None);
        feed(&mut trace, [2]);
        assert_eq!(trace.period(), Some(14));
        assert_eq!(future(&trace, 15), [3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0, 0, 1, 2, 3]);
    }

    #[test]
    fn next_use_is_the_first_of_the_predicted_ones() {
        let mut trace = Trace::default();
        feed(&mut trace, step(7).repeat(2));
        for id in 0..7 {
            let ahead = trace.next_use(BufferId(id)).expect("every layer is used again");
            let plain = future(&trace, 14).iter().position(|&next| next == id).expect("it is in the step");
            assert_eq!(ahead, plain + 1);
        }
        assert_eq!(trace.next_use(BufferId(99)), None);
    }

    #[test]
    fn micro_batches_before_an_optimizer_are_told_apart_after_one_step() {
        let mut whole = step(5).repeat(3);
        whole.extend(100..104);
        let mut trace = Trace::default();
        feed(&mut trace, whole.repeat(2));
        let breaks = trace.breaks();
        feed(&mut trace, whole.repeat(4));
        assert_eq!(trace.breaks(), breaks);
        assert_eq!(trace.period(), Some(whole.len()));
        assert_eq!(future(&trace, whole.len()), whole);
    }

    #[test]
    fn broken_order_is_noticed_and_learned_anew() {
        let mut trace = Trace::default();
        feed(&mut trace, step(6).repeat(3));
        assert_eq!(trace.breaks(), 0);
        feed(&mut trace, [3, 3]); // instead of 0, 1
        assert_eq!(trace.breaks(), 1);
        let other: Vec<u64> = (0..6).map(|id| id * 5 % 6 + 10).collect();
        feed(&mut trace, other.repeat(2));
        assert_eq!(future(&trace, 6), other);
    }

    #[test]
    fn return_to_an_earlier_habit_is_foreseen_without_learning_it_again() {
        let mut trace = Trace::default();
        feed(&mut trace, step(8).repeat(2));
        feed(&mut trace, (0..8).collect::<Vec<_>>().repeat(3)); // evaluation: forward only
        assert_eq!(trace.period(), Some(8));
        feed(&mut trace, [7, 6, 5]); // a backward pass after all
        assert_eq!(future(&trace, 5), [4, 3, 2, 1, 0]);
    }

    #[test]
    fn memory_is_bounded_and_halving_it_keeps_the_period() {
        let mut trace = Trace::default();
        let cycle: Vec<u64> = (0..101).collect();
        for _ in 0..2 * MEMORY / cycle.len() + 3 {
            feed(&mut trace, cycle.clone());
        }
        assert!(trace.uses.len() <= MEMORY);
        assert!(trace.of.values().map(VecDeque::len).sum::<usize>() <= MEMORY);
        assert_eq!((trace.period(), trace.breaks()), (Some(101), 0));
        assert_eq!(future(&trace, 101), cycle);
    }
}
