//! What the pool promises beside the content: who stays, what comes ahead, what is refused and how it says so.

use qlora_paging::{BufferId, HostBackend, Mode, PagingError, Policy, Pool, Stats, Until};

const PAGE: usize = 4096;

fn pool(frames: usize, policy: Policy) -> Pool<HostBackend> {
    Pool::new(HostBackend::new(frames, PAGE).expect("there is memory"), policy).expect("there are frames")
}

fn create(pool: &mut Pool<HostBackend>, pages: &[usize]) -> Vec<BufferId> {
    let create = |(index, &pages): (usize, &usize)| pool.create(&format!("layer {index}"), pages * PAGE - 7);
    let ids: Vec<_> = pages.iter().enumerate().map(create).map(|id| id.expect("it fits")).collect();
    for &id in &ids {
        pool.begin_fill(id).expect("nobody uses it"); // now its home counts, and it is copied in
        pool.end_fill(id, true).expect("it is there");
    }
    ids
}

/// Uses buffers in this order; what that cost.
fn play(pool: &mut Pool<HostBackend>, order: &[BufferId], mode: Mode) -> Stats {
    let before = pool.stats();
    for &id in order {
        pool.acquire(id, 0, mode).expect("there is room");
        pool.release(id, 0).expect("it is acquired");
    }
    let after = pool.stats();
    Stats {
        hits: after.hits - before.hits,
        misses: after.misses - before.misses,
        bytes_in: after.bytes_in - before.bytes_in,
        bytes_out: after.bytes_out - before.bytes_out,
        ..after
    }
}

fn forward_backward(ids: &[BufferId]) -> Vec<BufferId> {
    ids.iter().chain(ids.iter().rev()).copied().collect()
}

/// Pages that come in over a cyclic order when the future is known and pages of one buffer may lie anywhere: the page
/// leaves whose next use is farthest, and none comes ahead of its use. No policy moves less.
fn least_pages(order: &[(BufferId, usize)], frames: usize) -> usize {
    let uses: Vec<(BufferId, usize)> =
        order.iter().flat_map(|&(id, pages)| (0..pages).map(move |page| (id, page))).collect();
    let next = |page: (BufferId, usize), now: usize| {
        (1..=uses.len()).find(|ahead| uses[(now + ahead) % uses.len()] == page).unwrap_or(usize::MAX)
    };
    let mut resident: Vec<(BufferId, usize)> = Vec::new();
    let mut moved = 0;
    for time in 0..3 * uses.len() {
        let page = uses[time % uses.len()];
        if resident.contains(&page) {
            continue;
        }
        moved += usize::from(time >= 2 * uses.len());
        if resident.len() == frames {
            let victim = (0..frames).max_by_key(|&index| next(resident[index], time)).expect("there are frames");
            resident.swap_remove(victim);
        }
        resident.push(page);
    }
    moved
}

#[test]
fn learned_cycle_is_fetched_ahead_and_moves_few_bytes_where_lru_moves_all() {
    for (policy, most_misses, most_pages) in [(Policy::Trace, 0, 8), (Policy::Lru, 110, 11)] {
        let mut pool = pool(6, policy);
        let ids = create(&mut pool, &[1; 11]);
        play(&mut pool, &ids.repeat(4), Mode::Read);
        let step = play(&mut pool, &ids.repeat(10), Mode::Read);
        assert_eq!(step.misses, most_misses, "{policy:?}");
        let pages = step.bytes_in.div_ceil(10 * PAGE as u64);
        assert!(pages <= most_pages, "{policy:?}: {pages} pages a cycle");
    }
}

#[test]
fn steps_move_little_more_than_the_least_possible_whatever_the_sizes() {
    for (frames, sizes) in
        [(23, vec![7; 9]), (20, vec![7; 9]), (31, vec![7, 2, 7, 2, 7, 2, 7, 2, 7, 2]), (13, vec![1, 5, 1, 4, 2, 3, 6])]
    {
        let mut pool = pool(frames, Policy::Trace);
        let ids = create(&mut pool, &sizes);
        let order = forward_backward(&ids);
        let pages: Vec<_> = order.iter().map(|id| (*id, sizes[id.0 as usize])).collect();
        play(&mut pool, &order.repeat(5), Mode::Read);
        let step = play(&mut pool, &order.repeat(4), Mode::Read);
        let (moved, least) = (step.bytes_in.div_ceil(4 * PAGE as u64), least_pages(&pages, frames) as u64);
        assert!(moved as f64 <= 1.1 * least as f64, "{frames} frames, {sizes:?}: {moved} pages, least {least}");
        assert_eq!(step.trace_breaks, 0);
    }
}

