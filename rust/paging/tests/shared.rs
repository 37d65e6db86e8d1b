//! A pool for several threads: host memory ahead of its use, and waiting that keeps nobody else waiting.

use std::sync::mpsc;

use qlora_paging::{HostBackend, Mode, Policy, Pool, Shared, Until};

const PAGE: usize = 4096;
const GIB: usize = 1 << 30;

fn shared(frames: usize) -> Shared<HostBackend> {
    let backend = HostBackend::new(frames, PAGE).expect("there is memory");
    Shared::new(Pool::new(backend, Policy::Trace).expect("there are frames"))
}

#[test]
fn reserved_host_memory_serves_buffers_and_is_ready_part_by_part() {
    let pool = shared(3);
    let mut seen = Vec::new();
    let ready = pool.reserve_host(3 * GIB + 5, |ready| {
        seen.push((ready, pool.stats().expect("no fork").host_bytes));
        true
    });
    assert_eq!(ready.expect("it is only addresses"), 3 * GIB + PAGE);
    assert_eq!(seen, [(0, 0), (GIB, GIB), (2 * GIB, 2 * GIB), (3 * GIB, 3 * GIB)]);
    let before = pool.stats().expect("no fork").host_bytes;
    pool.create("in what is ready", 3 * PAGE).expect("it fits");
    assert_eq!(pool.stats().expect("no fork").host_bytes, before);
}

#[test]
fn reserving_ends_when_told_so_and_keeps_what_is_ready() {
    let pool = shared(3);
    assert_eq!(pool.reserve_host(4 * GIB, |ready| ready < 2 * GIB).expect("it is only addresses"), 2 * GIB);
    assert_eq!(pool.stats().expect("no fork").host_bytes, 2 * GIB);
}

#[test]
fn impossible_buffer_takes_no_host_memory() {
    let pool = shared(3);
    assert!(pool.create("too large", 4 * PAGE).is_err());
    assert_eq!(pool.stats().expect("no fork").host_bytes, 0);
}

#[test]
fn frames_that_gave_way_come_back_when_memory_is_freed_and_those_asked_for_do_not() {
    let pool = shared(5);
    let id = pool.create("a", 5 * PAGE).expect("it fits");
    pool.with(|pool| pool.acquire(id, 0, Mode::Write).and_then(|_| pool.release(id, 0))).expect("there is room");
    assert_eq!(pool.give_back(2 * PAGE, Until::Freed).expect("nobody holds them"), 2 * PAGE);
    assert_eq!(pool.give_back(PAGE, Until::Reclaimed).expect("nobody holds them"), PAGE);
    assert_eq!(pool.stats().expect("no fork").limit_bytes, 2 * PAGE);
    pool.memory_was_freed();
    assert_eq!(pool.stats().expect("no fork").limit_bytes, 4 * PAGE);
}

#[test]
fn lock_is_free_while_host_memory_is_prepared() {
    let pool = shared(3);
    std::thread::scope(|scope| {
        let (asked, ask) = mpsc::channel();
        let (answer, answered) = mpsc::channel();
        let pool = &pool;
        scope.spawn(move || {
            for () in ask {
                answer.send(pool.stats().is_ok()).expect("the other thread waits for it");
            }
        });
        let ready = pool.reserve_host(2 * GIB, |_| {
            asked.send(()).expect("the other thread waits for it");
            answered.recv().expect("it answers while memory is being prepared")
        });
        assert_eq!(ready.expect("it is only addresses"), 2 * GIB);
        drop(asked);
    });
}
