//! A device that is late: lanes run beside each other in an order that a seed decides, and copies come page by page, so
//! that work which nothing made wait meets memory in the wrong state.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use qlora_paging::{Backend, HostMemory, HostPlace, Lane};

pub const PAGE: usize = 8;
const ADDRESS: u64 = 1 << 20;

/// Who is made to wait for whom, for machines that leave it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    In,
    Out,
    User,
}

impl Kind {
    fn of(lane: Lane<u64>) -> Self {
        match lane {
            Lane::In => Self::In,
            Lane::Out => Self::Out,
            Lane::User(_) => Self::User,
        }
    }
}

#[derive(Debug, Clone)]
enum Work {
    CopyIn {
        from: HostPlace,
        frame: usize,
        bytes: usize,
    },
    Zero {
        frame: usize,
        bytes: usize,
    },
    CopyOut {
        frame: usize,
        to: HostPlace,
        bytes: usize,
    },
    Wait(usize),
    Record(usize),
    /// A kernel that reads, and what it has to find.
    Read {
        at: usize,
        expected: Vec<u8>,
        what: String,
    },
    /// A kernel that writes.
    Write {
        at: usize,
        values: Vec<u8>,
    },
}

#[derive(Debug)]
struct State {
    lanes: Vec<(Lane<u64>, VecDeque<Work>)>,
    /// Lane and whether it has passed, of each event.
    events: Vec<(Kind, bool)>,
    memory: Vec<u8>,
    committed: Vec<bool>,
    /// Frames that the device can hold at once.
    capacity: usize,
    pieces: Vec<Vec<u8>>,
    random: u64,
    left_out: Option<(Kind, Kind)>,
    faults: Vec<String>,
}

/// A handle; clones mean the same machine.
#[derive(Debug, Clone)]
pub struct Machine(Rc<RefCell<State>>);

/// Memory that grows as it is used.
#[derive(Debug, Clone)]
pub struct Grows;

impl HostMemory for Grows {
    type Error = Full;

    fn prepare(&self, _range: Range<usize>) -> Result<(), Full> {
        Ok(())
    }
}

/// An event, and whose it is.
#[derive(Debug, Clone)]
pub struct Event {
    machine: Machine,
    number: usize,
}

#[derive(Debug)]
pub struct Full;

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the device is full")
    }
}

impl std::error::Error for Full {}

impl State {
    fn next(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as usize % below
    }

    fn queue(&mut self, lane: Lane<u64>, work: Work) {
        match self.lanes.iter_mut().find(|(known, _)| *known == lane) {
            Some((_, works)) => works.push_back(work),
            None => self.lanes.push((lane, VecDeque::from([work]))),
        }
    }

    /// Do one thing on one lane that can go on; false when none can.
    fn step(&mut self) -> bool {
        let ready: Vec<usize> = (0..self.lanes.len())
            .filter(|&lane| match self.lanes[lane].1.front() {
                Some(Work::Wait(event)) => self.events[*event].1,
                other => other.is_some(),
            })
            .collect();
        if ready.is_empty() {
            return false;
        }
        let lane = ready[self.next(ready.len())];
        let work = self.lanes[lane].1.pop_front().expect("it has something to do");
        if let Some(rest) = self.perform(work) {
            self.lanes[lane].1.push_front(rest);
        }
        true
    }