#[test]
fn uses_in_a_row_move_what_one_use_moves() {
    let play_with = |in_a_row: usize| {
        let mut pool = pool(23, Policy::Trace);
        let ids = create(&mut pool, &[7; 9]);
        let order: Vec<_> = forward_backward(&ids).iter().flat_map(|&id| vec![id; in_a_row]).collect();
        play(&mut pool, &order.repeat(3), Mode::Read);
        let step = play(&mut pool, &order.repeat(4), Mode::Read);
        (step.bytes_in, step.misses, step.trace_period)
    };
    assert_eq!(play_with(7), play_with(1));
    assert_eq!(play_with(7).1, 0);
}

#[test]
fn only_what_was_written_is_copied_back() {
    let mut pool = pool(4, Policy::Trace);
    let ids = create(&mut pool, &[2; 5]);
    pool.freeze(ids[0]).expect("nobody uses it");
    play(&mut pool, &ids.repeat(3), Mode::Read);
    assert_eq!(pool.stats().bytes_out, 0);
    play(&mut pool, &ids[2..3], Mode::Write);
    play(&mut pool, &ids.repeat(3), Mode::Read);
    assert_eq!(pool.stats().bytes_out, 2 * PAGE as u64 - 7);
}

#[test]
fn buffer_is_contiguous_across_the_end_of_the_ring_and_keeps_its_bytes() {
    let mut pool = pool(5, Policy::Trace);
    let ids = create(&mut pool, &[2, 2, 2]);
    let mut passed = false;
    for round in 0..4u8 {
        for (index, &id) in ids.iter().enumerate() {
            let address = pool.acquire(id, 0, Mode::Write).expect("there is room") as *mut u8;
            let first = pool.frame_map().iter().position(|&page| page == Some((id, 0)));
            passed |= first == Some(4);
            // SAFETY: the buffer is acquired, and this long.
            let memory = unsafe { std::slice::from_raw_parts_mut(address, 2 * PAGE - 7) };
            let expected = if round == 0 { 0 } else { round * 10 + index as u8 };
            assert!(round == 0 || memory.iter().all(|&byte| byte == expected));
            memory.fill((round + 1) * 10 + index as u8);
            pool.release(id, 0).expect("it is acquired");
        }
    }
    assert!(passed, "no buffer lay across the end");
}

#[test]
fn small_buffer_takes_one_page_of_a_large_one_and_the_rest_stays() {
    let mut pool = pool(8, Policy::Lru);
    let ids = create(&mut pool, &[8, 1]);
    play(&mut pool, &ids, Mode::Read);
    assert_eq!(pool.stats().resident_bytes, 8 * PAGE);
    let back = play(&mut pool, &ids[..1], Mode::Read);
    assert!(back.bytes_in <= PAGE as u64, "more than the lost page came back");
}

#[test]
fn giving_back_takes_clean_pages_before_dirty_ones_and_reclaiming_ends_it() {
    let mut pool = pool(6, Policy::Lru);
    let ids = create(&mut pool, &[2, 2, 2]);
    play(&mut pool, &ids[..1], Mode::Write);
    play(&mut pool, &ids[1..], Mode::Read);
    assert_eq!(pool.give_back(3 * PAGE + 1, Until::Reclaimed).expect("nobody holds them"), 4 * PAGE);
    let stats = pool.stats();
    assert_eq!((stats.limit_bytes, stats.committed_bytes, stats.bytes_out), (2 * PAGE, 2 * PAGE, 0));
    assert_eq!(play(&mut pool, &ids[..1], Mode::Read).misses, 0);
    assert_eq!(pool.give_back(usize::MAX, Until::Reclaimed).expect("nobody holds them"), 2 * PAGE);
    assert_eq!(pool.stats().bytes_out, 2 * PAGE as u64 - 7);
    let error = pool.acquire(ids[0], 0, Mode::Read).expect_err("there is nothing left");
    assert!(error.to_string().contains("(6 were given back)"), "{error}");
    pool.reclaim();
    assert_eq!(play(&mut pool, &ids, Mode::Read).misses, 3);
    assert_eq!(pool.stats().limit_bytes, 6 * PAGE);
}