    /// Returns what is left of a copy of several pages.
    fn perform(&mut self, work: Work) -> Option<Work> {
        let frames = self.committed.len();
        match work {
            Work::CopyIn { mut from, frame, bytes } => {
                let now = bytes.min(PAGE);
                let page = self.host(from, now).to_vec();
                self.device(frame * PAGE, now, "a copy in").copy_from_slice(&page);
                from.offset += now;
                (bytes > now).then(|| Work::CopyIn { from, frame: (frame + 1) % frames, bytes: bytes - now })
            }
            Work::Zero { frame, bytes } => {
                let now = bytes.min(PAGE);
                self.device(frame * PAGE, now, "zeros").fill(0);
                (bytes > now).then(|| Work::Zero { frame: (frame + 1) % frames, bytes: bytes - now })
            }
            Work::CopyOut { frame, mut to, bytes } => {
                let now = bytes.min(PAGE);
                let page = self.device(frame * PAGE, now, "a copy out").to_vec();
                self.host(to, now).copy_from_slice(&page);
                to.offset += now;
                (bytes > now).then(|| Work::CopyOut { frame: (frame + 1) % frames, to, bytes: bytes - now })
            }
            Work::Wait(_) => None,
            Work::Record(event) => {
                self.events[event].1 = true;
                None
            }
            Work::Read { at, expected, what } => {
                let found: Vec<u8> = (0..expected.len()).map(|i| self.device(at + i, 1, &what)[0]).collect();
                if found != expected {
                    self.faults.push(format!("{what}: expected {expected:?}, found {found:?}"));
                }
                None
            }
            Work::Write { at, values } => {
                for (i, &value) in values.iter().enumerate() {
                    self.device(at + i, 1, "a write")[0] = value;
                }
                None
            }
        }
    }

    /// Bytes of one frame, at an address that may lie in the ring's second round.
    fn device(&mut self, at: usize, bytes: usize, what: &str) -> &mut [u8] {
        let at = at % self.memory.len();
        if !self.committed[at / PAGE] {
            self.faults.push(format!("{what} meets frame {}, which holds no memory", at / PAGE));
        }
        &mut self.memory[at..at + bytes]
    }

    fn host(&mut self, place: HostPlace, bytes: usize) -> &mut [u8] {
        let piece = &mut self.pieces[place.piece];
        let end = place.offset + bytes;
        if piece.len() < end {
            piece.resize(end, 0xAA);
        }
        &mut piece[place.offset..end]
    }
}

impl Machine {
    pub fn new(frames: usize, capacity: usize, seed: u64, left_out: Option<(Kind, Kind)>) -> Self {
        Self(Rc::new(RefCell::new(State {
            lanes: Vec::new(),
            events: Vec::new(),
            memory: vec![0xDD; frames * PAGE],
            committed: vec![false; frames],
            capacity,
            pieces: Vec::new(),
            random: seed | 1,
            left_out,
            faults: Vec::new(),
        })))
    }

    pub fn read(&self, stream: u64, address: u64, expected: Vec<u8>, what: String) {
        let at = (address - ADDRESS) as usize;
        self.0.borrow_mut().queue(Lane::User(stream), Work::Read { at, expected, what });
        self.drift();
    }

    pub fn write(&self, stream: u64, address: u64, values: Vec<u8>) {
        let at = (address - ADDRESS) as usize;
        self.0.borrow_mut().queue(Lane::User(stream), Work::Write { at, values });
        self.drift();
    }

    pub fn host_bytes(&self, address: u64, bytes: usize) -> Vec<u8> {
        self.0.borrow_mut().host(Self::place(address), bytes).to_vec()
    }

    pub fn write_host(&self, address: u64, values: &[u8]) {
        self.0.borrow_mut().host(Self::place(address), values.len()).copy_from_slice(values);
    }

    fn place(address: u64) -> HostPlace {
        HostPlace { piece: (address >> 40) as usize - 1, offset: (address & ((1 << 40) - 1)) as usize }
    }

    /// Some of the queued work gets done, or none.
    fn drift(&self) {
        let mut state = self.0.borrow_mut();
        let steps = [0, 0, 0, 1, 2, 9][state.next(6)];
        for _ in 0..steps {
            state.step();
        }
    }

    /// Everything gets done. Returns what went wrong.
    pub fn finish(&self) -> Vec<String> {
        let mut state = self.0.borrow_mut();
        while state.step() {}
        let mut faults = state.faults.clone();
        if state.lanes.iter().any(|(_, works)| !works.is_empty()) {
            faults.push("a lane waits for an event that never comes".into());
        }
        faults
    }

    pub fn faults(&self) -> Vec<String> {
        self.0.borrow().faults.clone()
    }

    pub fn committed(&self) -> usize {
        self.0.borrow().committed.iter().filter(|&&committed| committed).count()
    }
}

impl Backend for Machine {
    type Stream = u64;
    type Event = Event;
    type Moment = ();
    type Memory = Grows;
    type Error = Full;

    fn page_bytes(&self) -> usize {
        PAGE
    }

    fn frames(&self) -> usize {
        self.0.borrow().committed.len()
    }

    fn address(&self, frame: usize) -> u64 {
        ADDRESS + (frame * PAGE) as u64
    }

    fn commit(&mut self, first: usize, count: usize) -> Result<(), Full> {
        if self.committed() + count > self.0.borrow().capacity {
            return Err(Full);
        }
        let mut state = self.0.borrow_mut();
        assert!(state.committed[first..first + count].iter().all(|&committed| !committed), "committed twice");
        state.committed[first..first + count].fill(true);
        state.memory[first * PAGE..(first + count) * PAGE].fill(0xCC);
        Ok(())
    }

    fn decommit(&mut self, first: usize, count: usize) -> Result<(), Full> {
        let mut state = self.0.borrow_mut();
        assert!(state.committed[first..first + count].iter().all(|&committed| committed), "given back twice");
        state.committed[first..first + count].fill(false);
        state.memory[first * PAGE..(first + count) * PAGE].fill(0xDD);
        Ok(())
    }

    fn reserve_host(&self, _bytes: usize) -> Result<Grows, Full> {
        Ok(Grows)
    }

    fn add_host(&mut self, _memory: Grows) -> usize {
        let mut state = self.0.borrow_mut();
        state.pieces.push(Vec::new());
        state.pieces.len() - 1
    }

    fn host_address(&self, place: HostPlace) -> u64 {
        ((place.piece as u64 + 1) << 40) + place.offset as u64
    }

    fn zero_host(&mut self, place: HostPlace, bytes: usize) {
        self.0.borrow_mut().host(place, bytes).fill(0);
    }

    fn copy_in(&mut self, from: HostPlace, frame: usize, bytes: usize) -> Result<(), Full> {
        self.0.borrow_mut().queue(Lane::In, Work::CopyIn { from, frame, bytes });
        self.drift();
        Ok(())
    }

    fn zero(&mut self, frame: usize, bytes: usize) -> Result<(), Full> {
        self.0.borrow_mut().queue(Lane::In, Work::Zero { frame, bytes });
        self.drift();
        Ok(())
    }

    fn copy_out(&mut self, frame: usize, to: HostPlace, bytes: usize) -> Result<(), Full> {
        self.0.borrow_mut().queue(Lane::Out, Work::CopyOut { frame, to, bytes });
        self.drift();
        Ok(())
    }

    fn record(&mut self, lane: Lane<u64>) -> Result<Event, Full> {
        let mut state = self.0.borrow_mut();
        let number = state.events.len();
        state.events.push((Kind::of(lane), false));
        state.queue(lane, Work::Record(number));
        Ok(Event { machine: self.clone(), number })
    }

    fn wait(&mut self, lane: Lane<u64>, event: &Event) -> Result<(), Full> {
        let mut state = self.0.borrow_mut();
        if state.left_out != Some((Kind::of(lane), state.events[event.number].0)) {
            state.queue(lane, Work::Wait(event.number));
        }
        Ok(())
    }

    fn synchronize(event: &Event) -> Result<(), Full> {
        let mut state = event.machine.0.borrow_mut();
        while !state.events[event.number].1 {
            assert!(state.step(), "the host waits for an event that never comes");
        }
        Ok(())
    }

    fn stall(&mut self) -> Duration {
        Duration::ZERO
    }

    fn moment(&mut self, _lane: Lane<u64>) -> Result<(), Full> {
        Ok(())
    }

    fn seconds((): &(), (): &()) -> Result<f64, Full> {
        Ok(0.0)
    }
}