#[test]
fn acquired_buffers_are_not_given_back() {
    let mut pool = pool(4, Policy::Trace);
    let ids = create(&mut pool, &[1, 2]);
    let address = pool.acquire(ids[1], 0, Mode::Read).expect("there is room");
    play(&mut pool, &ids[..1], Mode::Read);
    assert_eq!(pool.give_back(4 * PAGE, Until::Reclaimed).expect("the other one can go"), PAGE);
    assert_eq!(pool.acquire(ids[1], 0, Mode::Read).expect("it is there"), address);
}

#[test]
fn what_is_wrong_is_named_with_the_way_out() {
    let mut pool = pool(4, Policy::Trace);
    let ids = create(&mut pool, &[2, 2, 3]);
    let message = |error: PagingError<_>| error.to_string();
    let large = message(pool.create("the head", 5 * PAGE).expect_err("too large"));
    assert!(
        large.contains("\"the head\"") && large.contains("5 pages") && large.contains("raise the budget"),
        "{large}"
    );
    assert!(message(pool.create("nothing", 0).expect_err("no bytes")).contains("no bytes"));

    pool.acquire(ids[0], 0, Mode::Read).expect("there is room");
    let held = message(pool.acquire(ids[2], 0, Mode::Read).expect_err("no room"));
    assert!(
        held.contains("\"layer 2\"") && held.contains("3 pages in a row") && held.contains("hold 2 of 4"),
        "{held}"
    );
    assert!(held.contains("release"), "{held}");

    let write = message(pool.acquire(ids[0], 1, Mode::Write).expect_err("another stream reads it"));
    assert!(write.contains("acquired for reading"), "{write}");
    for outcome in [pool.free(ids[0]), pool.discard(ids[0])] {
        assert!(message(outcome.expect_err("it is held")).contains("release it first"));
    }
    let stream = message(pool.release(ids[0], 1).expect_err("not this stream"));
    assert!(stream.contains("another stream"), "{stream}");
    pool.release(ids[0], 0).expect("it is acquired");
    let twice = message(pool.release(ids[0], 0).expect_err("released twice"));
    assert!(twice.contains("released already"), "{twice}");

    pool.freeze(ids[1]).expect("nobody uses it");
    assert!(message(pool.acquire(ids[1], 0, Mode::Write).expect_err("frozen")).contains("reading only"));
    pool.free(ids[1]).expect("nobody uses it");
    for outcome in [pool.acquire(ids[1], 0, Mode::Read).map(drop), pool.release(ids[1], 0), pool.free(ids[1])] {
        assert!(message(outcome.expect_err("freed")).contains("was freed"));
    }
}

#[test]
fn impossible_sizes_are_refused() {
    assert!(HostBackend::new(3, 4097).expect_err("no multiple").to_string().contains("multiple of 4096"));
    assert!(HostBackend::new(usize::MAX / 2, 4096).is_err());
    let empty = HostBackend::new(0, 4096).expect("an empty ring can be mapped");
    assert!(Pool::new(empty, Policy::Trace).expect_err("no frames").to_string().contains("raise the budget"));
}

#[test]
fn freed_homes_serve_again_as_zeros() {
    let mut pool = pool(2, Policy::Trace);
    for round in 0..50 {
        let id = pool.create("activations", 2 * PAGE).expect("it fits");
        let address = pool.acquire(id, 0, Mode::Write).expect("there is room") as *mut u8;
        // SAFETY: the buffer is acquired, and this long.
        let memory = unsafe { std::slice::from_raw_parts_mut(address, 2 * PAGE) };
        assert!(memory.iter().all(|&byte| byte == 0), "round {round}");
        memory.fill(7);
        pool.release(id, 0).expect("it is acquired");
        pool.host(id).expect("nobody writes it");
        pool.free(id).expect("nobody uses it");
    }
    let stats = pool.stats();
    assert_eq!((stats.buffers, stats.host_bytes), (0, 64 << 20));
}
